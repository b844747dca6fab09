"""The spin recipe, whole, on a tiny model; and iterations killed in the middle of a step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from tests.launch.helpers import ROOT, killed_when
from tests.launch.test_spin import PEFT, adapter_of, config, loop, run
from tests.policy.test_load import save_plain

CONFIGS = ROOT / "configs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a handful of chats, of which some have two answers, and what is smaller than in the recipe."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": said(f"say {i}", f"it is {i}", "again", f"{i}, I said")[: 2 + i % 2 * 2]}
        for i in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chats.yaml").write_text("{data: chats.jsonl, test_fraction: 0.3, test_limit: 4}\n")
    (tmp_path / "generate.yaml").write_text("{max_new_tokens: 6, threads: 1, device: cpu}\n")
    cpu = yaml.safe_load((CONFIGS / "hardware" / "cpu.yaml").read_text())
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump({**cpu, "threads": 1}))
    return tmp_path


def changed(kind: str, **policy: Any) -> str:
    """The recipe's settings of SFT with another adapter, every answer learned."""
    content = yaml.safe_load((CONFIGS / "spin" / "sft.yaml").read_text())
    content["model"]["init_args"]["policy"]["adapter"] = {"kind": kind, **policy}
    content["data"]["init_args"]["source"]["init_args"]["scored_turns"] = "all"
    Path("sft.yaml").write_text(yaml.safe_dump(content))
    return "sft.yaml"


@pytest.mark.parametrize(("kind", "iterations"), [("lora", 2), ("ia3", 1)])
def test_the_recipe_runs_whole(kind, iterations, here, tiny_gemma2):
    names = {
        "base": tiny_gemma2,
        "chats": "chats.yaml",
        "generation": "generate.yaml",
        "hardware": "cpu.yaml",
        "settings": CONFIGS / "spin" / f"{kind}.yaml",
        "iterations": iterations,
        "stop_confidence": "never",
    }
    if kind == "ia3":
        names["sft_settings"] = changed("ia3")
    words = [word for name, value in names.items() for word in ("--set", f"{name}={value}")]
    command = [
        sys.executable,
        "-m",
        "launch",
        "run",
        str(CONFIGS / "spin" / "recipe.yaml"),
        "--output",
        "out",
        *words,
    ]
    told = run(command, here)
    assert f"spin: all iterations, {iterations} of {iterations}" in told
    sft = json.loads(Path("out/sft/manifest.json").read_text())
    turns = "all" if kind == "ia3" else "last"
    assert sft["data"]["source"]["scored_turns"] == turns
    lineage = json.loads(Path("out/self_play/lineage.json").read_text())
    assert [each["iteration"] for each in lineage["iterations"]] == list(range(1, iterations + 1))
    first = lineage["iterations"][0]
    assert Path(first["opponent"]["start"]).resolve() == Path("out/sft/checkpoints/best").resolve()
    adapter = json.loads(Path("out/self_play/last/adapter_config.json").read_text())
    assert adapter["peft_type"].lower() == kind
    assert first["validation"]["pairs"] == 4
    report = json.loads(Path("out/self_play/report.json").read_text())
    assert "self_play" in report
    assert Path("out/self_play/report.html").stat().st_size > 1000
    assert run(command, here).count("done before, skipped") >= 3
    if kind == "ia3":
        forced = run([*command, "--only", "self_play", "--force"], here)
        assert "train-1: forced" in forced
        assert adapter_of(Path("out/self_play"))


def files(output: Path) -> dict[str, bytes]:
    """What an iteration makes, but for what tells of times."""
    made = [
        *output.glob("generate-1/*/*.jsonl"),
        *output.glob("convert-1/*.jsonl"),
        output / "convert-1/manifest.json",
    ]
    return {str(path.relative_to(output)): path.read_bytes() for path in made}


def test_killed_in_generate_on_two_ranks_and_in_convert(here, tiny_llama):
    save_plain(tiny_llama, here / "sft", PEFT["lora"])
    assert main(["spin", "reformat", "--config", "chats.yaml"]) == 0
    config(here, "lora")
    more = ("--stop_confidence", "never", "--iterations", "1", "--lr", "0.01")
    run(loop(here, tiny_llama, "whole", *more), here)
    command = loop(here, tiny_llama, "killed", *more, "--ranks", "2")
    killed_when(command, here, "killed/stages/generate-1.stage.json", runner_only=True)
    assert not list(here.glob("killed/generate-1/*/parts/*.jsonl")), "its ranks went on without it"
    for sign in ("generate-1/*/parts/*.jsonl", "stages/convert-1.stage.json", "convert-1/train.jsonl"):
        killed_when(command, here, f"killed/{sign}")
        time.sleep(2)  # torchrun's ranks are of no group of its; they see within a second that it is gone
    run(command, here)
    assert files(here / "killed") == files(here / "whole")
    assert adapter_of(here / "killed") == adapter_of(here / "whole")
