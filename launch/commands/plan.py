"""`tandem plan`: what a config needs on a cluster, before anything is allocated."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from trainer.schema import UserError

FLAGS = {"--sweep", "--json"}
VALUES = {
    "--gpus": int,
    "--nodes": int,
    "--gpu": str,
    "--gpu_memory": float,
    "--network": float,
    "--tokens": int,
    "--completion_tokens": int,
    "--shape": str,
}
SWEEP = (1, 2, 4, 8, 16, 32, 64)


def main(arguments: Sequence[str]) -> int:
    """Run `tandem plan`; its arguments are those of `fit`, and its own. Returns 0, or 1 if the job does not fit."""
    if any(word in ("-h", "--help") for word in arguments):
        print(_help())
        return 0
    mine, rest = parted(arguments)
    own = ArgumentParser(add_help=False, exit_on_error=False)
    for flag in sorted(FLAGS):
        own.add_argument(flag, action="store_true")
    for name, kind in VALUES.items():
        own.add_argument(name, type=kind | None)
    given = own.parse_args(mine)
    planner, job, cluster = asked(given, rest)
    if given.sweep:
        return _sweep(planner, job, cluster, given.json)
    return _one(planner, job, cluster, given.json)


def _help() -> str:
    from trainer.planning.hardware import GPUS
    from trainer.planning.shapes import SHAPES

    return f"""\
usage: tandem plan --config FILE [--config FILE ...] [--gpus N] [--gpu NAME] [settings of fit]

What a config needs on a cluster: memory of each GPU by part, bytes between GPUs, what bounds a step, and what to
change when it does not fit. Reads the model's config.json and no weights; allocates nothing.

  --config FILE           a config as for `tandem fit`; later files override earlier ones
  --gpus N                GPUs of all nodes together (default: trainer.devices x trainer.num_nodes)
  --nodes N               machines they are in (default: trainer.num_nodes, or as many as 8 a node make)
  --gpu NAME              {", ".join(GPUS)} (default h100)
  --gpu_memory GB         of one GPU, where yours has another size
  --network GB/S          into each node from the others (default 50, one 400 Gb/s link)
  --tokens N              longest row (default data.max_length)
  --completion_tokens N   how many of them are scored (default half)
  --shape NAME            a published model instead of policy.base, without files or network:
                          {", ".join(list(SHAPES)[:7])},
                          {", ".join(list(SHAPES)[7:])}
  --sweep                 a table over 1 to 64 GPUs
  --json                  for machines
  ...                     any setting of `tandem fit`, such as --trainer.strategy zero3

Exit status: 0 if it fits, 1 if not, 2 for a wrong setting."""


def parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that are plan's own, and those of the config."""
    mine: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name = word.partition("=")[0]
        if name in FLAGS or (name in VALUES and "=" in word):
            mine.append(word)
        elif name in VALUES:
            mine += [word, *([value] if (value := next(words, None)) is not None else [])]
        else:
            rest.append(word)
    return mine, rest


def asked(given: Any, config_arguments: Sequence[str]) -> tuple[Any, Any, Any]:
    """The planner, the job and the cluster of a command line."""
    from launch.fit import TandemCLI
    from launch.quiet import quiet

    quiet()
    # Known before anything is built, so that a typing mistake is told at once.
    from trainer.planning.hardware import known_gpu

    gpu = known_gpu(given.gpu or "h100")
    config = TandemCLI(config_arguments, "inspect").config
    return _asked(given, config, gpu)


def _asked(given: Any, config: Any, gpu: Any) -> tuple[Any, Any, Any]:
    from trainer.planning.hardware import GB, Cluster
    from trainer.planning.plan import Planner
    from trainer.planning.shapes import published
    from trainer.policy.base import read_config

    gpus, nodes = _cluster_size(given, config.trainer)
    memory = gpu.memory if given.gpu_memory is None else given.gpu_memory
    network = 50.0 if given.network is None else given.network
    cluster = Cluster(gpus, nodes, gpu, round(memory * GB), network * GB)
    job = _job(given, config, gpus)
    shape = published(given.shape) if given.shape else read_config(job.policy.base, job.policy)
    return Planner(shape), job, cluster


def _cluster_size(given: Any, trainer: Any) -> tuple[int, int]:
    nodes = given.nodes or trainer.num_nodes
    gpus = given.gpus
    if gpus is None:
        devices = trainer.devices
        if isinstance(devices, list):
            devices = len(devices)
        # A sweep counts for itself.
        gpus = 1 if given.sweep else -1
        if str(devices).isdigit():
            gpus = int(devices) * nodes
        if gpus < 0:
            raise UserError(f"trainer.devices: {trainer.devices} is not a number here; give --gpus N")
    if given.nodes is not None and given.nodes < 1:
        raise UserError(f"--nodes {given.nodes}: is below 1; give at least one")
    if given.nodes is None and gpus > 8 * nodes:
        nodes = math.ceil(gpus / 8)
    return gpus, nodes


