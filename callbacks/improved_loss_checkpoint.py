"""Saves the run when the monitored mean is the best so far, and keeps the best and the newest checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from safetensors import SafetensorError
from typing_extensions import override

from callbacks.guard import check_guard
from callbacks.monitor import (
    Mode,
    StepEnds,
    Window,
    better,
    check_mode,
    check_monitor,
    check_validation_data,
    has_validation_data,
    is_dry_run,
    is_validation_metric,
    required,
)
from trainer.checkpoint import point
from trainer.schema import UserError

DEFAULT_SAVE_STEPS = 100


class ImprovedLossCheckpoint(Checkpoint):
    """Every `save_steps` optimizer steps, saves when the monitored mean over those steps is the best so far.

    A checkpoint is the folder `checkpoints/step-XXXXXXXX` of the run; `checkpoints/best` and
    `checkpoints/last` point at the best and the newest. A validation metric is looked at after each
    validation. A save that comes together with a validation is made after it, so that what resumes from it
    does not miss that validation. Steps that were not finite are left out of the mean. A save that fails
    (full disk) ends the run; what was saved before stays as it is.

    Args:
        save_steps: optimizer steps between looks at a train metric (default 100). With a validation metric:
            besides looking after each validation, save `last` every so many steps.
        monitor: the metric, `train/...` or `val/...`.
        mode: whether lower (`min`) or higher (`max`) is better.
        keep: how many of the newest checkpoints stay, besides the best; -1 keeps all.
        save_last: also save, as `last`, what is no improvement, and the end of the run. Without it only
            improvements are saved, and a run resumes from the newest of them.

    Raises:
        UserError: for settings that cannot work, a monitored metric that is not there, and a save that
            failed.
    """

    def __init__(
        self,
        save_steps: int | None = None,
        monitor: str = "train/loss",
        mode: Mode = "min",
        keep: int = 2,
        save_last: bool = True,
    ) -> None:
        super().__init__()
        self.monitor, self.mode, self.keep, self.save_last = monitor, mode, keep, save_last
        self.on_validation = is_validation_metric(monitor)
        self.given_save_steps = save_steps
        self.save_steps = save_steps if save_steps is not None or self.on_validation else DEFAULT_SAVE_STEPS
        self.restore_best = False  # set by EarlyStopping
        self.best: float | None = None
        self.best_name: str | None = None
        self.saved: list[str] = []
        self.window, self.steps = Window(), StepEnds()
        self._root = Path()
        self._after_validation: tuple[bool, float] | None = None

    @property
    def best_model_path(self) -> str:
        """The best checkpoint's folder, empty before the first; Lightning's `ckpt_path="best"` reads it."""
        return str(self._root / self.best_name) if self.best_name else ""

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        name = type(self).__name__
        self._root = Path(trainer.default_root_dir) / "checkpoints"
        check_mode(name, self.mode)
        if self.save_steps is not None and self.save_steps < 1:
            raise UserError(f"{name}.save_steps: {self.save_steps} is not possible; give 1 or more")
        if self.keep < -1 or self.keep == 0:
            raise UserError(f"{name}.keep: {self.keep} is not possible; give 1 or more, or -1 to keep all")
        if self.on_validation and self.given_save_steps is not None and not self.save_last:
            raise UserError(
                f"{name}.save_steps: has no effect with '{self.monitor}' and save_last false; leave it out"
            )
        if stage != "fit":
            return
        check_monitor(name, self.monitor, trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [other.monitor for other in callbacks if isinstance(other, ImprovedLossCheckpoint)]
        if len(monitors) > 1:
            raise UserError(
                f"{name}: this run has {len(monitors)} of them ({', '.join(monitors)}), all for"
                " checkpoints/best; keep one"
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)
        check_validation_data(type(self).__name__, self.monitor, trainer)

    @override
    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_validation:
            required(type(self).__name__, self.monitor, trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_validation = None
        if not self.steps.ended(trainer):
            return
        if not self.on_validation:
            self.window.add(required(type(self).__name__, self.monitor, trainer, pl_module))
        if self.save_steps is None or trainer.global_step % self.save_steps:
            return
        improved, value = False, float("nan")
        if not self.on_validation:
            value = self.window.mean()
            improved = self._improved(trainer, value)
            self.window.reset()
        if validates_now(trainer):
            self._after_validation = improved, value
        else:
            self._save_if_wanted(trainer, improved, value)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.on_validation:
            value = required(type(self).__name__, self.monitor, trainer, pl_module)
            improved = self._improved(trainer, value)
            if improved or self.save_steps is None or self._after_validation is not None:
                self._save_if_wanted(trainer, improved, value)
        elif self._after_validation is not None:
            self._save_if_wanted(trainer, *self._after_validation)
        self._after_validation = None

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end as `last` if it is not saved yet; then load the best weights, if that is asked for."""
        if trainer.global_step:
            self._save_if_wanted(trainer, False, float("nan"))
        if self.restore_best and self.best_name and (self._root / self.best_name).exists():
            _load_weights(trainer, pl_module, self.best_model_path)
            rank_zero_info(f"ImprovedLossCheckpoint: the weights of {self.best_model_path} are back")

    def save_now(self, trainer: L.Trainer) -> Path | None:
        """Save this step as `last`, whatever `save_last` says; nothing new if it is saved already.

        Call it on every rank, at the end of an optimizer step. Returns the checkpoint, None in a dry run.
        """
        self._save_if_wanted(trainer, False, float("nan"), always=True)
        return self._root / self.saved[-1] if self.saved else None

    def _improved(self, trainer: L.Trainer, value: float) -> bool:
        # Rank zero decides for all, so that a last digit that differs between ranks cannot part them.
        return trainer.strategy.broadcast(better(value, self.best, self.mode))

    def _save_if_wanted(self, trainer: L.Trainer, improved: bool, value: float, always: bool = False) -> None:
        name = f"step-{trainer.global_step:08d}"
        already = bool(self.saved) and self.saved[-1] == name
        wanted = improved or ((self.save_last or always) and not already)
        if is_dry_run(trainer) or not wanted:
            return
        before = self.state_dict()
        if improved:
            self.best, self.best_name = value, name
        self.saved = [*(other for other in self.saved if other != name), name]
        # The state above goes into the checkpoint that is written now: who resumes from it knows that it
        # exists.
        folder = self._root / name
        problem = _attempt(
            trainer, lambda: trainer.save_checkpoint(folder), barrier="Trainer.save_checkpoint"
        )
        problem = problem or _attempt(trainer, lambda: self._point_and_prune(trainer, name, improved))
        if problem is not None:
            self.load_state_dict(before)
            raise UserError(f"{folder}: could not be saved: {problem}; {self._last_good()}")

    def _last_good(self) -> str:
        good = [name for name in self.saved if (self._root / name).exists()]
        return (
            f"the last good checkpoint is {self._root / good[-1]}" if good else "there is no checkpoint yet"
        )

    def _point_and_prune(self, trainer: L.Trainer, name: str, improved: bool) -> None:
        if not trainer.is_global_zero:
            return
        check_guard(trainer)
        point(self._root / "last", self._root / name)
        if improved:
            point(self._root / "best", self._root / name)
        kept = {*self.saved[-self.keep :], self.best_name} if self.keep > 0 else set(self.saved)
        for other in self.saved:
            if other not in kept and (self._root / other).exists():
                trainer.strategy.remove_checkpoint(self._root / other)

    def summary(self) -> dict[str, Any]:
        """For the run's manifest."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self.best,
            "best_checkpoint": self.best_name,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_name": self.best_name,
            "saved": list(self.saved),
            "window": self.window.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_name = state_dict["best"], state_dict["best_name"]
        self.saved = list(state_dict["saved"])
        self.window.load_state_dict(state_dict["window"])


def validates_now(trainer: L.Trainer) -> bool:
    """Whether a validation follows the batch that has just ended."""
    # Lightning 2.6.6 has no public word for "a validation follows this batch". A resume from a checkpoint
    # that was saved before that validation would skip it, and its metrics with it.
    loop = trainer.fit_loop
    if loop._data_fetcher is None or not has_validation_data(trainer):
        return False
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def _load_weights(trainer: L.Trainer, pl_module: L.LightningModule, path: str) -> None:
    """The way Lightning's own resume takes, for every strategy; the random numbers of now stay."""
    with isolate_rng():
        checkpoint = trainer.strategy.load_checkpoint(path)
    pl_module.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)


def _attempt(trainer: L.Trainer, action: Callable[[], None], barrier: str | None = None) -> str | None:
    """Do it on every rank; what rank zero's disk refused, as a line on every rank: they end together."""
    problem: str | None = None
    try:
        action()
    except (OSError, SafetensorError, UserError) as error:
        problem = str(getattr(error, "strerror", None) or error)
        if barrier:
            # Only rank zero writes, and the others wait for it inside `trainer.save_checkpoint`: let them
            # out.
            trainer.strategy.barrier(barrier)
    return trainer.strategy.broadcast(problem)
