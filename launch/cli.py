"""The command `tandem`: finds the command that the first word names, and turns what went wrong into one line.

Nothing heavy is imported before a command is known, so that `tandem --help` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

from launch.following import follow_runner


class Command(NamedTuple):
    """Where a command's `main(argv) -> int` lies, and what it does."""

    target: str
    help: str


COMMANDS = {
    "run": Command("launch.recipe:main", "run the stages of a recipe that are not done yet"),
    "fit": Command("launch.fit:fit", "train a policy: SFT or preference optimization, from YAML configs"),
    "validate": Command("launch.fit:validate", "compute the validation metrics of a config or a checkpoint"),
    "plan": Command(
        "launch.commands.plan:main", "what a config needs on a cluster, before anything is allocated"
    ),
    "generate": Command("launch.commands.generate:main", "answer a prompt, or chat"),
    "evaluate": Command(
        "launch.commands.evaluate:main", "score a model: `evaluate letters`, `reward`, `win-rate`"
    ),
    "pairs": Command(
        "launch.commands.pairs:main", "make preference pairs: `pairs best-of-n`, `build`, `merge`, `show`"
    ),
    "spin": Command(
        "launch.commands.spin:main",
        "self-play: `spin reformat`, `generate`, `convert`, `train`, or all of it",
    ),
    "report": Command(
        "launch.commands.report:main", "write a run's report, or lay several runs over each other"
    ),
    "data": Command(
        "launch.commands.data:main", "look at source texts before anything is trained: `data show`"
    ),
    "inspect": Command(
        "launch.commands.inspect:main", "show how one example is tokenised and what is scored"
    ),
    "bench": Command("launch.commands.bench:main", "measure speed and memory beside TRL's"),
    "cache-reference": Command(
        "launch.commands.cache_reference:main", "compute the reference's log-probs once, for later runs"
    ),
    "scratch": Command(
        "launch.commands.scratch:main",
        "train small models from scratch, to try a recipe out: `scratch generator`",
    ),
    "export": Command("launch.commands.export:main", "merge an adapter into a Hugging Face model folder"),
}
_PLACES = (
    errno.EROFS,
    errno.EEXIST,
    errno.EFBIG,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,
)
"""What is wrong with a place that a user named, or with its disk."""
INTERRUPTED = 130
USAGE = 2


def usage() -> str:
    """The text of `tandem --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: tandem COMMAND [...]",
        "",
        "Aligns language models with preferences: IA³ and LoRA adapters, SFT, DPO and its relatives.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()),
        "",
        "`tandem COMMAND --help` shows a command's settings. For a first run:",
        "  tandem run configs/letters/recipe.yaml",
        '  tandem generate --adapter runs/letters/dpo --prompt "The coat from the coast"',
        "",
        "Every command takes --offline (never ask the network). TANDEM_DEBUG=1 shows tracebacks.",
    ]
    return "\n".join(lines)


def version() -> str:
    """The installed version, or a word for a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None, ends: bool = False) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    Args:
        argv: the command and its arguments; those of this process if they are not given.
        ends: this process ends with the command, as it does where `argv` is not given.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"tandem {version()}")
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"commands are {', '.join(COMMANDS)}"
        return _complain(f"error: no command `{arguments[0]}`; {hint}", USAGE)
    try:
        return _dispatch(arguments[0], arguments[1:], ends or argv is None)
    except KeyboardInterrupt as stop:
        return _complain(f"interrupted; {stop}" if str(stop) else "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone: nobody is left to complain to, not even at exit's flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if os.environ.get("TANDEM_DEBUG"):
            raise
        message = explain(error)
        if message is None:
            raise
        return _complain(f"error: {message}", USAGE)


def _dispatch(name: str, arguments: list[str], ends: bool) -> int:
    if "--offline" in arguments:
        # Read by huggingface_hub and datasets when they are imported, so before any command is.
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if name == "fit" or [name, *arguments[:1]] == ["spin", "train"]:
        # Until fit's handlers are there, which takes the libraries' imports, these signals wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    follow_runner()
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(
            here
        )  # a class_path may name a user's own file; behind all else, so that it hides nothing
    module, function = COMMANDS[name].target.split(":")
    try:
        return getattr(importlib.import_module(module), function)(arguments)
    finally:
        if ends and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            # SLURM's warning may come while a finished process ends, which takes a second: it would be killed, and its
            # job read FAILED.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})


def explain(error: BaseException) -> str | None:
    """One line for an error that a user can do something about; None for a fault of the program."""
    # Imported here: they bring torch, which `tandem --help` has no use for.
    from launch.errors import describe, user_error_in
    from trainer.schema import UserError

    kind = type(error).__name__
    # jsonargparse wraps what a class refuses while it is built.
    wraps = isinstance(error, UserError) or kind in ("ValueError", "ArgumentError")
    if wraps and (found := user_error_in(error)) is not None:
        return " ".join(str(found).split())
    if kind == "ArgumentError":
        return describe(error)
    if kind == "MisconfigurationException":
        return " ".join(str(error).split())
    if kind == "OutOfMemoryError":
        return (
            "the accelerator is out of memory: lower data.batch_size or raise trainer.accumulate_grad_batches"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space is left on the disk{where}; what was saved before is untouched"
    if isinstance(error, PermissionError):
        return f"{error.filename}: permission denied"
    if isinstance(error, OSError) and error.errno in _PLACES and error.filename:
        return f"{error.filename}: {error.strerror}"
    return None


def _complain(message: str, status: int) -> int:
    sys.stdout.flush()
    print(f"tandem: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