def _job(given: Any, config: Any, gpus: int) -> Any:
    from trainer.data.sampler import AUTO_BUDGET
    from trainer.optimization import OptimizerConfig
    from trainer.planning.job import Job
    from trainer.policy.load import AdapterConfig, PolicyConfig
    from trainer.policy.reference import ReferenceConfig

    model, data = config.model.init_args.as_dict(), config.data.init_args
    policy = dict(model["policy"])
    if policy["adapter"] is not None:
        policy["adapter"] = AdapterConfig(**policy["adapter"])
    if given.shape:
        policy["base"] = given.shape
    tokens = given.tokens or data.max_length
    if tokens is None:
        raise UserError("data.max_length: null does not say how long rows are; give --tokens N")
    strategy, zero = _strategy(config.trainer.strategy, gpus)
    return Job(
        policy=PolicyConfig(**policy),
        reference=ReferenceConfig(**model["reference"]) if "reference" in model else None,
        optimizer=OptimizerConfig(**model["optimizer"]),
        batch_size=data.batch_size,
        accumulate=config.trainer.accumulate_grad_batches,
        tokens=tokens,
        completion=given.completion_tokens or tokens // 2,
        strategy=strategy,
        zero=zero,
        matmul=config.float32_matmul,
        layout=data.layout,
        token_budget=AUTO_BUDGET["accelerator"] if data.token_budget == "auto" else data.token_budget,
    )


def _strategy(named: Any, gpus: int) -> tuple[Any, Any]:
    """The strategy's name as the plan knows it, and the settings of ZeRO-3."""
    from trainer.planning.shards import ZeroSettings

    if not isinstance(named, str):
        name, settings = named.class_path.rpartition(".")[2].lower(), named.init_args.as_dict()
    else:
        name, settings = named, {}
    if name in ("zero3", "deepspeed", "deepspeed_stage_3"):
        return "zero3", ZeroSettings.of(settings)
    if name == "auto":
        # Lightning's own choice.
        return ("ddp" if gpus > 1 else "single_device"), ZeroSettings()
    if name.startswith("ddp"):
        return "ddp", ZeroSettings()
    if name in ("single_device", "singledevicestrategy"):
        return "single_device", ZeroSettings()
    raise UserError(f"trainer.strategy: '{name}' cannot be planned; zero3, ddp and single_device can")


def _one(planner: Any, job: Any, cluster: Any, as_data: bool) -> int:
    from launch.commands.plan_tables import show
    from trainer.planning.advice import advise, within_nodes
    from trainer.planning.plan import as_json

    plan = planner.plan(job, cluster)
    advice = [] if plan.fits else advise(planner, plan)
    if as_data:
        changes = [vars(change) for change in advice]
        print(json.dumps({**as_json(plan), "advice": changes}, indent=2))
    else:
        show(plan, advice, within_nodes(planner, plan))
    return 0 if plan.fits else 1


def _sweep(planner: Any, job: Any, cluster: Any, as_data: bool) -> int:
    from launch.commands.plan_tables import show_sweep
    from trainer.planning.plan import as_json

    plans = list(sweep(planner, job, cluster))
    if as_data:
        print(json.dumps([{**as_json(plan), "least": least} for plan, least in plans], indent=2))
    else:
        show_sweep(plans)
    return 0 if any(plan.fits for plan, _ in plans) else 1


def sweep(planner: Any, job: Any, cluster: Any) -> Any:
    """(plan, least bytes) for 1 to 64 GPUs; the least is with one example at once and gradient checkpointing."""
    import dataclasses

    for gpus in SWEEP:
        per_node = max(8, cluster.gpus // cluster.nodes)
        where = dataclasses.replace(cluster, gpus=gpus, nodes=math.ceil(gpus / per_node))
        for strategy in ("single_device",) if gpus == 1 else ("ddp", "zero3"):
            batch = max(job.batch_size, gpus)
            here = dataclasses.replace(
                job, strategy=strategy, batch_size=batch, accumulate=min(job.accumulate, batch // gpus)
            )
            small = dataclasses.replace(
                here,
                accumulate=batch // gpus,
                policy=dataclasses.replace(job.policy, gradient_checkpointing=True),
            )
            yield planner.plan(here, where), planner.plan(small, where).total
