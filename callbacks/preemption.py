"""Ends a run that is told to stop: at a step's boundary, on all ranks together, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint, validates_now
from callbacks.monitor import StepEnds
from trainer.schema import UserError

REQUEUE_SECONDS = 30.0


class Preempted(SystemExit):
    """The run was told to stop and did. `status` is 128 + the signal's number; the text says how to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = self.status = 128 + number


# A Checkpoint only so that Lightning 2.6 calls it after the other callbacks, the checkpoint's included.
class Preemption(Checkpoint):
    """Saves and ends the run once any rank was told to stop (SIGTERM, Ctrl-C) or that its time is nearly up (SIGUSR1).

    Signal handlers only write `requests` of the module. Its all-reduce of the step tells every rank, as `agreed`,
    what any of them was asked; so all act at the same step's end, and nothing communicates inside a handler. What
    comes while loading, validating or sampling waits for the next step's end; a validation due at that step comes
    first, so that no resume misses it. Give a job's warning (`--signal=USR1@SECONDS`) time for a step, a validation
    and a save. A request that comes with the last step changes nothing: the run finishes.

    Under SLURM, SIGUSR1 also has the job requeued. The process ends with status 128 + the signal's number, never 0.

    Args:
        requeue: whether SIGUSR1 asks `scontrol requeue` for this job, where there is one.

    Raises:
        Preempted: on every rank, after the save.
        UserError: for a run without ImprovedLossCheckpoint.
    """

    def __init__(self, requeue: bool = True) -> None:
        self.requeue = requeue
        self.training = False
        self.steps = StepEnds()
        self._after_validation = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and _checkpoint(trainer) is None:
            raise UserError("Preemption: this run has no ImprovedLossCheckpoint to save with; add one")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.training = True  # From here on the end of a step comes.

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_validation = False
        if not self.steps.ended(trainer) or not any(_agreed(pl_module).values()) or _completes(trainer):
            return
        if validates_now(trainer):
            self._after_validation = True
        else:
            self._end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and self._after_validation and not _completes(trainer):
            self._end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = False

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        agreed, checkpoint = _agreed(pl_module), _checkpoint(trainer)
        assert checkpoint is not None
        saved = checkpoint.save_now(trainer)
        number = signal.Signals(agreed["requeue"] or agreed["stop"])
        requeued = ""
        if agreed["requeue"] and self.requeue and (job := slurm_job()):
            # The others wait: a launcher that sees them gone could end rank zero while it asks.
            requeued = trainer.strategy.broadcast(
                f"{_requeue(job)}; " if trainer.is_global_zero else requeued, src=0
            )
        elif getattr(pl_module, "requests", {}).get("stop") == signal.SIGINT:
            number = signal.SIGINT
        where = (
            f"saved as {saved}, `--resume auto` goes on from there" if saved else "a dry run saves nothing"
        )
        cause = "Ctrl-C" if number == signal.SIGINT else number.name
        raise Preempted(number, f"{cause}: stopped at step {trainer.global_step}; {requeued}{where}")


def slurm_job() -> str | None:
    """This process's SLURM job as `scontrol` takes it, a task of an array included; None outside SLURM."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _requeue(job: str) -> str:
    """Ask SLURM to start the job again; what came of it, in words."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=REQUEUE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be requeued ({error})"
    if done.returncode:
        return f"SLURM job {job} could not be requeued ({' '.join((done.stderr or done.stdout).split())})"
    return f"SLURM job {job} is requeued"


def _agreed(pl_module: L.LightningModule) -> dict[str, int]:
    agreed: dict[str, int] = getattr(pl_module, "agreed", {})
    return agreed


def _checkpoint(trainer: L.Trainer) -> ImprovedLossCheckpoint | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, ImprovedLossCheckpoint)), None)


def _completes(trainer: L.Trainer) -> bool:
    """Whether the run ends with this step by itself."""
    # Lightning 2.6.6 has no public word for it; these are what its loops ask after this hook.
    loop = trainer.fit_loop
    if trainer.should_stop and loop._can_stop_early:
        return True
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    last = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return last and loop.epoch_loop._num_ready_batches_reached()
