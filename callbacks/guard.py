"""Asks, before a run's files are written, whether this process still may: another job can have taken the folder."""

from __future__ import annotations

import lightning as L


def check_guard(trainer: L.Trainer) -> None:
    """Call on rank zero before writing.

    Raises:
        UserError: naming the job that has taken the run's folder over.
    """
    guard = getattr(trainer.strategy.checkpoint_io, "guard", None)
    if guard is not None:
        guard()
