"""Progress bars with the time left: over optimizer steps, and over the batches of a validation."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override

# A validation that takes less needs no bar.
VALIDATION_DELAY_SECONDS = 3.0
_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class StepProgress(ProgressBar):
    """Optimizer steps done of all, loss, reward accuracy and margin; on stderr, on rank zero.

    A validation that takes more than some seconds has a bar of its own below.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.validation: tqdm | None = None
        self.enabled = True

    @override
    def disable(self) -> None:
        self.enabled = False

    @override
    def enable(self) -> None:
        self.enabled = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done, total = trainer.global_step, total_steps(trainer)
        self.bar = self._opened(total=total, initial=done, desc="training", unit="step")

    def _opened(self, **settings: Any) -> tqdm:
        terminal = sys.stderr.isatty()
        # In a log file every refresh is a line.
        often = 0.2 if terminal else 10.0
        return tqdm(disable=not self.enabled, dynamic_ncols=terminal, mininterval=often, **settings)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None or trainer.global_step == self.bar.n:
            return
        metrics = getattr(pl_module, "step_metrics", {})
        shown = {name: f"{metrics[key]:.3g}" for key, name in _SHOWN.items() if key in metrics}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches = sum(trainer.num_val_batches)
        self.validation = self._opened(
            total=batches if math.isfinite(batches) else None,
            desc="validation",
            unit="batch",
            delay=VALIDATION_DELAY_SECONDS,
            position=1 if self.bar is not None and sys.stderr.isatty() else 0,
            leave=False,
        )

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self.validation is not None:
            self.validation.update()

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.validation is not None:
            self.validation.close()
            self.validation = None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        for bar in (self.validation, self.bar):
            if bar is not None:
                bar.close()
        self.validation = self.bar = None


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run; None without end."""
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    epochs, each = trainer.max_epochs, getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    if epochs is not None and epochs >= 0 and each is not None:
        limits.append(epochs * each)
    return min(limits, default=None)
