"""Optimizers and schedules, by name: torch's and transformers', nothing of our own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.nn import Parameter
from transformers import get_scheduler
from transformers.optimization import Adafactor

from trainer.schema import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How weights move.

    Args:
        name: `adamw`, `rmsprop` (as DPO was published), `adafactor` (as IA³ was published, with the given lr) or `sgd`.
        lr: peak learning rate. IA³ wants 1e-3 to 1e-2, LoRA about 1e-4, all weights about 1e-6.
        weight_decay: decoupled decay; refused for IA³, whose scales it would pull to 0 rather than to 1.
        betas: Adam's two decay rates; for adamw only.
        eps: what keeps the denominator from 0; null takes the optimizer's own.
        momentum: for sgd and rmsprop only.
    """

    name: Literal["adamw", "rmsprop", "adafactor", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optimizer.lr: {self.lr} is not above 0")
        if not self.weight_decay >= 0:
            raise UserError(f"optimizer.weight_decay: {self.weight_decay} is below 0")
        if self.betas is not None and self.name != "adamw":
            raise UserError(f"optimizer.betas: has no effect with {self.name}; leave it out or say adamw")
        if self.momentum is not None and self.name not in ("sgd", "rmsprop"):
            raise UserError(
                f"optimizer.momentum: has no effect with {self.name}; leave it out or say sgd or rmsprop"
            )
        if self.eps is not None and self.name in ("sgd", "adafactor"):
            raise UserError(f"optimizer.eps: has no effect with {self.name}; leave it out")


def build_optimizer(config: OptimizerConfig, parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """The configured optimizer over the trained parameters."""
    trained = list(parameters)
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.eps is not None:
        common["eps"] = config.eps
    match config.name:
        case "adamw":
            return torch.optim.AdamW(trained, betas=config.betas or (0.9, 0.999), **common)
        case "rmsprop":
            return torch.optim.RMSprop(trained, momentum=config.momentum or 0.0, **common)
        case "sgd":
            return torch.optim.SGD(trained, momentum=config.momentum or 0.0, **common)
        case "adafactor":
            return Adafactor(trained, scale_parameter=False, relative_step=False, **common)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate goes over the optimizer steps.

    Args:
        name: `constant`, `linear` (to 0) or `cosine` (to 0), after the warm-up.
        warmup_steps: optimizer steps of linear warm-up from 0.
        warmup_ratio: the same as a share of all steps; one of the two.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps: {self.warmup_steps} is below 0")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"schedule.warmup_ratio: {self.warmup_ratio} is not in [0, 1)")
        if self.warmup_steps and self.warmup_ratio:
            raise UserError("schedule: warmup_steps and warmup_ratio are both set; keep one")


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The configured schedule; `total_steps` counts optimizer steps, -1 where the run has no end."""
    warmup = config.warmup_steps
    if total_steps < 0 and (config.warmup_ratio or config.name != "constant"):
        raise UserError(f"schedule: {config.name} needs an end; set trainer.max_steps or trainer.max_epochs")
    if config.warmup_ratio:
        warmup = round(config.warmup_ratio * total_steps)
    name = "constant_with_warmup" if config.name == "constant" else config.name
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
