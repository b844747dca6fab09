"""What to change where a job does not fit, each with the number that it would give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from trainer.planning.hardware import GB, Cluster
from trainer.planning.job import Job
from trainer.planning.plan import Plan, Planner
from trainer.planning.shards import ZeroSettings
from trainer.schema import UserError

Change = Callable[[Job, Cluster], tuple[Job, Cluster] | None]
MOST_GPUS = 64


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change: bytes on each GPU with it alone, and with it and all that stand before it."""

    setting: str
    alone: int
    together: int
    fits: bool


def advise(planner: Planner, plan: Plan) -> list[Advice]:
    """Changes in the order in which they cost least, until what they give together fits (or none is left)."""
    job, cluster, found = plan.job, plan.cluster, list[Advice]()
    total = plan.total
    for change, most in CHANGES:
        then, times = None, 0
        for repeated in range(1, most + 1):
            next_one = _changed(planner, change, repeated, job, cluster)
            if next_one is None:
                break
            then, times = next_one, repeated
            if then.fits:
                break
        if then is None or then.total >= total:
            continue
        alone = _changed(planner, change, times, plan.job, plan.cluster) or then
        setting = ", ".join(_differences(job, cluster, then.job, then.cluster))
        found.append(Advice(setting, alone.total, then.total, then.fits))
        job, cluster, total = then.job, then.cluster, then.total
        if then.fits:
            break
    return found


def within_nodes(planner: Planner, plan: Plan) -> Plan | None:
    """The plan with second copies of the weights in each node, where fetching them from other nodes bounds the step."""
    job, cluster = plan.job, plan.cluster
    far = cluster.nodes > 1 and job.strategy == "zero3" and job.zero.hpz_partition_size == 1
    if not far or plan.seconds.bound != "communication":
        return None
    zero = dataclasses.replace(job.zero, hpz_partition_size=cluster.gpus // cluster.nodes)
    then = planner.plan(dataclasses.replace(job, zero=zero), cluster)
    return then if then.seconds.communication < plan.seconds.communication else None


def _changed(planner: Planner, change: Change, times: int, job: Job, cluster: Cluster) -> Plan | None:
    """The plan after a change made so many times; None where it cannot be made."""
    for _ in range(times):
        changed = change(job, cluster)
        if changed is None:
            return None
        job, cluster = changed
    try:
        return planner.plan(job, cluster)
    except UserError:
        return None


def _checkpointing(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    if job.policy.gradient_checkpointing:
        return None
    policy = dataclasses.replace(job.policy, gradient_checkpointing=True)
    return dataclasses.replace(job, policy=policy), cluster


def _accumulation(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    """Twice as many micro-batches, each half as large."""
    most = job.batch_size // cluster.gpus
    now = job.forwards(cluster.gpus)
    if now >= most:
        return None
    return dataclasses.replace(job, accumulate=min(2 * now, most)), cluster


def _shared(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    if job.reference is None or job.reference.kind == "shared" or job.policy.adapter is None:
        return None
    return dataclasses.replace(job, reference=dataclasses.replace(job.reference, kind="shared")), cluster


def _bfloat16(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    if job.policy.dtype == "bfloat16" or job.policy.adapter is None:
        return None
    return dataclasses.replace(job, policy=dataclasses.replace(job.policy, dtype="bfloat16")), cluster


def _zero3(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    if cluster.gpus == 1 or job.strategy == "zero3":
        return None
    return _to_zero3(job), cluster


def _to_zero3(job: Job) -> Job:
    return job if job.strategy == "zero3" else dataclasses.replace(job, strategy="zero3", zero=ZeroSettings())


def _offload(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    if job.strategy != "zero3" or job.zero.offload == "parameters":
        return None
    return dataclasses.replace(job, zero=dataclasses.replace(job.zero, offload="parameters")), cluster


def _more_gpus(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    """Twice as many, under ZeRO-3, with as many examples at once on each."""
    gpus = 2 * cluster.gpus
    if gpus > MOST_GPUS:
        return None
    nodes = cluster.nodes if gpus <= 8 * cluster.nodes else -(-gpus // 8)
    job = dataclasses.replace(
        _to_zero3(job),
        accumulate=max(1, min(job.accumulate, job.batch_size // gpus)),
        batch_size=max(job.batch_size, gpus),
    )
    return job, dataclasses.replace(cluster, gpus=gpus, nodes=nodes)


def _shorter(job: Job, cluster: Cluster) -> tuple[Job, Cluster] | None:
    if job.tokens < 256:
        return None
    return dataclasses.replace(job, tokens=job.tokens // 2, completion=max(1, job.completion // 2)), cluster


# Each with the times that it may be made; as often as it takes.
CHANGES: tuple[tuple[Change, int], ...] = (
    (_accumulation, 12),
    (_checkpointing, 1),
    (_bfloat16, 1),
    (_shared, 1),
    (_zero3, 1),
    (_more_gpus, 6),
    (_offload, 1),
    (_shorter, 3),
)


def _differences(old: Job, before: Cluster, new: Job, after: Cluster) -> Iterator[str]:
    if new.policy.gradient_checkpointing != old.policy.gradient_checkpointing:
        yield "policy.gradient_checkpointing: true"
    if new.policy.dtype != old.policy.dtype:
        yield f"policy.dtype: {new.policy.dtype}"
    if new.reference != old.reference:
        yield "reference.kind: shared"
    if after.gpus != before.gpus:
        where = f" on {after.nodes} nodes" if after.nodes > 1 else ""
        yield f"--gpus {after.gpus}{where}"
    if new.strategy != old.strategy:
        yield f"trainer.strategy: {new.strategy}"
    if new.batch_size != old.batch_size:
        yield f"data.batch_size: {new.batch_size}"
    if new.accumulate != old.accumulate:
        yield f"trainer.accumulate_grad_batches: {new.accumulate}"
    if new.zero.offload != old.zero.offload:
        yield f"zero3's offload: {new.zero.offload}"
    if new.tokens != old.tokens:
        yield f"data.max_length: {new.tokens}"


def gigabytes(size: float) -> str:
    """Bytes as GB (10^9), to the digit that means something."""
    return f"{size / GB:,.1f}" if size < 10 * GB else f"{size / GB:,.0f}"
