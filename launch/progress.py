"""A progress bar over optimizer steps, with the time left: epochs say little where a run counts steps."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override

_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class StepProgress(ProgressBar):
    """Optimizer steps done of all, loss, reward accuracy and margin; on stderr, on rank zero."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.enabled = True

    @override
    def disable(self) -> None:
        self.enabled = False

    @override
    def enable(self) -> None:
        self.enabled = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps(trainer),
            initial=trainer.global_step,
            desc="training",
            unit="step",
            disable=not self.enabled,
            dynamic_ncols=terminal,
            # In a log file every refresh is a line.
            mininterval=0.2 if terminal else 10.0,
        )

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
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run; None without end."""
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    epochs, each = trainer.max_epochs, getattr(getattr(trainer, "datamodule", None), "steps_per_epoch", None)
    if epochs is not None and epochs >= 0 and each is not None:
        limits.append(epochs * each)
    return min(limits, default=None)
