"""`tandem report`: a run's report as JSON, Markdown and one HTML page; several runs laid over each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from launch.commands.parsing import command_parser
from trainer.schema import UserError


def parser() -> ArgumentParser:
    """The arguments of `tandem report`."""
    made = command_parser(
        "report",
        "Write report.json, report.md and report.html. Of one folder (a recipe's runs, or a single run): into"
        " it. Of several: laid over each other, into --output.",
    )
    made.add_argument("runs", type=str, nargs="+", metavar="RUN", help="Folders of runs.")
    made.add_argument("--output", type=str | None, metavar="DIR", help="Folder for the report.")
    made.add_argument(
        "--names",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME",
        help="What several runs are called, in their order. Default: as their folders are.",
    )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem report`; prints the HTML page's path on stdout."""
    given = parser().parse_args(list(arguments))
    folders = [Path(run) for run in given.runs]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the folder of a run or of a recipe's runs")
    if len(folders) > 1 and given.output is None:
        raise UserError("--output DIR is needed for the report of several runs")
    if given.names and (len(folders) < 2 or len(given.names) != len(folders)):
        raise UserError(
            f"--names {' '.join(given.names)}: should be one name for each of several runs, and there"
            f" {'is one run' if len(folders) == 1 else f'are {len(folders)} runs'}"
        )
    from trainer.evaluation.letters import published_scores
    from trainer.report.collect import collect, overlay, write_report

    reports = [collect(folder, **told(folder), published=published_scores()) for folder in folders]
    paths = write_report(overlay(reports, given.names), given.output or folders[0])
    print(f"written: {', '.join(map(str, paths))}", file=sys.stderr)
    print(paths[-1])
    return 0


def told(folder: Path) -> dict[str, Any]:
    """What the recipe runner wrote down about itself: title and commands."""
    from trainer.provenance import read_json

    path = folder / "recipe.json"
    if not path.is_file():
        return {}
    recipe = read_json(path)
    return {"title": recipe["title"], "commands": recipe["commands"]}
