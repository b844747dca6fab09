"""`tandem export`: an adapter merged into its base, as a Hugging Face folder that needs no tandem."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from launch.commands.parsing import add_model, command_parser
from trainer.schema import UserError

if TYPE_CHECKING:
    from launch.models import Answering


def parser() -> ArgumentParser:
    """The arguments of `tandem export`."""
    made = command_parser(
        "export",
        "Merge an adapter into its base model and write a Hugging Face folder (safetensors and tokenizer)"
        " that transformers, vLLM or llama.cpp's converter load as any other model.",
    )
    add_model(made)
    made.add_argument(
        "--output", type=str, required=True, metavar="DIR", help="A folder that is not there yet."
    )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem export`; prints the folder on stdout."""
    given = parser().parse_args(list(arguments))
    if given.adapter is None:
        raise UserError("--adapter: is needed; give a run's folder or a checkpoint")
    output = Path(given.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"--output {output}: is there already; give a folder that is not, nothing is overwritten"
        )
    from launch.models import answering

    ready = answering(given)
    # Written beside and renamed, so that a full disk or a kill leaves no half model under the final name.
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _write_merged(ready, partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"merged {given.adapter} into {ready.description['base']}", file=sys.stderr)
    print(output)
    return 0


def _write_merged(ready: Answering, folder: Path) -> None:
    merged = ready.model.merge_and_unload() if hasattr(ready.model, "merge_and_unload") else ready.model
    merged.save_pretrained(folder)
    ready.tokenizer.save_pretrained(folder)
