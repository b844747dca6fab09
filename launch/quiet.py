"""Silences what libraries say without need; warnings that matter stay."""

from __future__ import annotations

import logging
import warnings

_TALKERS = (
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_WARNINGS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    # transformers 5.23 warns of its own attribute when PEFT reads it.
    ".*is_gradient_checkpointing.*deprecated.*",
    # lightning 2.6 uses what torch 2.13 calls old.
    "`isinstance.treespec, LeafSpec.` is deprecated.*",
)


def quiet() -> None:
    """Call once, before the work begins."""
    from transformers.utils import logging as transformers_logging

    # One line for each warning, without the place in the code that raised it.
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: f"warning: {message}\n"
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    transformers_logging.disable_progress_bar()
