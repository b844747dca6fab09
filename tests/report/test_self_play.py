"""What a report says of self-play's iterations, from a lineage as `tandem spin --iterations` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.report.collect import collect, overlay, write_report
from trainer.schema import UserError


def iteration(number: int, accuracy: float, interval: list[float] | None, answer: str) -> dict[str, Any]:
    metrics = {
        "rewards/accuracies": accuracy,
        "rewards/margins": 0.5,
        "logps/chosen": -20.0,
        "logps/rejected": -30.0,
        "nll": 2.5,
    }
    return {
        "iteration": number,
        "opponent": {"digest": f"{number}" * 64},
        "adapter": {"digest": f"{number + 1}" * 64},
        "pairs": {
            "counts": {"train": {"kept": 1200, "previous": 0 if number == 1 else 1100}},
            "similarity": {"train": 0.25, "test": 0.5},
        },
        "lr": 5e-7,
        "beta": 0.1,
        "steps": 1000,
        "validation": metrics,
        "accuracy_interval": interval,
        "examples": [{"prompt": "why <b>?", "real": "because | so", "generated": answer}],
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    lineage = {
        "kind": "spin_lineage",
        "iterations": [
            iteration(1, 0.9, [0.85, 0.95], "first <i>answer"),
            iteration(2, 0.52, [0.47, 0.57], "second"),
        ],
        "ended": "generated can no longer be told from real",
    }
    (tmp_path / "spin" / "train-1").mkdir(parents=True)
    (tmp_path / "spin" / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(UserError, match="holds no run"):
        collect(tmp_path / "spin")
    (tmp_path / "spin" / "train-1" / "manifest.json").write_text(json.dumps({"status": "finished"}))
    return tmp_path / "spin"


def test_iterations_are_a_table_with_the_same_prompts_side_by_side(folder):
    write_report(collect(folder), folder)
    told = (folder / "report.md").read_text(encoding="utf-8")
    rows = [line for line in told.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert rows[0].startswith(
        "| 1 | 90.0\u00a0% | 85.0\u00a0% to 95.0\u00a0% | 0.5 | -20 | 2.5 | -30 | 0.5 | 1,200 + 0 | 111111111111 |"
    )
    assert rows[1].startswith(
        "| 2 | 52.0\u00a0% | 47.0\u00a0% to 57.0\u00a0% | 0.5 | -20 | 2.5 | -30 | 0.5 | 1,200 + 1,100 |"
    )
    assert "lr 5e-07, beta 0.1, 1,000 steps" in rows[0]
    headline = (
        "spin: 2 iterations of self-play, reward accuracy 52.0\u00a0% at the last one; real answers at 2.500"
    )
    assert headline in told
    assert "Ended: generated can no longer be told from real." in told
    assert told.count("- real: because") == 1
    assert told.index("- opponent 1: first") < told.index("- opponent 2: second")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "first &lt;i&gt;answer" in page
    assert "<i>answer" not in page


def test_a_recipe_s_report_and_an_overlay_have_it_too(folder):
    whole = collect(folder.parent / "spin")
    assert list(whole["self_play"]) == ["spin"]
    both = overlay([whole, collect(folder)], ["a", "b"])
    assert len(both["self_play"]) == 2
