"""`tandem pairs` in processes of its own: killed, in shards, on two ranks; and the configs that are shipped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.commands.pairs import build_parser
from tests.launch.helpers import ROOT
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.prompts import NoPrompt, TextPrompts

FILES = ("candidates.jsonl", "pairs.jsonl", "prompts.jsonl")
# jsonargparse reads a config from inside its folder: what lies here is then found by its whole path only.
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def config(tmp_path, tiny_gpt2) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(f"beginning number {i}" for i in range(12)))
    (tmp_path / "prompts.yaml").write_text(
        "class_path: trainer.pairs.prompts.TextPrompts\n"
        f"init_args: {{path: {tmp_path / 'texts.txt'}, tokens: null, part: all}}\n"
    )
    content = {
        "generator": {
            "class_path": "trainer.pairs.continuations.LocalGenerator",
            "init_args": {"base": str(tiny_gpt2), "batch_size": 4},
        },
        "prompts": "prompts.yaml",
        "reward": {"class_path": "tests.pairs.rewards.CountReward"},
        "n": 4,
        "sampling": {"do_sample": True, "max_new_tokens": 8},
    }
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def words(config: Path, output: Path, *more: str) -> list[str]:
    return ["pairs", "best-of-n", "--config", str(config), "--output", str(output), "--threads", "1", *more]


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def made(config: Path, output: Path, *more: str) -> dict[str, bytes]:
    assert main(words(config, output, *more)) == 0
    return read(output)


def test_pairs_and_what_is_said_of_them(config, tmp_path, capsys) -> None:
    made(config, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "pairs"
    assert manifest["settings"]["init_args"]["prompts"]["init_args"]["path"].endswith("texts.txt")
    counts, out = manifest["counts"], capsys.readouterr().out
    assert f"{counts['kept']} pairs of 12 prompts, 48 texts" in out
    assert counts["kept"] + sum(n for name, n in counts.items() if name.startswith("dropped_")) == 12
    assert main(["pairs", "merge", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == out


def test_a_builder_by_its_class_path(config, tmp_path) -> None:
    content = yaml.safe_load(config.read_text()) | {"prompts": str(tmp_path / "prompts.yaml")}
    content["prompts"] = yaml.safe_load((tmp_path / "prompts.yaml").read_text())
    other = tmp_path / "builder.yaml"
    other.write_text(
        yaml.safe_dump({"builder": {"class_path": "trainer.pairs.best_of_n.BestOfN", "init_args": content}})
    )
    assert (
        main(["pairs", "build", "--config", str(other), "--output", str(tmp_path / "a"), "--threads", "1"])
        == 0
    )
    assert read(tmp_path / "a") == made(config, tmp_path / "b")


def test_shards_and_the_names_of_those_that_miss(config, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    for shard in ("1/3", "3/3"):
        assert main(words(config, out, "--shard", shard)) == 0
    assert "4 prompts of other shards are not there yet" in capsys.readouterr().out
    assert main(["pairs", "merge", str(out)]) == 2
    assert "4 of 12 prompts have no row yet, of shard 2/3; run them again" in capsys.readouterr().err
    assert made(config, out, "--shard", "2/3") == made(config, tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "4/3"], "--shard 4/3: should be such as 3/16"),
        (["--n", "1"], "BestOfN.n: 1 is not possible"),
        (["--threads", "0"], "error: threads: 0 where a whole number of 1 or more is needed"),
        (["--threads", "two"], "error: threads: 'two' where a whole number is needed"),
        (["--generator.base", "/nowhere"], "/nowhere is no folder"),
        (["--prompts.path", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["--candidates", "3"], "no such setting: --candidates"),
        (["--device", "cpu"], "--device cpu: has no effect in one process; set generator.device to cpu"),
        (["--generator.device", "gpu"], "LocalGenerator.device: gpu: no such device"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, capsys, more, message) -> None:
    assert main(words(config, tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    (tmp_path / "list.yaml").write_text("- a\n")
    assert main([*words(config, tmp_path / "out"), "--config", str(tmp_path / "list.yaml")]) == 2
    assert "list.yaml: holds no settings; it should have lines such as" in capsys.readouterr().err
    assert main(["pairs", "best"]) == 2
    assert "did you mean best-of-n?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"class_path": "tests.pairs.rewards.Unmade"},
            "tests.pairs.rewards.Unmade: cannot be made (ZeroDivisionError: no letters)",
        ),
        (
            {"class_path": "tests.pairs.rewards.Unfinished"},
            "reward: tests.pairs.rewards.Unfinished lacks a method that it has to have",
        ),
        (
            {"class_path": "tests.pairs.rewards.Any"},
            "reward: tests.pairs.rewards.Any is no subclass of Reward",
        ),
        ({"class_path": "nowhere_at_all.Any"}, "reward: No module named 'nowhere_at_all'"),
        (
            {"class_path": "trainer.rewards.Reward", "init_args": {"weight": 1}},
            "reward: trainer.rewards.Reward lacks a method that it has to have",
        ),
        (
            {"class_path": "tests.pairs.rewards.CountReward", "init_args": {"letter": "a"}},
            "reward.letter: no such setting; did you mean `letters`?",
        ),
    ],
)
def test_a_reward_that_cannot_be_made_is_one_line(config, tmp_path, capsys, reward, message) -> None:
    assert main(words(config, tmp_path / "out", "--reward", json.dumps(reward))) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"tandem: error: {message}"
    assert not (tmp_path / "out").exists()
    content = yaml.safe_load(config.read_text()) | {"reward": reward}
    config.write_text(yaml.safe_dump(content))
    assert main(words(config, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


SLOW = """
import sys, time
from launch.cli import main
from trainer.ledger import Ledger
add = Ledger.add
def slowly(self, rows):
    add(self, rows)
    time.sleep(0.2)
