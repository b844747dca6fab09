"""What several commands' parsers share."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import re
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from trainer.schema import UserError

_LLAMA, _SCORED = "trainer.judges.llamacpp.LlamaCppJudge", "trainer.judges.scored.TransformersJudge"


class Kind(NamedTuple):
    """One of several that a command can do: where its `main(arguments) -> int` lies, and what it does."""

    target: str
    told: str


def dispatch(command: str, kinds: Mapping[str, Kind], arguments: Sequence[str]) -> int:
    """Run the kind that the next word names; returns the exit status. Raises `UserError` for another word."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, kinds))
        print(f"usage: tandem {command} KIND [...]\n\nkinds:")
        print("\n".join(f"  {name:<{width}}  {kind.told}" for name, kind in kinds.items()))
        print(f"\n`tandem {command} KIND --help` shows its settings.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(kinds)}"
        raise UserError(f"{command} {name}: no such kind; {hint}")
    module, function = kinds[name].target.split(":")
    status: int = getattr(importlib.import_module(module), function)(rest)
    return status


def parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """The settings that arguments and config files give; a `UserError` names the file, the key and what is wrong."""
    from launch.errors import EMPTY_CONFIG, check_yaml, config_files, describe, user_error_in

    files = config_files(arguments)
    for file in files:
        if not isinstance(check_yaml(file), dict):
            raise UserError(f"{file}: {EMPTY_CONFIG}")
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise user_error_in(error) or UserError(describe(error, files, arguments)) from error


def instantiated(parser: ArgumentParser, given: Namespace) -> Namespace:
    """The settings with their objects built; what a class refuses, or fails at, is a `UserError`."""
    from launch.errors import describe, root_of, user_error_in

    try:
        return parser.instantiate(given)
    except ArgumentError as error:
        raise user_error_in(error) or UserError(describe(error)) from error
    except Exception as error:
        root = root_of(error)
        named = re.findall(r"class_path='([^']*)'", str(error)) or [_made_in(root)]
        told = " ".join(f"{type(root).__name__}: {root}".split())[:300]
        raise user_error_in(error) or UserError(f"{named[-1]}: cannot be made ({told})") from error


def check_output(output: str | Path, file: bool = False) -> Path:
    """The place that `--output` names, before anything is computed for it.

    Raises:
        UserError: a folder is there where a file is wanted, or a file where a folder is; or nothing can be written.
    """
    path = Path(output)
    if file and path.is_dir():
        raise UserError(f"--output {path}: is a folder; give a file in it")
    if not file and path.exists() and not path.is_dir():
        raise UserError(f"--output {path}: is a file; give a folder")
    there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    try:
        # What stands in the way of a folder that has to be made: a file of its name.
        if blocked := next((each for each in path.absolute().parents if each.is_file()), None):
            raise NotADirectoryError(errno.ENOTDIR, f"{blocked} is a file")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error
    return path


def _made_in(error: BaseException) -> str:
    """The class whose `__init__` an error comes from."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name in ("__init__", "__post_init__") and "self" in frame.f_locals:
            made = type(frame.f_locals["self"])
            return f"{made.__module__}.{made.__qualname__}"
    return "a class of the settings"


def with_judge(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--judge FILE.gguf` and `--judge FOLDER` as the class that can run it."""
    out: list[str] = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        if flag == "--judge" and equals:
            out += [flag, value]
        else:
            out.append(word)
    for place, word in reversed(list(enumerate(out))):
        if place and out[place - 1] == "--judge":
            folder = bool(word) and Path(word).is_dir()
            kind = _LLAMA if word.lower().endswith(".gguf") else _SCORED if folder else None
            out[place : place + 1] = [kind, "--judge.model", word] if kind else [word]
    return out


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
