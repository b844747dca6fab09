"""What is to be planned: a model's training, as a config of `fit` says it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from trainer.data.datamodule import Layout
from trainer.optimization import OptimizerConfig
from trainer.planning.shards import ZeroSettings
from trainer.policy.base import PolicyConfig
from trainer.policy.reference import ReferenceConfig

Strategy = Literal["single_device", "ddp", "zero3"]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Args:
        reference: None for SFT, whose examples have one completion each; pairs have two.
        batch_size: examples of an optimizer step, over all GPUs.
        accumulate: micro-batches of a step on each GPU, at the least.
        tokens: of each prompt with a completion, the longest that is to fit.
        completion: how many of them are scored.
        matmul: `float32_matmul` of the config.
        layout: of the data.
        token_budget: of one forward; None sets no limit.
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
    layout: Layout = "prefix_shared"
    token_budget: int | None = None

    @property
    def completions(self) -> int:
        """Completions of an example."""
        return 1 if self.reference is None else 2

    @property
    def example_tokens(self) -> int:
        """Tokens that an example takes in a forward."""
        if self.layout == "prefix_shared":
            return self.tokens + (self.completions - 1) * self.completion
        return self.completions * self.tokens

    def at_once(self, gpus: int) -> int:
        """Examples of one micro-batch on one GPU, at the most."""
        return -(-self.batch_size // (self.forwards(gpus) * gpus))

    def forwards(self, gpus: int) -> int:
        """Micro-batches of a step on each GPU: `accumulate`, or as many as the token budget asks for."""
        if self.token_budget is None:
            return self.accumulate
        # Rounded up: shorter examples may fill the budget.
        within = -(-self.token_budget // self.example_tokens)
        return max(self.accumulate, -(-self.batch_size // (within * gpus)))
