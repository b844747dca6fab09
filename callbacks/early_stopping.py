"""Stops a run when a metric has not improved for a while, and brings the best weights back if asked."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.monitor import (
    Mode,
    StepEnds,
    Window,
    check_mode,
    check_monitor,
    check_validation_data,
    is_dry_run,
    is_validation_metric,
    required,
)
from trainer.schema import UserError


class EarlyStopping(LightningEarlyStopping):
    """Stops when `monitor` has not improved by more than `min_delta` in `patience` looks in a row.

    A validation metric is looked at after each validation (never in the sanity check); a train metric as its
    mean over every `every_n_steps` optimizer steps, or over each epoch. A resumed run goes on counting.

    Args:
        monitor: the metric, `train/...` or `val/...`.
        patience: looks without improvement after which the run stops.
        min_delta: the least change that counts as an improvement, in the metric's own unit.
        mode: whether lower (`min`) or higher (`max`) is better.
        every_n_steps: for a train metric, optimizer steps between looks; by default each epoch's end.
        restore_best: at the end of training load the weights of the best checkpoint; needs an
            ImprovedLossCheckpoint with the same monitor and mode.
        stopping_threshold: stop as soon as the metric is better than this.

    Raises:
        UserError: for settings that cannot work, and a monitored metric that is not there.
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Mode = "min",
        every_n_steps: int | None = None,
        restore_best: bool = False,
        stopping_threshold: float | None = None,
    ) -> None:
        check_mode("EarlyStopping", mode)
        super().__init__(
            monitor,
            min_delta=min_delta,
            patience=patience,
            mode=mode,
            stopping_threshold=stopping_threshold,
            check_on_train_epoch_end=False,
        )
        self.given_min_delta = min_delta
        self.every_n_steps, self.restore_best = every_n_steps, restore_best
        self.on_validation = is_validation_metric(monitor)
        self.window, self.steps = Window(), StepEnds()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        name = type(self).__name__
        check_monitor(name, self.monitor, trainer)
        if self.patience < 1:
            raise UserError(f"{name}.patience: {self.patience} is not possible; give 1 or more")
        if self.given_min_delta < 0:
            raise UserError(f"{name}.min_delta: {self.given_min_delta} is not possible; give 0 or more")
        if self.every_n_steps is not None and self.on_validation:
            raise UserError(
                f"{name}.every_n_steps: has no effect with '{self.monitor}', which is looked at after each"
                " validation; leave it out"
            )
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise UserError(f"{name}.every_n_steps: {self.every_n_steps} is not possible; give 1 or more")
        if self.restore_best:
            # Lightning runs checkpoint callbacks last, so that all others find the last step's weights.
            self._checkpoints(trainer).restore_best = True

    def _checkpoints(self, trainer: L.Trainer) -> ImprovedLossCheckpoint:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            same = (getattr(callback, "monitor", None), getattr(callback, "mode", None)) == (
                self.monitor,
                self.mode,
            )
            if same and isinstance(callback, ImprovedLossCheckpoint):
                return callback
        raise UserError(
            f"{type(self).__name__}.restore_best: needs an ImprovedLossCheckpoint with monitor"
            f" '{self.monitor}' and mode {self.mode}; add one, or set restore_best to false"
        )

    @override
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_validation:
            required(type(self).__name__, self.monitor, trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)
        check_validation_data(type(self).__name__, self.monitor, trainer)
        if self.wait_count >= self.patience:
            rank_zero_info(f"EarlyStopping: patience ({self.patience}) was used up before the resume")
            trainer.should_stop = True

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.steps.ended(trainer) or self.on_validation:
            return
        self.window.add(required(type(self).__name__, self.monitor, trainer, pl_module))
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, self._window_mean())
        elif self.every_n_steps is None and trainer.is_last_batch:
            # Not in on_train_epoch_end: a checkpoint of this step has to hold this look.
            self._look(trainer, self._window_mean())

    def _window_mean(self) -> float:
        mean = self.window.mean()
        self.window.reset()
        return mean

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: every look is made in the hooks above and below."""

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_validation and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._look(trainer, required(type(self).__name__, self.monitor, trainer, pl_module))

    def _look(self, trainer: L.Trainer, value: float) -> None:
        if is_dry_run(trainer):
            return
        # Lightning 2.6.6: the criteria are a private method of the class we derive from; it keeps best_score,
        # wait_count and stopping_reason.
        stop, reason = self._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True
            self.stopped_epoch, self.stopping_reason_message = trainer.current_epoch, reason
            rank_zero_info(f"EarlyStopping at step {trainer.global_step}: {reason}")

    def summary(self) -> dict[str, Any]:
        """For the run's manifest."""
        stopped = self.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        return {"monitor": self.monitor, "stopped": stopped, "reason": self.stopping_reason_message}

    @override
    def state_dict(self) -> dict[str, Any]:
        best = float(self.best_score)
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": best if math.isfinite(best) else None,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
            "window": self.window.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """All but `patience`: a run may be resumed with more of it."""
        self.wait_count, self.stopped_epoch = state_dict["wait_count"], state_dict["stopped_epoch"]
        if state_dict["best_score"] is not None:
            self.best_score = torch.tensor(state_dict["best_score"], dtype=torch.float64)
        self.stopping_reason = EarlyStoppingReason(state_dict["stopping_reason"])
        self.stopping_reason_message = state_dict["stopping_reason_message"]
        if self.wait_count < self.patience:
            self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
        self.window.load_state_dict(state_dict["window"])
