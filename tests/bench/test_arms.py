"""One arm in its process, with the real module: times, memory, operations, token ids; and what goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from launch.bench.models import Shape, with_tokenizer
from launch.bench.run import in_a_process
from launch.bench.workloads import Workload, make_workload

TINY = Shape(layers=2, hidden=32, intermediate=64, heads=2, vocabulary=500)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Workload, int]:
    """A tiny model, made as the bench makes it, and pairs."""
    root = tmp_path_factory.mktemp("bench")
    workload = make_workload("long_answers", root / "workload", 4, TINY.vocabulary, 0)
    for name in ("model", "work"):
        (root / name).mkdir()
    job = {"kind": "model", "work": str(root / "work"), "model": str(root / "model"), "dtype": "float32"}
    found = in_a_process({**job, "settings": dataclasses.asdict(TINY)})
    return (
        with_tokenizer(root / "model", workload.tokenizer, root / "ready"),
        workload,
        found["result"]["layer_weights"],
    )


def measured(made: tuple[Path, Workload, int], work: Path, **settings: Any) -> dict[str, Any]:
    model, workload, _ = made
    job = {"work": str(work), "dtype": "float32", "model": str(model), "pairs": str(workload.file)}
    return in_a_process({**job, "batch_size": 2, "threads": 1, **settings})


def test_tandem_is_measured(made, tmp_path):
    found = measured(made, tmp_path, kind="tandem", epochs=2, count=True)
    result = found["result"]
    assert result["digest"] == made[1].describe()["digest"]
    assert 0 < result["setup_seconds"] < result["epoch_seconds"][0] < result["epoch_seconds"][1]
    tokens = sum(len(part) for pair in made[1].ids for part in pair)
    assert [sum(n for epoch, n, _ in result["steps"] if epoch == e) for e in (0, 1)] == [tokens, tokens]
    assert 100e6 < result["loaded_memory_bytes"] < result["peak_memory_bytes"] < 4e9
    assert result["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    # Long answers to short prompts: little is shared, so even two rows a pair waste little.
    assert 0.9 < result["flops"] / result["useful_flops"] < 4
    assert result["pairs"] == 4
    assert made[2] == 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_what_an_arm_says_is_one_line(made, tmp_path):
    found = measured(made, tmp_path, kind="tandem", settings={"token_bugdet": 1})
    assert found["error"].startswith("data.token_bugdet: PreferenceData has no such setting")


@pytest.mark.slow
@pytest.mark.alone
def test_trl_is_measured_on_the_same_ids(made, tmp_path):
    settings = {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "bf16": False}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    live = measured(made, tmp_path / "a", kind="trl", epochs=1, settings=settings, count=True)["result"]
    precomputed = {**settings, "precompute_ref_log_probs": True}
    cached = measured(made, tmp_path / "b", kind="trl", epochs=1, settings=precomputed, count=True)["result"]
    assert live["digest"] == cached["digest"] == made[1].describe()["digest"]
    assert live["reference_seconds"] is None
    assert 0 < cached["setup_seconds"] + cached["reference_seconds"] < cached["epoch_seconds"][0]
    # A live reference is one more forward: a third to a half more, as TRL's backward computes the head once more.
    assert 1.3 < live["flops"] / cached["flops"] < 1.5
