"""`tandem pairs self-judge`: as people type it, from the shipped config; killed and run again; in shards."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.commands.pairs import build_parser
from tests.launch.helpers import ROOT
from tests.pairs.opinionated import make, short_rubric
from tests.pairs.test_command import ENV, SLOW, _rows
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.instructions import OASST, InstructionPrompts
from trainer.pairs.self_judge import SelfJudge

CONFIG = "configs/oasst_ru/pairs.yaml"
WAYS = {"apart": [], "together": ["--way", "together", "--rescored", "0", "--scoring_batch_size", "null"]}


@pytest.fixture(scope="module", autouse=True)
def _in_the_checkout():
    with contextlib.chdir(ROOT):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    (folder / "list.txt").write_text("\n".join(f"Назови город {number}" for number in range(6)))
    short_rubric(folder / "rubric")
    make("llama", folder / "llama")
    return folder


def words(place: Path, output: Path, *more: str) -> list[str]:
    """The shipped config, with a tiny model, a short rubric and a list of instructions."""
    return [
        *("pairs", "self-judge", "--config", CONFIG, "--output", str(output), "--threads", "1", "--offline"),
        *("--generator.base", str(place / "llama"), "--generator.dtype", "float32", "--min_margin", "0"),
        *("--generator.batch_size", "4", "--sampling.max_new_tokens", "24"),
        *("--rubric", str(place / "rubric" / "rubric.yaml"), "--prompts.path", str(place / "list.txt")),
        *("--prompts.where", "{}", "--prompts.part", "all", "--prompts.held_out_fraction", "null", *more),
    ]


def read(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("candidates.jsonl", "pairs.jsonl", "prompts.jsonl")
    }


@pytest.mark.parametrize("way", WAYS)
def test_pairs_shards_and_what_is_said_of_them(place, tmp_path, capsys, way) -> None:
    assert main(words(place, tmp_path / "whole", *WAYS[way])) == 0
    out = capsys.readouterr().out
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    judging = manifest["judging"]
    assert f"{manifest['counts']['kept']} pairs of 6 prompts, 24 texts" in out
    assert (
        f"ties: in {judging['ties']['prompts']} of {judging['ties']['of']} prompts all answers have one score"
        in out
    )
    assert "in another language than ru: " in out
    assert "Spearman of score with length: " in out
    assert ("scored again (1): Spearman" in out) == (way == "apart")
    # A tiny model's digits after a scoring question hold next to nothing: its label's and those of the second time.
    assert out.count("warning: probability of the digits: ") == (2 if way == "apart" else 0)
    assert "of the pairs confirmed, " in out or way == "together"
    assert ("no score could be read from" in out) == (way == "together")
    assert judging["way"] == way
    assert judging["form"] == ("json" if way == "together" else None)
    parts = tmp_path / "parts"
    assert main(words(place, parts, *WAYS[way], "--shard", "2/2")) == 0
    assert main(["pairs", "merge", str(parts)]) == 2
    assert "3 of 6 prompts have no row yet, of shard 1/2" in capsys.readouterr().err
    assert main(words(place, parts, *WAYS[way], "--shard", "1/2")) == 0
    assert read(parts) == read(tmp_path / "whole")
    (parts / "manifest.json").unlink()
    assert main(["pairs", "merge", str(parts)]) == 0
    merged = json.loads((parts / "manifest.json").read_text())
    assert merged["judging"] == judging
    assert main(["pairs", "show", str(parts)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_kill_and_the_same_command(place, tmp_path, way) -> None:
    out, command = tmp_path / "out", words(place, tmp_path / "out", *WAYS[way])
    killed = 0
    while not (out / "manifest.json").exists():
        before = _rows(out)
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *command], cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (killed or len(_rows(out)) < len(before) + 2):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        assert process.wait() in (0, -signal.SIGKILL)
        assert _rows(out)[: len(before)] == before, "what was there is never made again"
    assert killed == 1
    assert main(words(place, tmp_path / "whole", *WAYS[way])) == 0
    assert read(out) == read(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_same_files_as_one(place, tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "launch.cli", *words(place, tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(words(place, tmp_path / "one")) == 0
    assert read(tmp_path / "two") == read(tmp_path / "one")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--way", "both"], "way"),
        (["--form", "json"], "SelfJudge.form: json has no effect with way: apart"),
        (["--rescored", "2"], "SelfJudge.rescored: 2 is not possible"),
        (["--rubric", "/nowhere.yaml"], "rubric /nowhere.yaml: cannot be read"),
        (["--generator.chat", "false"], "SelfJudge.generator.chat: is false; set it to true"),
        (["--prompts.where", "{lang: ru}"], "no column 'lang'"),
        (["--k", "4"], "no such setting: --k"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, capsys, more, message) -> None:
    assert main(words(place, tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert not any("Traceback" in line for line in told)


def test_the_shipped_config() -> None:
    given = build_parser("self-judge").parse_args(["--config", CONFIG, "--output", "x"])
    parts: Any = build_parser("self-judge").instantiate(given)
    own = ("generator", "prompts", "rubric", "way", "form", "n", "sampling", "rescored", "min_margin")
    made = SelfJudge(**{name: getattr(parts, name) for name in own})
    assert isinstance(made.generator, LocalGenerator)
    assert (made.generator.base, made.generator.chat) == ("google/gemma-2-2b-it", True)
    assert isinstance(made.source, InstructionPrompts)
    assert made.source.path == "OpenAssistant/oasst1"
    assert made.source.where == dict(OASST)
    assert made.rubric.language == "ru"
