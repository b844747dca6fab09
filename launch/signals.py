"""What SIGTERM, SIGUSR1 and Ctrl-C do to a fit: they are noted, and acted on at the end of a step.

Lightning 2.6.6 communicates inside its handlers (which hung 10 of 40 runs with two ranks) and before every batch, ends
a job that was cut short with status 0, and takes any `hpc_ckpt_*` in the run's folder for the run's own. All of that is
replaced here, and only here.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from typing_extensions import override

REQUESTS = {signal.SIGTERM: "stop", signal.SIGINT: "stop", signal.SIGUSR1: "requeue"}
"""What each signal asks for; see `AlignmentModule.requests` and `callbacks.preemption`."""

_GENTLY = b"\ntandem: Ctrl-C: saving at the end of this step; again to end at once\n"


class Signals:
    """As a context: notes signals in `requests`, from before a model is loaded to after the run's end.

    Ctrl-C is noted once, and only while `gently()` says that the end of a step will come; otherwise, and the second
    time, it ends the run at once as ever. Python handles signals in its main thread only: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requests: dict[str, int] = dict.fromkeys(REQUESTS.values(), 0)
        self.gently: Callable[[], bool] = lambda: False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in REQUESTS:
                self._before[number] = signal.signal(number, self._note)
            # launch.cli has let them wait until now.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def write_to(self, requests: dict[str, int]) -> None:
        """Note in `requests` from now on, and there what came before."""
        noted, self.requests = self.requests, requests
        for name, number in noted.items():
            requests[name] = requests[name] or number

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = REQUESTS[signal.Signals(number)]
        if number == signal.SIGINT:
            if self.requests[name] or not self.gently():
                signal.default_int_handler(number, frame)
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, _GENTLY)  # A handler must not print: it may have interrupted a print.
        self.requests[name] = self.requests[name] or int(number)


class _NoSignals(_SignalConnector):
    """Lightning 2.6.6 asks its connector `received_sigterm` in every loop; ours never received any."""

    @override
    def register_signal_handlers(self) -> None:
        pass

    @override
    def teardown(self) -> None:
        pass


class _NoOldCheckpoints(_CheckpointConnector):
    """Lightning 2.6.6 resumes, under SLURM and without a word, from any `hpc_ckpt_*` of the run's folder."""

    @property
    @override
    def _hpc_resume_path(self) -> str | None:
        return None


def replace_handlers(trainer: L.Trainer) -> None:
    """Take Lightning's signal handling, and what it brings, out of a Trainer that was just made."""
    trainer._signal_connector = _NoSignals(trainer)
    trainer._checkpoint_connector = _NoOldCheckpoints(trainer)
    # A broadcast before every batch, only to ask whether a signal came; the step's own all-reduce does that.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
