"""Silences what libraries say without need; warnings that matter stay."""

from __future__ import annotations

import errno
import logging
import threading
import warnings

_TALKERS = (
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_WARNINGS = (
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    # transformers 5.23 renames it, and warns when PEFT reads the old name; 5.17 knows only that.
    ".*gradient_checkpointing.*deprecated.*",
    # Metrics are reduced over ranks by the module, as sums and counts, before they are logged.
    ".*It is recommended to use `self.log.*sync_dist=True.*",
    # A login node has `srun`, and may well train without it.
    ".*`srun` command is available on your system but is not used.*",
    # deepspeed 0.19 uses what torch 2.13 calls old.
    "`torch.distributed.(reduce_scatter|all_gather).*` is deprecated.*",
    # lightning 2.6 uses what torch 2.13 calls old.
    "`isinstance.treespec, LeafSpec.` is deprecated.*",
)

_NEEDLESS = (
    # Rows say by their segments, or by scored positions, what belongs together.
    "We strongly recommend passing in an `attention_mask`",
    # transformers 5.23 says so of its own default.
    "`loss_type=None` was set in the config",
)
"""What transformers logs, and no user can do anything about."""


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
    logging.getLogger("transformers.modeling_utils").addFilter(_needed)
    threading.excepthook = _of_a_thread


def _needed(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NEEDLESS)


def _of_a_thread(fault: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer shows a traceback for a full disk; the run itself ends with a line that says so."""
    if not (isinstance(fault.exc_value, OSError) and fault.exc_value.errno == errno.ENOSPC):
        threading.__excepthook__(fault)
