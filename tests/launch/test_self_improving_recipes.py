"""The recipes of models that improve themselves, whole, on tiny models: oasst_ru's, and both from scratch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.scratch.lessons import Lessons, write_lessons
from tests.launch.helpers import ROOT, killed_when
from tests.pairs import opinionated
from trainer.pairs.instructions import InstructionPrompts
from trainer.pairs.rubric import RUBRIC

CONFIGS = ROOT / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def command(recipe: str, output: Path, **names: Any) -> list[str]:
    words = [word for name, value in names.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "launch", "run", recipe, "--output", str(output), *words]


def ran(recipe: str, output: Path, **names: Any) -> str:
    """What `tandem run` prints; it has to end well."""
    found = subprocess.run(
        command(recipe, output, **names), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    """Rows as oasst1 has them: three that are held out, nine to train on, and answers."""
    lessons = Lessons(str(CONFIGS / "oasst_ru" / "tiny_lessons.yaml"), str(RUBRIC), answers=1, marks=1)
    write_lessons(lessons, tmp_path / "lessons")
    path = tmp_path / "lessons" / "instructions.jsonl"
    held_out, train = (
        {each.text for each in InstructionPrompts(str(path), part=part, limit=limit).load().prompts}
        for part, limit in (("held_out", 3), ("train", 9))
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if row["text"] in held_out | train or row["role"] == "assistant"]
    few = tmp_path / "instructions.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return few


def test_oasst_ru_whole(instructions: Path, tmp_path: Path) -> None:
    """On a tiny Gemma-2 and another as the outside judge; again: nothing is done twice."""
    base, other = (
        opinionated.make("gemma2", tmp_path / name, seed=seed) for seed, name in enumerate(["base", "other"])
    )
    settings = tmp_path / "pairs.yaml"
    content = yaml.safe_load((CONFIGS / "oasst_ru" / "pairs.yaml").read_text())
    content["prompts"] = str(CONFIGS / "oasst_ru" / "prompts.yaml")
    content["sampling"]["max_new_tokens"] = 8
    settings.write_text(yaml.safe_dump(content | {"min_margin": 0.0}))
    training = tmp_path / "dpo.yaml"
    content = yaml.safe_load((CONFIGS / "oasst_ru" / "dpo.yaml").read_text())
    content["data"]["init_args"]["source"]["init_args"]["validation_fraction"] = 0.4
    training.write_text(yaml.safe_dump(content))
    names: dict[str, Any] = {
        "base": base,
        "instructions": instructions,
        "judge": other,
        "hardware": CONFIGS / "hardware" / "cpu.yaml",
        "n": 2,
        "tokens": 8,
        "pairs_settings": settings,
        "settings": training,
    }
    out = tmp_path / "out"
    assert "oasst_ru: finished" in ran("configs/oasst_ru/recipe.yaml", out, **names)
    before, after = (json.loads((out / stage / "reward.json").read_text()) for stage in ("base", "dpo"))
    assert before["system"] == after["system"] == "Отвечай на русском языке."
    for each in (before, after):
        assert set(each["rewards"]) == {"self", "outside"}
        assert set(each["rewards"]["outside"]["parts"]) == {
            *("brevity", "helpfulness", "accuracy", "clarity", "conciseness")
        }
    # The model's own judge is the base before and after, whatever the adapter says.
    assert before["reward_models"] == after["reward_models"]
    assert after["model"]["adapter"].startswith(str(out / "dpo"))
    pairs = [json.loads(line) for line in (out / "pairs" / "pairs.jsonl").read_text().splitlines()]
    held_out = {each["prompt"] for each in before["examples"]}
    assert not held_out & {row["prompt"][0]["content"] for row in pairs}
    assert all("коротко" not in row["prompt"][0]["content"] for row in pairs)
    for page in ("instructions_page/prompts.html", "pairs/pairs.html", "report.html"):
        assert (out / page).stat().st_size > 10_000
    assert "Отвечай" not in (out / "instructions_page" / "prompts.html").read_text()
    again = ran("configs/oasst_ru/recipe.yaml", out, **names)
    assert again.count("done before, skipped") == 8


def test_oasst_ru_from_scratch(tmp_path: Path) -> None:
    """Killed while it trains on its pairs; the same command makes nothing twice and goes on where it was saved."""
    out = tmp_path / "out"
    world = yaml.safe_load((CONFIGS / "oasst_ru" / "tiny_lessons.yaml").read_text())
    world["subjects"] = {name: world["subjects"][name] for name in ("colours", "next")}
    for each in world["subjects"].values():
        each["pairs"] = dict(list(each["pairs"].items())[:5])
    lessons = tmp_path / "lessons.yaml"
    lessons.write_text(yaml.safe_dump(world, allow_unicode=True))
    settings = tmp_path / "pairs.yaml"
    content = yaml.safe_load((CONFIGS / "oasst_ru" / "tiny_pairs.yaml").read_text())
    settings.write_text(yaml.safe_dump(content | {"min_margin": 0.0}))
    names: dict[str, Any] = {
        "pairs_settings": settings,
        "lessons": lessons,
        "steps": 60,
        "judge_steps": 30,
        "dpo_steps": 40,
    }
    killed_when(command("configs/oasst_ru/tiny.yaml", out, **names), out, "dpo/checkpoints/last", cwd=ROOT)
    told = ran("configs/oasst_ru/tiny.yaml", out, **names)
    assert "oasst_ru_tiny: finished" in told
    assert told.count("done before, skipped") == 8
    manifest = json.loads((out / "dpo" / "manifest.json").read_text())
    assert manifest["step"] == 40
    assert 0 < manifest["from_step"] < 40
    card = json.loads((out / "judge" / "scratch.json").read_text())
    assert card["settings"]["chats"]["path"].endswith("outside.jsonl")
    rewards = json.loads((out / "dpo" / "reward.json").read_text())["rewards"]
    assert all(1 <= each["mean"] <= 5 for each in rewards.values())
    assert json.loads((out / "pairs" / "rescored" / "outside.json").read_text())["same_rubric"] is True


def test_spin_from_scratch(tmp_path: Path) -> None:
    """On lines that the project makes; SFT goes on beside it, measured on the same halves."""
    made = tmp_path / "lines.yaml"
    made.write_text("class_path: trainer.data.sources.GeneratedTexts\ninit_args: {count: 60}\n")
    out = tmp_path / "out"
    names = {
        "lines": made,
        "base_steps": 10,
        "sft_steps": 6,
        "steps": 3,
        "longer_steps": 3,
        "iterations": 1,
        "stop_confidence": "never",
    }
    told = ran("configs/spin/tiny.yaml", out, **names)
    assert "spin_tiny: finished" in told
    lineage = json.loads((out / "self_play" / "lineage.json").read_text())
    assert len(lineage["iterations"]) == 1
    longer, start = (json.loads((out / name / "manifest.json").read_text()) for name in ("sft_longer", "sft"))
    assert (start["step"], longer["step"]) == (6, 3)
    assert all(each["steps"] == 3 for each in lineage["iterations"])
    page = (out / "report.html").read_text()
    assert "Self-play" in page
