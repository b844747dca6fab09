"""The ranks that `tandem fit --trainer.devices N` starts itself: watched, waited for, and ended with rank zero."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from typing_extensions import override

GRACE_SECONDS = 30.0
_FAILED_GRACE_SECONDS = 3.0


class Children(_SubprocessScriptLauncher):
    """Lightning 2.6.6's launcher of processes, with another watchman.

    Lightning's kills every rank, and rank zero with them, within five seconds of the first one that ends with another
    status than 0: also when all end together, as a run does that was told to stop, and while rank zero still
    writes. This one gives rank zero `grace` seconds to end by itself: it sees the lost rank in its next
    collective, unless it waits there (NCCL) for its timeout.
    """

    grace = GRACE_SECONDS

    def __init__(self, like: _SubprocessScriptLauncher) -> None:
        super().__init__(like.cluster_environment, like.num_processes, like.num_nodes)
        self._ending = threading.Event()

    @override
    def launch(self, function: Callable, *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="children").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def failed(self) -> str | None:
        """Which rank ended otherwise than well, and how; None if none has."""
        for rank, process in enumerate(self.procs, start=1):
            if process.poll():
                return f"local rank {rank} (process {process.pid}) ended with {_status(process)}"
        return None

    def end(self, well: bool) -> str | None:
        """Wait for the ranks that end as this one does, and end the others; what went wrong, if anything did."""
        self._ending.set()
        until = time.monotonic() + (self.grace if well else _FAILED_GRACE_SECONDS)
        while time.monotonic() < until and any(process.poll() is None for process in self.procs):
            time.sleep(0.05)
        late = [str(rank) for rank, process in enumerate(self.procs, start=1) if process.poll() is None]
        problem = self.failed()
        if late and not problem:
            problem = f"local rank {', '.join(late)} did not end by itself and was killed"
        self._kill()
        return problem

    def _watch(self) -> None:
        while self.failed() is None:
            if self._ending.wait(0.5):
                return
        if not self._ending.wait(self.grace):
            print(f"tandem: {self.failed()}; the other ranks are ended", file=sys.stderr, flush=True)
            self._kill()
            os._exit(1)

    def _kill(self) -> None:
        for process in self.procs:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def _status(process: subprocess.Popen) -> str:
    if process.returncode < 0:
        return f"signal {-process.returncode} ({signal.Signals(-process.returncode).name})"
    return f"exit status {process.returncode}"


def own_children(trainer: L.Trainer) -> Children | None:
    """Put our launcher in place of Lightning's in a Trainer that was just made; None where it starts no processes."""
    # Lightning 2.6.6 makes the launcher with the strategy and has no setting for it.
    if not isinstance(launcher := trainer.strategy._launcher, _SubprocessScriptLauncher):
        return None
    trainer.strategy._launcher = children = Children(launcher)
    return children