Ledger.add = slowly
sys.exit(main(sys.argv[1:]))
"""
"""The command as it is, but for a rest after each batch: time to be killed in."""


@pytest.mark.slow
def test_a_kill_costs_at_most_one_batch(config, tmp_path) -> None:
    out = tmp_path / "out"
    kills = 0
    while not (out / "manifest.json").exists():
        before = _rows(out)
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *words(config, out)], cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (len(_rows(out)) < len(before) + 3):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait() in (0, -signal.SIGKILL)
        assert _rows(out)[: len(before)] == before, "what was there is never made again"
    assert kills >= 2
    assert read(out) == made(config, tmp_path / "whole")


def _rows(out: Path) -> list[bytes]:
    """Rows of the one part, without a torn last one."""
    part = out / "parts" / "1-of-1.0.jsonl"
    return part.read_bytes().split(b"\n")[:-1] if part.exists() else []


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_same_files_as_one(config, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "launch.cli", *words(config, tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pairs of 12 prompts") == 1, "one rank speaks for both"
    parts = {part.name: len(part.read_text().splitlines()) for part in (tmp_path / "two" / "parts").iterdir()}
    assert parts == {"1-of-1.0.jsonl": 6, "1-of-1.1.jsonl": 6}
    assert read(tmp_path / "two") == made(config, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_reward_that_fails_on_one_rank_ends_all_with_a_line(config, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    failing = json.dumps({"class_path": "tests.pairs.rewards.Failing", "init_args": {"at": "number 3"}})
    logs = ["--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    command = [*torchrun, *logs, "-m", "launch.cli", *words(config, tmp_path / "out", "--reward", failing)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    said = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log"))]
    assert len(said) == 2
    assert not any("Traceback" in each for each in said)
    assert any("tandem: error: Failing: fails at 'beginning number 3'" in each for each in said)


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_goes_on(config, tmp_path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words(config, out)],
        cwd=ROOT,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(_rows(out)) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert f"what was made is kept in {out}; the same command goes on" in told


@pytest.mark.parametrize("name", ["pairs", "pairs_no_prompts"])
def test_the_shipped_configs(name) -> None:
    with contextlib.chdir(ROOT):
        given = build_parser("best-of-n").parse_args(
            ["--config", f"configs/imdb/{name}.yaml", "--output", "x"]
        )
        parts: Any = build_parser("best-of-n").instantiate(given)
        made = BestOfN(
            **{key: getattr(parts, key) for key in ("generator", "prompts", "reward", "n", "sampling")}
        )
    assert isinstance(made.generator, LocalGenerator)
    assert made.generator.base == "lvwerra/gpt2-imdb"
    assert made.reward.model == "lvwerra/distilbert-imdb"
    assert isinstance(made.source, NoPrompt if "no_prompts" in name else TextPrompts)
    if isinstance(made.source, TextPrompts):
        assert (made.source.tokens, made.source.part) == (8, "train")


def test_kinds_and_settings_are_told(capsys) -> None:
    assert main(["pairs", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "best-of-n sample continuations" in told
    assert "self-judge have a chat model answer" in told
    assert "rescore have another judge score" in told
    assert "--shard I/N" in build_parser("best-of-n").format_help()
    assert "--builder" in build_parser("build").format_help()
