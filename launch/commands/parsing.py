"""What several commands' parsers share."""

from __future__ import annotations

import argparse
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt


class Formatter(argparse.HelpFormatter):
    """Help without jsonargparse's notes on types; a default where it says something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def command_parser(command: str, description: str) -> ArgumentParser:
    """A parser whose errors `launch.cli` turns into one line."""
    return ArgumentParser(
        prog=f"tandem {command}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Formatter,
    )


def add_model(parser: ArgumentParser) -> None:
    """The settings that say which model answers: `launch.models.answering` takes them."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adapter",
        type=str | None,
        help="Adapter: a run's folder (its best checkpoint), a checkpoint, a PEFT folder or a .pth file.",
    )
    group.add_argument(
        "--base",
        type=str | None,
        help="Base model: a folder, or a hub id. Default: the one that the adapter names, or the tiny one.",
    )
    group.add_argument("--revision", type=str | None, help="Branch, tag or commit of a hub model.")
    group.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="Of the base.")
    group.add_argument("--device", type=str | None, help="cpu, cuda, ... Default: cuda where there is one.")
    group.add_argument(
        "--sharded",
        action="store_true",
        help="Spread the weights over the processes that torchrun or srun started, as ZeRO-3 does.",
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that comes with a hub model."
    )
    group.add_argument("--threads", type=PositiveInt | None, help="CPU threads; 1 is best for tiny models.")
    group.add_argument("--offline", action="store_true", help="Never ask the network.")
