"""What is to be planned: a model's training, as a config of `fit` says it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from trainer.optimization import OptimizerConfig
from trainer.planning.shards import ZeroSettings
from trainer.policy.base import PolicyConfig
from trainer.policy.reference import ReferenceConfig

Strategy = Literal["single_device", "ddp", "zero3"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Args:
        reference: None for SFT, whose examples have one row each; pairs have two.
        batch_size: examples of an optimizer step, over all GPUs.
        accumulate: micro-batches of a step on each GPU.
        tokens: of each row, the longest that is to fit.
        completion: how many of them are scored.
        matmul: `float32_matmul` of the config.
    """

    policy: PolicyConfig
    reference: ReferenceConfig | None
    optimizer: OptimizerConfig
    batch_size: int
    accumulate: int
    tokens: int
    completion: int
    strategy: Strategy
    zero: ZeroSettings = dataclasses.field(default_factory=ZeroSettings)
    matmul: str = "highest"

    def at_once(self, gpus: int) -> int:
        """Examples of one micro-batch on one GPU."""
        return -(-self.batch_size // (self.accumulate * gpus))
