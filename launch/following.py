"""Processes that end with the one that started them: a launcher's ranks, and the stages of `tandem run`.

Who is asked to stop passes it on. Who is killed (SIGKILL, out of memory) cannot, and what it started would go on
beside what the next command starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

RUNNER = "TANDEM_RUNNER"
"""The process of `tandem run` or `tandem spin`, in the environment of its stages."""
_PARENT = "TANDEM_PARENT"
_GRACE_SECONDS = 10.0


def follow_parent(grace: float = _GRACE_SECONDS) -> None:
    """In a process that rank zero (`tandem fit --trainer.devices 2`) or torchrun has started: end with it.

    So many seconds later: rank zero may have finished first, and then this process is about to.

    Both watch the ranks, but nothing watches them: killed, they would leave ranks that train on or wait for ever.
    """

    def end() -> None:
        time.sleep(grace)
        print("tandem: the process that started this rank is gone", file=sys.stderr, flush=True)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        _when_gone(os.getppid(), end)
    elif "LOCAL_RANK" not in os.environ:
        os.environ[_PARENT] = str(os.getpid())
    elif (parent := os.environ.get(_PARENT)) == str(os.getppid()):
        _when_gone(int(parent), end)


def follow_runner() -> None:
    """In a stage of `tandem run` or `tandem spin`, and in its ranks: SIGTERM to this process once the runner is gone.

    So a fit saves what it has, and everything else ends as it does when it is told to.
    """
    if runner := os.environ.get(RUNNER):
        _when_gone(int(runner), lambda: os.kill(os.getpid(), signal.SIGTERM))


def _when_gone(process: int, then: Callable[[], None]) -> None:
    """Call `then` from a thread once the process has ended, whether its own parent has noticed or not."""

    def follow() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            watched = psutil.Process(process)
            while watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        then()

    threading.Thread(target=follow, daemon=True, name="follow").start()
