"""What callbacks that watch a metric share: where its value comes from, windows of steps, absent metrics."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import lightning as L

from trainer.schema import UserError

Mode = Literal["min", "max"]
TRAIN, VALIDATION = "train/", "val/"


def is_validation_metric(name: str) -> bool:
    return name.startswith(VALIDATION)


def better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether `value` betters `best` by more than `min_delta`; what is not finite betters nothing."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def check_mode(callback: str, mode: str) -> None:
    if mode not in ("min", "max"):
        raise UserError(f"{callback}.mode: '{mode}' is not possible; give min (lower is better) or max")


def check_monitor(callback: str, monitor: str, trainer: L.Trainer) -> None:
    """Refuse, before anything runs, a monitored metric that this run cannot log."""
    if not monitor.startswith((TRAIN, VALIDATION)):
        raise UserError(
            f"{callback}.monitor: '{monitor}' is no metric's name; they begin with train/ or val/"
        )
    if is_validation_metric(monitor) and not trainer.enable_validation:
        raise UserError(
            f"{callback}.monitor: '{monitor}' never appears, this run has no validation (limit_val_batches or"
            " validation_step); monitor a train/ metric such as train/loss"
        )


def check_validation_data(callback: str, monitor: str, trainer: L.Trainer) -> None:
    """Refuse, when training starts and the loaders are known, to wait for a validation that never comes."""
    if is_validation_metric(monitor) and not has_validation_data(trainer):
        raise UserError(f"{callback}.monitor: '{monitor}' never appears, there is no validation data")


def has_validation_data(trainer: L.Trainer) -> bool:
    """Whether the loaders, which are there once training starts, have anything to validate on."""
    return trainer.enable_validation and sum(_sizes(trainer.num_val_batches)) > 0


def is_dry_run(trainer: L.Trainer) -> bool:
    """Whether this is Lightning's `fast_dev_run`: nothing is saved, sampled or stopped then."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _sizes(batches: Any) -> list[float]:
    return batches if isinstance(batches, list) else [batches]


def current(name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
    """The newest value: of the last optimizer step for `train/...`, of the last validation for `val/...`."""
    steps: dict[str, float] = getattr(pl_module, "step_metrics", {})
    if name.startswith(TRAIN) and name.removeprefix(TRAIN) in steps:
        return float(steps[name.removeprefix(TRAIN)])
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def available(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    """Every metric that has a value now."""
    steps = (TRAIN + name for name in getattr(pl_module, "step_metrics", {}))
    return sorted({*steps, *trainer.callback_metrics})


def required(callback: str, name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
    """`current`, or a `UserError` that says which metrics there are."""
    value = current(name, trainer, pl_module)
    if value is None:
        there = available(trainer, pl_module)
        listed = ", ".join(there) or "none"
        raise UserError(f"{callback}.monitor: no metric '{name}' is logged; there are {listed}")
    return value


class StepEnds:
    """Says at the end of a micro-batch whether it ended an optimizer step, whatever the accumulation."""

    def __init__(self) -> None:
        self._seen = 0

    def start(self, trainer: L.Trainer) -> None:
        self._seen = trainer.global_step

    def ended(self, trainer: L.Trainer) -> bool:
        ended = trainer.global_step != self._seen
        self._seen = trainer.global_step
        return ended


@dataclasses.dataclass
class Window:
    """The mean of finite values since the last reset; steps that were not finite changed no weights."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self.total += value
            self.count += 1

    def mean(self) -> float:
        """NaN when nothing finite was added."""
        return self.total / self.count if self.count else math.nan

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = float(state["total"]), int(state["count"])
