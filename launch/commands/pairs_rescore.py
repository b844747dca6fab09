"""`tandem pairs rescore`: another judge scores the answers that pairs were made of, for comparison."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from launch.commands.pairs import mass_line
from launch.commands.parsing import command_parser, instantiated, parsed, with_judge
from trainer.judges import Judge


def parser() -> ArgumentParser:
    """The arguments of `tandem pairs rescore`."""
    made = command_parser(
        "pairs rescore",
        "Have a judge score the answers of a folder of pairs by a rubric, and say how far it agrees with the scores"
        " that are there. A rerun asks what is missing.",
    )
    made.add_argument("pairs", type=str, metavar="DIR", help="Folder that `tandem pairs` made.")
    made.add_argument("--config", action="config", help="YAML file with any of these settings.")
    made.add_subclass_arguments(
        Judge,
        "judge",
        required=True,
        help="Who judges: a .gguf file, a transformers model's folder, the .yaml of a judge, or a class such as"
        " trainer.judges.served.ServerJudge with its settings.",
    )
    made.add_argument(
        "--rubric",
        type=str | None,
        metavar="FILE",
        help="Default: the rubric that the pairs were made by, which their folder holds; by another one criteria are"
        " not comparable.",
    )
    made.add_argument(
        "--label", type=str, default="outside", help="The judge's name among several; default: outside."
    )
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem pairs rescore`; returns the exit status."""
    from launch.quiet import quiet
    from trainer.pairs.rescoring import FOLDER, check_merged, rescore, rubric_of
    from trainer.pairs.rubric import Rubric

    quiet()
    made = parser()
    given = parsed(made, with_judge(arguments))
    if given.offline and "offline" in (given.judge.get("init_args") or {}):
        given.judge.init_args.offline = True
    folder = Path(given.pairs)
    check_merged(folder)
    rubric = Rubric.read(given.rubric) if given.rubric else rubric_of(folder)
    judge = instantiated(made, given).judge
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = rescore(folder, judge, rubric, given.label, progress=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"what was scored is kept in {folder / FOLDER}; the same command goes on"
        ) from stop
    _tell(found)
    print(f"written to {folder / FOLDER / given.label}.json", file=sys.stderr)
    return 0


def _tell(found: dict[str, Any]) -> None:
    each = found["compared"]
    print(
        f"{each['answers']:,} answers: Spearman with their own scores {_number(each['spearman'])}, mean"
        f" {_number(found['mean'])} ({_number(each['mean_difference'])} beside theirs)"
    )
    print(
        f"{each['pairs']:,} pairs: {_percent(each['pairs_confirmed'])} confirmed,"
        f" {_percent(each['pairs_contradicted'])} contradicted, {_percent(each['pairs_tied'])} tied"
    )
    if found["same_rubric"] is False:
        print("scored by another rubric than the one the pairs were made by: criteria are not comparable")
    if line := mass_line(found["mass"]):
        print(line)
    if unscored := found["unscored"]:
        print("no score: " + ", ".join(f"{why} {count:,}" for why, count in unscored.items()))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
