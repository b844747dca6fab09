"""The plan of a run on a cluster: memory of each GPU by part, bytes between GPUs, and what bounds a step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from transformers import PretrainedConfig

from trainer.planning.fixed import fixed_bytes
from trainer.planning.hardware import FRAGMENTATION, HOST_LINK, RESERVE, Cluster
from trainer.planning.job import Job
from trainer.planning.model import Models, build_models
from trainer.planning.shards import Gathering, Weight, gathering
from trainer.planning.trace import MicroBatch, Trace, trace
from trainer.policy.kernels import as_on_an_accelerator
from trainer.schema import UserError
from trainer.strategy import refuse_adafactor, refuse_hpz


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: the policy's, those of them that are trained, and those of a reference of its own."""

    policy: int
    trained: int
    reference: int


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one optimizer step: products on the GPU, exchange between GPUs, transfers from the CPU's memory."""

    compute: float
    communication: float
    host: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]

    @property
    def step(self) -> float:
        """If the three overlap fully."""
        return max(self.compute, self.communication, self.host)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job needs on a cluster.

    Args:
        memory: bytes on each GPU by part, at the moment of the most.
        host: bytes in each node's memory for what is offloaded.
        saved: bytes kept for the backward pass, which `memory` has in `activations` and `logits`.
        gathered: bytes of weights that each GPU receives in an optimizer step.
        reduced: bytes of gradients that each GPU sends in an optimizer step.
        flops: of one GPU in an optimizer step, by phase.
    """

    job: Job
    cluster: Cluster
    parameters: Parameters
    memory: dict[str, int]
    host: int
    saved: dict[str, int]
    gathered: int
    reduced: int
    flops: dict[str, int]
    seconds: Seconds

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.cluster.memory


class Planner:
    """Plans for one shape of model. Building and tracing take seconds, so what was seen is remembered.

    Args:
        accelerator: follow the forward as it goes on a GPU; False for tests that hold a plan against a CPU.
    """

    def __init__(self, shape: PretrainedConfig, accelerator: bool = True) -> None:
        self.shape, self.accelerator = shape, accelerator
        self._models: dict[str, Models] = {}
        self._traces: dict[str, Trace] = {}

    def models(self, job: Job) -> Models:
        """Policy and reference of a job, of shapes alone."""
        key = repr((job.policy, job.reference))
        if key not in self._models:
            self._models[key] = build_models(self.shape, job.policy, job.reference)
        return self._models[key]

    def trace(self, job: Job, gpus: int) -> Trace:
        """One micro-batch of a job.

        With an adapter everything that comes and goes grows by the same for each example (logits until their chunk is
        full), so that a few are enough for all; where all weights are trained their gradients may make another
        moment that of the most.
        """
        examples = job.at_once(gpus)
        if job.policy.adapter is not None:
            if examples > FEW:
                return extrapolated(self._traced(job, FEW - 1), self._traced(job, FEW), FEW, examples)
            return self._traced(job, examples)
        return self._traced(job, examples, job.strategy != "zero3", job.forwards(gpus) > 1)

    def _traced(self, job: Job, examples: int, keep: bool = True, before: bool = False) -> Trace:
        packed = job.layout == "prefix_shared"
        batch = MicroBatch(examples, job.completions, job.tokens, job.completion, packed)
        key = repr((job.policy, job.reference, batch, keep, before))
        if key not in self._traces:
            with as_on_an_accelerator(self.accelerator):
                self._traces[key] = trace(self.models(job), batch, keep, before)
        return self._traces[key]

    def plan(self, job: Job, cluster: Cluster) -> Plan:
        """The plan of a job on a cluster.

        Raises:
            UserError: what cannot be run, as `check` says.
        """
        check(job, cluster, self.shape)
        weights, seen = self.models(job).weights(), self.trace(job, cluster.gpus)
        whole = [*weights["policy"], *weights["reference"]]
        gathers = gathering(seen.uses, whole, job.zero) if _sharded(job, cluster) else Gathering(0, 0, 0, 0)
        memory, host = _memory(job, cluster, weights, self.models(job).buffer_bytes(), seen, gathers)
        trained = sum(weight.bytes for weight in whole if weight.trained)
        flops = {phase: count * job.forwards(cluster.gpus) for phase, count in seen.flops.items()}
        return Plan(
            job=job,
            cluster=cluster,
            parameters=_parameters(weights),
            memory={part: size for part, size in memory.items() if size},
            host=host,
            saved=dict(seen.saved),
            gathered=_received(gathers.bytes * job.forwards(cluster.gpus), cluster.gpus),
            reduced=_reduced(job, cluster.gpus, trained),
            flops=flops,
            seconds=_seconds(job, cluster, sum(flops.values()), gathers, trained),
        )


FEW = 4
"""Examples that are traced; a step of more is extrapolated."""


def extrapolated(fewer: Trace, few: Trace, count: int, examples: int) -> Trace:
    """The trace of more examples from those of `count` and of one fewer."""

    def grown(first: Any, second: Any) -> dict[str, int]:
        more = examples - count
        return {key: second[key] + more * (second[key] - first[key]) for key in {**first, **second}}

    return Trace(
        Counter(grown(fewer.peak, few.peak)),
        Counter(grown(fewer.saved, few.saved)),
        grown(fewer.flops, few.flops),
        few.uses,
    )


def check(job: Job, cluster: Cluster, shape: PretrainedConfig) -> None:
    """Refuse what cannot be run, with one line each."""
    if cluster.gpus > 1 and job.strategy == "single_device":
        raise UserError(
            f"trainer.strategy: one device, but --gpus is {cluster.gpus}; set trainer.strategy: zero3 or ddp"
        )
    if job.strategy == "zero3":
        refuse_hpz(job.zero.hpz_partition_size, cluster.gpus // cluster.nodes)
        refuse_adafactor(job.optimizer.name == "adafactor")
    if job.batch_size < cluster.gpus * job.accumulate:
        raise UserError(
            f"data.batch_size: {job.batch_size} examples a step are fewer than {cluster.gpus} GPUs x"
            f" {job.accumulate} accumulated micro-batches; give at least {cluster.gpus * job.accumulate}"
        )
    positions = getattr(shape, "max_position_embeddings", None)
    if positions is not None and job.tokens > positions:
        raise UserError(f"--tokens {job.tokens}: the model has {positions} positions; give no more")
    if not 0 < job.completion < job.tokens:
        raise UserError(
            f"--completion_tokens {job.completion}: give 1 to {job.tokens - 1}, as a row has {job.tokens} tokens"
        )


def _sharded(job: Job, cluster: Cluster) -> bool:
    return job.strategy == "zero3" and cluster.gpus > 1


def _parameters(weights: dict[str, list[Weight]]) -> Parameters:
    policy, reference = weights["policy"], weights["reference"]
    return Parameters(
        sum(weight.numel for weight in policy),
        sum(weight.numel for weight in policy if weight.trained),
        sum(weight.numel for weight in reference),
    )


def _memory(
    job: Job,
    cluster: Cluster,
    weights: dict[str, list[Weight]],
    buffers: int,
    seen: Trace,
    gathers: Gathering,
) -> tuple[dict[str, int], int]:
    """Bytes of each GPU by part, and of each node's own memory."""
    fixed, host = fixed_bytes(job, cluster.gpus, weights)
    come_and_go = {"gathered weights": gathers.peak + gathers.buffer, **seen.peak}
    moving = sum(come_and_go.values()) - come_and_go.pop("gradients", 0)
    # At the end of a step activations are gone, and torch's foreach optimizers make copies of what they change.
    stepping = fixed["gradients"] if job.optimizer.name in ("adamw", "rmsprop") else 0
    parts = {
        **fixed,
        "buffers": buffers,
        **come_and_go,
        "optimizer's copies": max(0, stepping - moving),
        "reserve": RESERVE + round(FRAGMENTATION * moving),
    }
    return parts, host * (cluster.gpus // cluster.nodes)


def _received(whole: int, gpus: int) -> int:
    return whole * (gpus - 1) // gpus


def _reduced(job: Job, gpus: int, trained: int) -> int:
    """DDP reduces once a step and sends every gradient there and back; ZeRO-3 scatters each micro-batch's."""
    times = job.forwards(gpus) if job.strategy == "zero3" else 2
    return _received(times * trained, gpus)


def _seconds(job: Job, cluster: Cluster, flops: int, gathers: Gathering, trained: int) -> Seconds:
    compute = cluster.compute_seconds(flops, job.policy.dtype, job.matmul)
    if not _sharded(job, cluster):
        return Seconds(compute, 2 * cluster.exchange_seconds(trained) if cluster.gpus > 1 else 0.0, 0.0)
    inside = dataclasses.replace(cluster, gpus=max(1, cluster.gpus // cluster.nodes), nodes=1)
    near = far = 0
    if job.zero.hpz_partition_size > 1:
        # What is frozen never leaves a node again once the node has its copy; what is trained does in each forward.
        near, far = (gathers.bytes, 0) if job.policy.adapter is not None else (gathers.again, gathers.first)
    else:
        far = gathers.bytes
    exchange = cluster.exchange_seconds(far + trained) + inside.exchange_seconds(near)
    offloaded = gathers.bytes / cluster.gpus if job.zero.offload == "parameters" else 0.0
    forwards = job.forwards(cluster.gpus)
    return Seconds(compute, forwards * exchange, forwards * offloaded / HOST_LINK)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON: bytes, seconds and FLOPs."""
    return {
        "job": dataclasses.asdict(plan.job)
        | {
            "examples_at_once": plan.job.at_once(plan.cluster.gpus),
            "forwards_each_step": plan.job.forwards(plan.cluster.gpus),
        },
        "cluster": dataclasses.asdict(plan.cluster),
        "parameters": dataclasses.asdict(plan.parameters),
        "memory": plan.memory,
        "total": plan.total,
        "fits": plan.fits,
        "host": plan.host,
        "saved_for_backward": plan.saved,
        "gathered_each_step": plan.gathered,
        "reduced_each_step": plan.reduced,
        "flops_each_step": plan.flops,
        "seconds_each_step": dataclasses.asdict(plan.seconds),
        "bound": plan.seconds.bound,
    }
