"""Builders, generators and prompt sources of a user's own: what goes wrong in one is a line, and rows are kept."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typing_extensions import override

from launch.cli import main
from tests.launch.helpers import ROOT
from tests.pairs.opinionated import short_rubric
from tests.pairs.rewards import CountReward
from tests.pairs.test_command import ENV
from trainer.generation import Sampling, of_this_rank
from trainer.ledger import Row
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import Pair, PairBuilder, Shard, build
from trainer.pairs.continuations import Continuation, Continued, Generator
from trainer.pairs.prompts import NoPrompt, Prompt, Prompts, PromptSource
from trainer.pairs.self_judge import SelfJudge
from trainer.schema import UserError

HERE = "tests.pairs.test_users"


class OwnGenerator(Generator):
    """Says the letters of a prompt's key; at the third prompt it does what `at_third` says."""

    def __init__(self, at_third: str = "raise") -> None:
        self.at_third = at_third
        self.chat = True

    @override
    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        for number, prompt in enumerate(of_this_rank(list(prompts))):
            texts = [Continuation("abc"[: i + 1] + prompt.key, 3, True) for i in range(n)]
            if number == 2 and self.at_third == "raise":
                raise KeyError("no such word\nand more")
            strange: dict[str, Any] = {
                "text": [(prompt, ["plain text"])],
                "stranger": [(Prompt("never asked", ""), texts)],
                "nothing": None,
            }
            yield strange.get(self.at_third, [(prompt, texts)]) if number == 2 else [(prompt, texts)]

    @override
    def describe(self) -> dict[str, Any]:
        return {"at": object()} if self.at_third == "describe" else {"class": "OwnGenerator"}


class OwnPrompts(PromptSource):
    @override
    def load(self, tokenizer: Any = None) -> Prompts:
        raise ZeroDivisionError("division by zero")


class OwnBuilder(PairBuilder):
    """Does as it is told at the third prompt, or where pairs are made of rows."""

    def __init__(self, fails: str = "rows") -> None:
        self.fails = fails

    @override
    def prompts(self) -> Prompts:
        return NoPrompt(5).load()

    @override
    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        for number, prompt in enumerate(of_this_rank(list(prompts))):
            texts = [
                {"text": text, "tokens": 1, "finished": True, "score": len(text)} for text in ("a", "bb")
            ]
            row: Row = {"key": prompt.key, "prompt": prompt.text, "candidates": texts}
            if number == 2 and self.fails == "rows":
                raise RuntimeError("the third")
            if number == 2 and self.fails == "keyless":
                del row["key"]
            if number == 2 and self.fails == "numberless":
                texts[0]["score"] = math.nan
            if number == 2 and self.fails == "wordy":
                texts[0]["score"] = "good"
            yield [row]

    @override
    def pair(self, row: Row, counts: Counter[str]) -> Pair | None:
        if self.fails == "pair":
            raise ArithmeticError("no number")
        if self.fails == "scoreless":
            return Pair({"text": "b"}, row["candidates"][0])
        return Pair(row["candidates"][1], row["candidates"][0])

    @override
    def pair_row(self, row: Row, pair: Pair) -> dict[str, Any]:
        if self.fails == "numpy":
            return {**super().pair_row(row, pair), "length": np.int64(2)}
        return super().pair_row(row, pair) if self.fails != "pair_row" else {}["nothing"]

    @override
    def describe(self) -> Any:
        return {"class": "OwnBuilder"} if self.fails != "describe" else ["OwnBuilder"]

    @override
    def selection(self) -> dict[str, Any]:
        return {}

    @override
    def findings(self, rows: Sequence[Row], pairs: Sequence[tuple[Row, Pair]]) -> dict[str, Any]:
        return {} if self.fails != "findings" else {"mean": np.float32(1)}


