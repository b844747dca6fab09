"""What stays in memory from step to step, to the byte: weights, gradients, optimizer state, DeepSpeed's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.optimization import OptimizerConfig
from trainer.planning.job import Job
from trainer.planning.shards import Weight, persistent_bytes, shard_numel, sharded_bytes


def fixed_bytes(job: Job, gpus: int, weights: dict[str, list[Weight]]) -> tuple[dict[str, int], int]:
    """Bytes that stay from step to step, exact: on a GPU by part, and in the CPU's memory for each GPU."""
    trained = [weight for weight in weights["policy"] if weight.trained]
    frozen = [weight for weight in weights["policy"] if not weight.trained]
    parts = {"weights": frozen, "reference": weights["reference"]}
    parts["weights" if job.policy.adapter is None else "adapter"] = trained
    if job.policy.adapter is None:
        parts["adapter"] = []
    gradients = sum(weight.bytes for weight in trained)
    if job.strategy != "zero3":
        sizes = {name: sum(weight.bytes for weight in of) for name, of in parts.items()}
        # DDP's buckets are a second copy of the gradients (Lightning leaves `gradient_as_bucket_view` off).
        exchange = gradients if job.strategy == "ddp" else 0
        state = sum(optimizer_bytes(job.optimizer, (weight.numel,), weight.itemsize) for weight in trained)
        return {**sizes, "gradients": gradients, "optimizer": state, "communication": exchange}, 0
    return _sharded_persistent(job, gpus, parts, trained)


def _sharded_persistent(
    job: Job, gpus: int, parts: dict[str, list[Weight]], trained: Sequence[Weight]
) -> tuple[dict[str, int], int]:
    zero = job.zero
    sizes = {name: sharded_bytes(of, gpus, zero) for name, of in parts.items()}
    if zero.hpz_partition_size > 1:
        everything = [weight for of in parts.values() for weight in of]
        sizes["secondary weights"] = sum(
            shard_numel(weight.numel, gpus) * gpus // zero.hpz_partition_size * weight.itemsize
            for weight in everything
        )
    # One flat float32 share of all that is trained, its gradients, and a bucket that gradients wait in.
    share = sum(shard_numel(weight.numel, gpus) for weight in trained)
    master = sum(4 * shard_numel(weight.numel, gpus) for weight in trained if weight.itemsize < 4)
    state = optimizer_bytes(job.optimizer, (share,), 4) + master
    bucket = 4 * zero.reduce_bucket_size if zero.contiguous_gradients else 0
    host = 0
    if zero.offload != "none":
        # The float32 share itself lies in the CPU's memory too, then.
        host += state + 4 * share + (4 * share - master)
        state = 0
    if zero.offload == "parameters":
        whole = {name: persistent_bytes(of, zero) for name, of in parts.items()}
        host += sum(sizes[name] - whole[name] for name in parts)
        sizes.update(whole)
    gradients = 0 if zero.offload != "none" else 4 * share
    return {**sizes, "gradients": gradients, "optimizer": state, "communication": bucket}, host


def optimizer_bytes(config: OptimizerConfig, shape: Iterable[int], itemsize: int) -> int:
    """Bytes of torch's state for one parameter of this shape; a test holds them against the optimizers."""
    sizes = tuple(shape)
    numel = 1
    for size in sizes:
        numel *= size
    step = 4
    match config.name:
        case "adamw":
            return 2 * numel * itemsize + step
        case "rmsprop":
            return (2 if config.momentum else 1) * numel * itemsize + step
        case "sgd":
            return numel * itemsize if config.momentum else 0
        case "adafactor":
            # Always float32; of a matrix the rows' and the columns' means.
            return 4 * (numel if len(sizes) < 2 else numel // sizes[-1] + numel // sizes[-2]) + step
