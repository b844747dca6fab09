"""`tandem spin`: its kinds one by one as they were published, and all iterations, killed anywhere and run again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file

from launch.cli import main
from launch.self_play_lineage import interval
from tests.launch.helpers import ROOT, killed_when
from tests.policy.test_load import save_plain

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def chats(folder: Path, count: int = 24) -> Path:
    path = folder / "chats.jsonl"
    rows = [{"prompt": f"say the number {i}", "response": f"it is {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, kind: str, **changed: Any) -> Path:
    """A config of `fit`, as small as it can be."""
    content = {
        "model": {
            "class_path": "trainer.module.PreferenceModule",
            "init_args": {
                "policy": {"base": "nowhere", "adapter": {"kind": kind}},
                "reference": {"kind": changed.pop("reference", "shared"), "adapter": "start"},
                "optimizer": {"lr": 0.01},
            },
        },
        "data": {
            "class_path": "trainer.data.datamodule.PreferenceData",
            "init_args": {
                "source": {
                    "class_path": "trainer.data.self_play.SpinPairs",
                    "init_args": {"path": "datasets/iter0"},
                },
                "batch_size": 4,
            },
        },
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            **changed,
        },
        "checkpoint": {"save_steps": 1},
        "threads": 1,
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


PEFT = {"ia3": IA3Config(task_type="CAUSAL_LM"), "lora": LoraConfig(task_type="CAUSAL_LM", r=4)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(base: Path, adapter: Path | None, *more: str) -> int:
    model = (
        ["--model", str(base)] if adapter is None else ["--model", str(adapter), "--base_model", str(base)]
    )
    small = ["--max_new_tokens", "6", "--threads", "1", "--device", "cpu"]
    return main(["spin", "generate", *model, *small, *more])


def train(base: Path, start: Path | None, file: Path, run: str, *more: str) -> int:
    begun = [] if start is None else ["--model.policy.start", str(start)]
    return main(
        [
            "spin",
            "train",
            "--config",
            str(file),
            "--model.policy.base",
            str(base),
            *begun,
            "--run",
            run,
            *more,
        ]
    )


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("reference", ["shared", "sharded"])
def test_an_iteration_by_hand_in_the_published_folders(kind, reference, here, tiny_llama, capsys):
    adapter = save_plain(tiny_llama, here / "sft", PEFT[kind])
    before = {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()}
    assert main(["spin", "reformat", "--data", str(chats(here)), "--test_fraction", "0.3"]) == 0
    for number in ("1/2", "2/2"):
        assert generate(tiny_llama, adapter, "--shard", number) == 0
    assert main(["spin", "convert", "--num_fracs", "2"]) == 0
    assert "pairs: datasets/iter0" in capsys.readouterr().out
    assert train(tiny_llama, adapter, config(here, kind, reference=reference), "run") == 0
    manifest = json.loads((here / "run" / "manifest.json").read_text())
    opponent = json.loads((here / "datasets/iter0/manifest.json").read_text())["opponent"]
    assert manifest["data"]["source"]["opponent"] == opponent
    assert manifest["reference"]["before"] == manifest["reference"]["after"] is not None
    own, previous = (
        load_file(path / "adapter_model.safetensors") for path in (here / "run/checkpoints/last", adapter)
    )
    assert own.keys() == previous.keys()
    assert any((own[name] != previous[name]).any() for name in own)
    # Nothing of the base's size was written, and the base was left alone.
    weights = (tiny_llama / "model.safetensors").stat().st_size
    written = [path for path in here.rglob("*.safetensors") if path.stat().st_size > weights // 2]
    assert not written
    assert {path: path.stat().st_mtime_ns for path in tiny_llama.iterdir()} == before


def test_training_is_refused_against_another_opponent_or_template(here, tiny_llama, capsys):
    adapter, other = (save_plain(tiny_llama, here / name, PEFT["lora"]) for name in ("sft", "other"))
    assert main(["spin", "reformat", "--data", str(chats(here, 16)), "--test_fraction", "0.3"]) == 0
    assert generate(tiny_llama, adapter) == 0
    assert main(["spin", "convert"]) == 0
    file = config(here, "lora")
    assert train(tiny_llama, other, file, "one") == 2
    assert (
        "is not the opponent that datasets/iter0 was generated by: its adapter is" in capsys.readouterr().err
    )
    words = [
        "--config",
        str(file),
        "--model.policy.base",
        str(tiny_llama),
        "--model.policy.start",
        str(other),
    ]
    for command in (["validate"], ["cache-reference", "--output", "cache"]):
        assert main([*command, *words]) == 2
        assert "is not the opponent that datasets/iter0 was" in capsys.readouterr().err
    assert not (here / "cache").exists()
    assert train(tiny_llama, adapter, file, "two", "--model.reference.adapter", "null") == 2
    assert "its adapter is none" in capsys.readouterr().err
    pairs = here / "datasets/iter0/manifest.json"
    pairs.write_text(json.dumps({**json.loads(pairs.read_text()), "template": "0" * 64}))
    assert train(tiny_llama, adapter, file, "three") == 2
    said = capsys.readouterr().err
    assert "datasets/iter0: was generated with the chat template 000000000000" in said
    assert "Traceback" not in said
    assert not list(here.glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "--model: is missing"),
        (["generate", "--model", "{base}", "--lora_r", "4"], "--lora_r 4: has no effect, .* is no adapter"),
        (["generate", "--model", "{base}", "--base_model", "x"], "--base_model x: has no effect"),
        (["generate", "--model", "{lora}", "--lora_r", "5"], "--lora_r 5: .* has 4; give that"),
        (["generate", "--model", "{lora}", "--lora_alpha", "9"], "--lora_alpha 9: .* has 8; give that"),
        (["generate", "--model", "{ia3}", "--lora_r", "4"], "--lora_r 4: has no effect, .* no LoRA adapter"),
        (
            ["generate", "--model", "{lora}", "--data_frac", "1"],
            "--data_frac 1: has no effect with frac_len 0",
        ),
        (["generate", "--model", "{lora}", "--shard", "1/2", "--frac_len", "3"], "two ways to part the data"),
        (["generate", "--model", "{lora}", "--shard", "3/2"], "--shard 3/2: should be such as 3/16"),
        (
            ["generate", "--model", "{lora}", "--do_sample", "false", "--top_k", "5"],
            "no effect without do_sample",
        ),
        (["generate", "--model", "{lora}", "--input_dir", "nowhere"], "nowhere: holds no train.jsonl"),
        (["generate", "--model", "someone/model", "--offline"], "someone/model.* --offline refuses"),
        (["convert", "--input_dir", "nowhere"], "nowhere: no such folder"),
        (["reformat", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["reformat"], "arguments are required: data"),
        (["generates"], "did you mean generate"),
        (["--iterations", "2", "--model", "{lora}"], "--config: is missing"),
        (
            ["--config", "x.yaml", "--iterations", "1", "--lr", "1", "2", "--model", "{lora}"],
            "--lr: 2 values for 1",
        ),
        (
            ["--config", "x.yaml", "--stop_confidence", "2", "--model", "{lora}"],
            "--stop_confidence 2.0: should",
        ),
    ],
)
def test_mistakes_are_one_line(words, message, here, tiny_llama, capsys):
    places = {"base": tiny_llama}
    for kind in PEFT:
        places[kind] = save_plain(tiny_llama, here / kind, PEFT[kind])
    (here / "x.yaml").write_text("threads: 1\n")
    if "nowhere" not in words:
        chats(here)
        main(["spin", "reformat", "--data", "chats.jsonl"])
    capsys.readouterr()
    assert main(["spin", *(word.format(**places) for word in words)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tandem: ")]
    assert re.search(message, line)


def test_the_adapter_s_own_lora_settings_are_accepted(here, tiny_llama):
    adapter = save_plain(tiny_llama, here / "lora", PEFT["lora"])
    chats(here, 4)
    assert main(["spin", "reformat", "--data", "chats.jsonl", "--test_fraction", "0"]) == 0
    published = [
        "--lora_r",
        "4",
        "--lora_alpha",
        "8",
        "--data_frac",
        "1",
        "--frac_len",
        "2",
        "--batch_size",
        "2",
    ]
    assert generate(tiny_llama, adapter, *published) == 0
    assert main(["spin", "convert", "--num_fracs", "1"]) == 2
    assert generate(tiny_llama, adapter, "--data_frac", "0", "--frac_len", "2") == 0
    assert main(["spin", "convert", "--num_fracs", "2"]) == 0


def test_an_interval_says_whether_generated_can_be_told_from_real():
    # Wilson, 95 %: 60 of 100 is 0.502 to 0.691, and 59 of 100 is 0.492 to 0.681.
    assert interval(0.60, 100, 0.95) == pytest.approx([0.5020, 0.6906], abs=1e-4)
    assert interval(0.59, 100, 0.95) == pytest.approx([0.4920, 0.6813], abs=1e-4)
    assert interval(0.59, 100, None) is None


# --- all iterations


def loop(folder: Path, base: Path, output: str, *more: str) -> list[str]:
    words = ["spin", "--iterations", "2", "--config", "train.yaml", "--generate", "generate.yaml"]
    words += ["--model", "sft", "--base_model", str(base), "--output_dir", output, "--lr", "0.01", "0.005"]
    return [sys.executable, "-m", "launch", *words, *more]


@pytest.fixture
def ready(here, tiny_llama):
    """Chats, an adapter and configs, in the current folder."""
    save_plain(tiny_llama, here / "sft", PEFT["lora"])
    assert main(["spin", "reformat", "--data", str(chats(here)), "--test_fraction", "0.3"]) == 0
    config(here, "lora")
    (here / "generate.yaml").write_text("{max_new_tokens: 6, threads: 1}\n")
    return here


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def adapter_of(output: Path) -> bytes:
    return (output / "last" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_iterations_killed_anywhere_and_run_again(ready, tiny_llama):
    whole = run(loop(ready, tiny_llama, "whole", "--stop_confidence", "never"), ready)
    assert "spin: all iterations, 2 of 2: whole/last" in whole
    lineage = json.loads((ready / "whole" / "lineage.json").read_text())
    first, second = lineage["iterations"]
    assert first["adapter"]["digest"] == second["opponent"]["digest"] != first["opponent"]["digest"]
    assert [each["lr"] for each in (first, second)] == [0.01, 0.005]
    assert [each["seeds"]["generate"] for each in (first, second)] == [0, 1]
    assert second["pairs"]["counts"]["train"]["previous"] == first["pairs"]["counts"]["train"]["kept"]
    again = run(loop(ready, tiny_llama, "whole", "--stop_confidence", "never"), ready)
    assert again.count("done before, skipped") == 8
    command = loop(ready, tiny_llama, "killed", "--stop_confidence", "never")
    for sign in ("generate-1/*/parts/0.jsonl", "train-1/checkpoints/step-*", "train-2/checkpoints/step-*"):
        killed_when(command, ready, f"killed/{sign}")
    run(command, ready)
    assert adapter_of(ready / "killed") == adapter_of(ready / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_stops_when_generated_can_no_longer_be_told_from_real(ready, tiny_llama):
    """With a learning rate of almost nothing the main player stays its opponent: an accuracy of a coin."""
    words = loop(ready, tiny_llama, "out", "--model.optimizer.lr", "1e-30", "--trainer.max_steps", "1")
    said = run(words, ready)
    assert "spin: generated can no longer be told from real, 1 of 2" in said
    lineage = json.loads((ready / "out" / "lineage.json").read_text())
    (only,) = lineage["iterations"]
    assert only["accuracy_interval"][0] <= 0.5
    assert not only["told_apart"]
    # Other answers than the ones there are put aside, not refused.
    (ready / "generate.yaml").write_text("{max_new_tokens: 4, threads: 1}\n")
    run(words, ready)
    assert (ready / "out" / ".stale" / "generate-1" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("reference", ["shared", "sharded"])
def test_iterations_on_two_ranks_under_zero3_are_those_of_one(reference, ready, tiny_llama):
    config(ready, "lora", reference=reference)
    small = ["--stop_confidence", "never", "--model.optimizer.lr", "0.01", "--trainer.max_steps", "2"]
    sharded = ["--trainer.devices", "2", "--trainer.strategy", "zero3", "--ranks", "2"]
    run(loop(ready, tiny_llama, "one", *small, "--iterations", "1", "--lr", "0.01"), ready)
    run(loop(ready, tiny_llama, "two", *small, *sharded, "--iterations", "3"), ready)
    one, two = (json.loads((ready / name / "lineage.json").read_text()) for name in ("one", "two"))
    assert len(two["iterations"]) == 3
    assert len({each["opponent"]["digest"] for each in two["iterations"]}) == 3
    left, right = (each["iterations"][0] for each in (one, two))
    assert left["pairs"]["files"] == right["pairs"]["files"], "two ranks generate what one does"
    for name in ("rewards/margins", "logps/chosen", "logps/rejected"):
        assert left["validation"][name] == pytest.approx(right["validation"][name], abs=1e-3)
    own, other = (
        load_file(ready / name / "train-1/checkpoints/last/adapter_model.safetensors")
        for name in ("one", "two")
    )
    assert own.keys() == other.keys()
    assert all(torch.allclose(own[name], other[name], rtol=0, atol=1e-4) for name in own)