def rows_kept(folder: Path) -> int:
    return sum(len(part.read_text().splitlines()) for part in (folder / "parts").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ("raise", r"^OwnGenerator\.continued: fails \(KeyError: 'no such word"),
        ("text", r"^OwnGenerator\.continued: gave \[\(Prompt.* is wanted"),
        ("stranger", r"^OwnGenerator\.continued: gave .*never asked.* is wanted"),
        ("nothing", r"^OwnGenerator\.continued: fails \(TypeError"),
    ],
)
@pytest.mark.parametrize("kind", ["best_of_n", "self_judge"])
def test_a_generator_that_fails_is_named_and_rows_are_kept(tmp_path, kind, at, told) -> None:
    def made(generator: OwnGenerator) -> PairBuilder:
        if kind == "best_of_n":
            return BestOfN(generator, NoPrompt(5), CountReward("abc"), 3)
        rubric = str(short_rubric(tmp_path / "rubric"))
        return SelfJudge(generator, NoPrompt(5), rubric, "together", "plain", 3, Sampling(8, True))

    with pytest.raises(UserError, match=told):
        build(made(OwnGenerator(at)), tmp_path / "out")
    assert rows_kept(tmp_path / "out") == 2


def test_what_a_generator_says_of_itself_has_to_be_plain(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^OwnGenerator\.describe: fails \(TypeError"):
        build(BestOfN(OwnGenerator("describe"), NoPrompt(5), CountReward(), 3), tmp_path / "out")


def test_prompts_that_fail_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^OwnPrompts\.load: fails \(ZeroDivisionError: division by zero\)$"):
        build(BestOfN(OwnGenerator(), OwnPrompts(), CountReward(), 3), tmp_path / "out")


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("rows", r"^OwnBuilder\.rows: fails \(RuntimeError: the third\)"),
        ("keyless", r"^OwnBuilder\.rows: gave .*; a list of rows is wanted"),
        ("numberless", r"^OwnBuilder\.rows: fails \(ValueError: Out of range float"),
        ("wordy", r"^OwnBuilder\.rows: gave .*; a list of rows is wanted, .* whose scores are numbers"),
    ],
)
def test_a_builder_that_fails_is_named_and_other_shards_go_on(tmp_path, fails, told) -> None:
    with pytest.raises(UserError, match=told):
        build(OwnBuilder(fails), tmp_path / "out", Shard(1, 1))
    assert rows_kept(tmp_path / "out") == 2
    built = build(OwnBuilder("never"), tmp_path / "out", Shard(2, 2))
    assert built.missing == 2
    assert build(OwnBuilder("never"), tmp_path / "out").manifest is not None


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("pair", r"^OwnBuilder: makes nothing of the row 'none-0' \(ArithmeticError: no number\)"),
        (
            "scoreless",
            r"^OwnBuilder\.pair: gave Pair\(.*; None or a Pair is wanted, of candidates with a score",
        ),
        ("pair_row", r"^OwnBuilder\.pair_row: fails \(KeyError: 'nothing'\)"),
        ("numpy", r"^OwnBuilder\.pair_row: fails \(TypeError: Object of type int64"),
        ("findings", r"^OwnBuilder\.findings: fails \(TypeError: Object of type float32"),
    ],
)
def test_pairs_that_a_builder_cannot_make_are_named(tmp_path, fails, told) -> None:
    with pytest.raises(UserError, match=told):
        build(OwnBuilder(fails), tmp_path / "out")
    assert rows_kept(tmp_path / "out") == 5


def test_a_builder_that_describes_itself_by_a_list_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"^OwnBuilder\.describe: gave \['OwnBuilder'\]; a dict is wanted$"):
        build(OwnBuilder("describe"), tmp_path / "out")


def test_a_fault_of_our_own_is_not_hidden(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(NoPrompt, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(BestOfN(OwnGenerator(), NoPrompt(5), CountReward(), 3), tmp_path / "out")


def config(tmp_path: Path) -> list[str]:
    content = {"builder": {"class_path": f"{HERE}.OwnBuilder", "init_args": {"fails": "rows"}}}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(content))
    return ["pairs", "build", "--config", str(tmp_path / "build.yaml"), "--output", str(tmp_path / "out")]


def test_the_command_says_it_in_one_line(tmp_path, capsys) -> None:
    assert main(config(tmp_path)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1] == "tandem: error: OwnBuilder.rows: fails (RuntimeError: the third)"
    assert not any("Traceback" in line for line in told)


@pytest.mark.slow
@pytest.mark.distributed
def test_each_rank_says_it_and_keeps_its_rows(tmp_path) -> None:
    """Five prompts: the first rank's third fails, the second rank has two."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "launch.cli", *config(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "tandem: error: OwnBuilder.rows: fails (RuntimeError: the third)" in done.stderr
    assert 'raise RuntimeError("the third")' not in done.stderr
    assert rows_kept(tmp_path / "out") == 4
