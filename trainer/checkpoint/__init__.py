"""The portable checkpoint: a PEFT or Hugging Face folder, what resumes a run beside it, in safe formats."""

from trainer.checkpoint.io import PortableCheckpointIO
from trainer.checkpoint.progress import recount_forwards
from trainer.checkpoint.randomness import rng_state, set_rng_state
from trainer.policy.folders import check_base, newest_valid, point, resolve, verify
from trainer.policy.load import describe_for_checkpoint, load_trained_state, trained_state

__all__ = [
    "PortableCheckpointIO",
    "check_base",
    "describe_for_checkpoint",
    "load_trained_state",
    "newest_valid",
    "point",
    "recount_forwards",
    "resolve",
    "rng_state",
    "set_rng_state",
    "trained_state",
    "verify",
]
