"""How a fit ends: its exit status, its last line, and the ranks that end with it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable

import lightning as L
import torch

from callbacks.preemption import Preempted
from launch.children import Children
from launch.cli import INTERRUPTED, USAGE, explain
from launch.runs import Replaced

_LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
)


def run_to_its_end(
    train: Callable[[], None],
    trainer: L.Trainer,
    replaced: Replaced,
    children: Children | None,
    release: Callable[[], None],
) -> int:
    """Train, and let go of the run's folder; returns the exit status: 0, or 128 + n after signal n.

    An error of one rank among several ends this process here and at once: what runs at a process's exit may wait
    for the others, and a launcher ends those once this one is gone.

    Raises:
        KeyboardInterrupt: saying what the run leaves, when it was cut off in one process.
    """
    status = 0
    try:
        try:
            train()
        except Preempted as end:
            status = end.status
            if trainer.is_global_zero:
                print(f"tandem: {end}", file=sys.stderr)
        except SystemExit as end:
            # Lightning 2.6 turns Ctrl-C into exit status 1.
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt(_left(replaced)) from end
            raise
        finally:
            replaced.put_back()
            release()
    except BaseException as error:
        if trainer.world_size > 1:
            _end_at_once(error, trainer, children)
        raise
    return _end_together(status, children)


def leave_together() -> None:
    """Leave the process group when all ranks do: gloo can abort a process that others still talk to as it ends."""
    if torch.distributed.is_initialized():
        # What this rank had to do is done, whatever became of another one in the meantime.
        with contextlib.suppress(RuntimeError):
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _end_together(status: int, children: Children | None) -> int:
    leave_together()
    if children is not None and children.procs:
        problem = children.end(well=True)
        if problem and not status:
            print(f"tandem: error: {problem}", file=sys.stderr)
            return 1
    return status


def _end_at_once(error: BaseException, trainer: L.Trainer, children: Children | None) -> None:
    status, message = _said(error, trainer)
    problem = children.end(well=False) if children is not None else None
    # A user's mistake ends every rank; what is none may be explained by how another rank ended.
    if problem and status == 1:
        message = f"{message}; {problem}"
    if trainer.is_global_zero or not isinstance(error, KeyboardInterrupt):
        print(f"tandem: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _said(error: BaseException, trainer: L.Trainer) -> tuple[int, str]:
    """The exit status and the line for an error; a fault of the program shows its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"interrupted; {error}"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) and error.code else 1), f"ended with {error.code}"
    message = explain(error) if isinstance(error, Exception) else None
    if message is not None and not os.environ.get("TANDEM_DEBUG"):
        return USAGE, f"error: {message}"
    reason = next((words for words in _LOST if words in str(error)), None)
    if reason is None or os.environ.get("TANDEM_DEBUG"):
        traceback.print_exception(error)
        return 1, f"error: rank {trainer.global_rank} failed"
    # gloo tells its own source file first, and afterwards what it thinks of that.
    line = next(line for line in str(error).splitlines() if reason in line)
    line = re.sub(r"^\[[^]]*\] *", "", line).split(". This is")[0]
    return 1, (
        f"error: rank {trainer.global_rank} of {trainer.world_size} lost another one ({line}); its own output says"
        " why, and `--resume auto` goes on from the last checkpoint"
    )


def _left(replaced: Replaced) -> str:
    """What an interrupted run leaves, in words."""
    if replaced.gone and any(replaced.folder.glob("checkpoints/*")):
        return f"`--resume auto` goes on from {replaced.folder}"
    if replaced.gone:
        return "nothing was saved yet"
    return f"the run in {replaced.folder} is as it was"
