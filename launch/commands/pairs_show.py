"""`tandem pairs show`: what lies in preference pairs, as one HTML page, before anything is trained on them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from launch.commands.parsing import command_parser, parsed
from trainer.schema import UserError

PAGE, NUMBERS = "pairs.html", "pairs.json"


def parser() -> ArgumentParser:
    """The arguments of `tandem pairs show`."""
    made = command_parser(
        "pairs show",
        "Write pairs.html and pairs.json: how scores, margins and lengths are distributed, what was left out and why,"
        " and examples from both ends of the margin.",
    )
    made.add_argument(
        "pairs",
        type=str,
        metavar="PAIRS",
        help="A folder that `tandem pairs` made; or preferences as `fit` trains on them: a .jsonl, .json, .csv or"
        " .parquet file, or owner/name of a hub dataset.",
    )
    made.add_argument(
        "--output",
        type=str | None,
        metavar="DIR",
        help="Folder for the page. Default: the folder of pairs itself.",
    )
    group = made.add_argument_group("files and hub datasets")
    group.add_argument(
        "--prompt_ends",
        type=str | None,
        metavar="TEXT",
        help="The mark after which the answer begins, in dialogues without a prompt column.",
    )
    group.add_argument(
        "--columns",
        type=dict[str, str] | None,
        metavar="JSON",
        help="Ours -> the file's, where the file has other names: prompt, chosen, rejected, chosen_score, ...",
    )
    group.add_argument("--limit", type=PositiveInt | None, help="Show the first so many pairs.")
    group.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem pairs show`; prints the page's path on stdout."""
    given = parsed(parser(), arguments)
    folder = _folder(given)
    from trainer.provenance import write_json, write_text
    from trainer.report.pairs import Pairs, pairs_of_file, pairs_of_folder
    from trainer.report.render import render_pairs

    if Path(given.pairs).is_dir():
        found = pairs_of_folder(given.pairs)
    else:
        settings = (given.columns, given.prompt_ends, given.limit, given.offline)
        found = pairs_of_file(Pairs(given.pairs, *settings))
    write_json(folder / NUMBERS, found)
    write_text(folder / PAGE, render_pairs(found))
    print(f"{found['pairs']:,} pairs; written: {folder / NUMBERS}, {folder / PAGE}", file=sys.stderr)
    print(folder / PAGE)
    return 0


def _folder(given: Namespace) -> Path:
    """Where the page goes; settings that have no effect, and a page over its own pairs, are refused."""
    pairs = Path(given.pairs)
    if pairs.is_dir():
        for name in ("prompt_ends", "columns", "limit"):
            if (value := getattr(given, name)) is not None:
                raise UserError(
                    f"--{name} {value}: is for files; {pairs} is a folder of pairs, shown as it is"
                )
        return Path(given.output) if given.output else pairs
    if given.output is None:
        raise UserError(f"{pairs}: is no folder of pairs; for a file or hub dataset give --output DIR, too")
    folder = Path(given.output)
    if (folder / NUMBERS).resolve() == pairs.resolve():
        raise UserError(f"--output {folder}: {NUMBERS} there is what would be shown; give another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; give a folder for {PAGE}")
    return folder
