"""`tandem pairs prompts`: what lies in a list of prompts, as one HTML page, before anything is generated for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from launch.commands.parsing import check_output, command_parser, instantiated, parsed
from trainer.schema import UserError

PAGE, NUMBERS = "prompts.html", "prompts.json"


def parser() -> ArgumentParser:
    """The arguments of `tandem pairs prompts`."""
    from trainer.pairs.prompts import PromptSource

    made = command_parser(
        "pairs prompts",
        "Write prompts.html and prompts.json: how many prompts there are and why others are left out, their lengths,"
        " scripts and first words, and examples. Nothing is generated.",
    )
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    made.add_subclass_arguments(
        PromptSource, "prompts", required=True, help="The prompts; a YAML file, or a class."
    )
    made.add_argument(
        "--tokenizer",
        type=str | None,
        help="For prompts that are cut by tokens: the generator's folder or hub id.",
    )
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder for the page.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem pairs prompts`; prints the page's path on stdout."""
    from launch.quiet import quiet

    quiet()
    made = parser()
    given = parsed(made, arguments)
    if given.offline and "offline" in (given.prompts.get("init_args") or {}):
        given.prompts.init_args.offline = True
    folder = check_output(given.output)
    from trainer.pairs.prompts_told import tell
    from trainer.provenance import write_json, write_text
    from trainer.report.render import render_prompts

    source = instantiated(made, given).prompts
    found = tell(source, source.load(_tokenizer(given)))
    write_text(folder / PAGE, render_prompts(found))
    write_json(folder / NUMBERS, found)
    print(f"{found['prompts']:,} prompts; written: {folder / NUMBERS}, {folder / PAGE}", file=sys.stderr)
    print(folder / PAGE)
    return 0


def _tokenizer(given: Any) -> Any:
    if given.tokenizer is None:
        return None
    if not given.tokenizer:
        raise UserError("--tokenizer: is empty; give a folder or hub id, or leave it out")
    from trainer.policy.load import load_tokenizer

    try:
        return load_tokenizer(given.tokenizer, None, given.offline, False)
    except UserError as error:
        raise UserError(f"--tokenizer: {str(error).removeprefix('policy.base: ')}") from error
