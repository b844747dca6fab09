"""The real thing, for plans to be held against: what saved-tensor hooks count on a real forward."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.layout import packed_row, padded_rows
from trainer.optimization import OptimizerConfig
from trainer.planning.job import Job
from trainer.planning.plan import Planner
from trainer.policy.base import PolicyConfig, read_config
from trainer.policy.load import load_policy
from trainer.policy.logprobs import completion_token_logps
from trainer.policy.reference import ReferenceConfig


def job_for(base: Path, **changes: Any) -> Job:
    """DPO with IA³ on this base: two pairs at once, rows of 40 tokens of which 15 are scored."""
    policy = {name: changes.pop(name) for name in list(changes) if name in PolicyConfig.__dataclass_fields__}
    settings: dict[str, Any] = {
        "reference": ReferenceConfig(),
        "optimizer": OptimizerConfig(),
        "batch_size": 2,
        "accumulate": 1,
        "tokens": 40,
        "completion": 15,
        "strategy": "single_device",
    }
    return Job(policy=PolicyConfig(str(base), **policy), **{**settings, **changes})


def planner_for(job: Job) -> Planner:
    """A planner for the shape of the job's base."""
    return Planner(read_config(job.policy.base, job.policy), accelerator=False)


def saved_bytes(job: Job, examples: int) -> int:
    """Bytes of the storages that a real forward keeps for its backward, parameters and inputs aside."""
    policy = load_policy(job.policy)
    completion, prompt = list(range(5, 5 + job.completion)), list(range(30, 30 + job.tokens - job.completion))
    if job.layout == "prefix_shared":
        batch = packed_row([(prompt, [completion] * job.completions)] * examples)
    else:
        # Rows of unequal length, as they come: padding makes transformers keep a mask.
        batch = padded_rows([(prompt[row:], completion) for row in range(examples * job.completions)], 0)
    laid = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    there = {
        tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers(), *laid)
    }
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = completion_token_logps(policy, batch).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


def with_checkpointing(job: Job) -> Job:
    """The same job with gradient checkpointing."""
    return dataclasses.replace(job, policy=dataclasses.replace(job.policy, gradient_checkpointing=True))
