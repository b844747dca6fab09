"""One logger-neutral function for numbers and one for text: TensorBoard, W&B and CSV by config alone."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.rank_zero import WarningCache

_warnings = WarningCache()


def log_metrics(trainer: L.Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Write numbers to every logger, on rank zero; `step` is the optimizer step, by default the current."""
    if not trainer.is_global_zero:
        return
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step)


def log_text(trainer: L.Trainer, tag: str, text: str, step: int | None = None) -> None:
    """Write a text (Markdown) to every logger that holds text, on rank zero; CSV holds numbers only."""
    if not trainer.is_global_zero:
        return
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        _log_text(logger, tag, text, step)


def _log_text(logger: Logger, tag: str, text: str, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(tag, text, step)
    elif isinstance(logger, WandbLogger):
        logger.log_text(tag, columns=["step", "text"], data=[[str(step), text]], step=step)
    elif not isinstance(logger, (CSVLogger, DummyLogger)):
        _warnings.warn(
            f"{type(logger).__name__} is not known to hold text: samples are in samples.jsonl only"
        )
