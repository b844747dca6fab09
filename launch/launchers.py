"""What a launcher has started, as settings of the trainer, and what it must agree on with the config.

`lightning run` and `fabric run` leave their flags in LT_* variables, torchrun and `srun` the number of their
processes. Lightning's Trainer reads none of these flags, so a config that says nothing takes them from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy

from launch.errors import check_yaml, holds
from trainer.schema import UserError

ZERO3 = "deepspeed_stage_3"
"""`zero3` in the fixed list of `fabric run --strategy`."""
_STRATEGIES = ("auto", "ddp", "zero3")
_CLASSES = {"DDPStrategy": "ddp", "Zero3": "zero3"}


class Said(NamedTuple):
    """A setting as a launcher gives it, and the words that name its place."""

    value: Any
    place: str


def launched(env: Mapping[str, str]) -> dict[str, Said]:
    """What the launcher that started this process says of devices (on each node), num_nodes, accelerator,
    strategy and precision.

    Raises `UserError` where a launcher's processes would wait for each other for ever.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        # torchrun is started by `srun`, too; then it is torchrun that made this process.
        return {**_torchrun(env), **_fabric(env)}
    return _slurm(env)


def _torchrun(env: Mapping[str, str]) -> dict[str, Said]:
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)) and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torch 2.5 to 2.13: https://github.com/pytorch/pytorch/issues/135712
        raise UserError(
            "torchrun --max-restarts: restarted processes would look for each other at their old addresses; set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        )
    ranks, here = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    if ranks % here:
        raise UserError(
            f"torchrun: {here} processes here of {ranks} in all (LOCAL_WORLD_SIZE, WORLD_SIZE); start equally"
            f" many on each node (--nproc-per-node)"
        )
    return {
        "devices": Said(here, f"LOCAL_WORLD_SIZE={here} (torchrun's --nproc-per-node)"),
        "num_nodes": Said(
            ranks // here, f"WORLD_SIZE={ranks}, LOCAL_WORLD_SIZE={here} (torchrun's --nnodes)"
        ),
    }


def _fabric(env: Mapping[str, str]) -> dict[str, Said]:
    """The flags of `fabric run`, which starts its processes by torchrun."""
    if "LT_CLI_USED" not in env:
        return {}
    said = {}
    for key in ("devices", "num_nodes", "accelerator", "strategy", "precision"):
        value: Any = env.get(f"LT_{key.upper()}", "auto")
        if key == "num_nodes" or (key == "devices" and value.isdecimal()):
            value = int(value)
        if value not in ("auto", "-1"):
            flag = key.replace("_", "-")
            said[key] = Said(value, f"LT_{key.upper()}={value} (--{flag} of `lightning run` or `fabric run`)")
    return said


def _slurm(env: Mapping[str, str]) -> dict[str, Said]:
    if "SLURM_JOB_ID" not in env:
        return {}
    if env.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            # Lightning 2.6 takes no notice of SLURM in jobs of these names: each task would be a run of its own.
            raise UserError(
                f"SLURM_JOB_NAME={env['SLURM_JOB_NAME']}: tasks of a job of this name do not find each other; add"
                f" --job-name=train to `srun`"
            )
        return {}
    if "SLURM_NTASKS" not in env:
        return {}
    tasks, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", 1))
    if "SLURM_STEP_ID" not in env and tasks > 1:
        raise UserError(
            f"SLURM_NTASKS={tasks}, but this process was not started by `srun` and would wait for the other"
            f" {tasks - 1} for ever; write `srun tandem ...` in the job's script"
        )
    here = int(env.get("SLURM_NTASKS_PER_NODE", 0 if tasks > 1 else 1))
    if here * nodes != tasks:
        each = f" (now SLURM_NTASKS_PER_NODE={here})" if here else ""
        raise UserError(
            f"SLURM_NTASKS={tasks} on SLURM_NNODES={nodes}: give --ntasks-per-node{each}, so that each node has"
            f" equally many tasks, one for each device"
        )
    return {
        "devices": Said(here, f"SLURM_NTASKS_PER_NODE={here} (--ntasks-per-node)"),
        "num_nodes": Said(nodes, f"SLURM_NNODES={nodes} (--nodes)"),
    }


def origin(key: str, arguments: Sequence[str]) -> str | None:
    """The last flag or config file that sets `key` (`trainer.devices`), as a user would name it."""
    found, path = None, key.split(".")
    flags = {f"--{key}", f"--{path[0]}.init_args.{'.'.join(path[1:])}"}
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag in flags:
            found = f"{flag} {value if equals else following}"
        elif flag in ("--config", "-c"):
            file = value if equals else following
            if holds(check_yaml(file), path):
                found = f"{file}: {key}"
    return found


def settle(config: Namespace, arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> None:
    """Fill what the config leaves to the launcher, in place.

    Raises:
        UserError: naming both, where the config says one thing and the launcher another; and for a strategy
            or precision that tandem does not have.
    """
    trainer, said = config.trainer, launched(env)
    _check_strategy(trainer.strategy, origin("trainer.strategy", arguments) or "trainer.strategy")
    if "strategy" in said:
        said["strategy"] = _check_strategy(*said["strategy"])
    _plain("devices", trainer.devices)
    _check_precision(config, arguments)
    if precision := said.pop("precision", None):
        _settle_precision(config, precision, arguments)
    for key, (value, place) in said.items():
        by = origin(f"trainer.{key}", arguments)
        mine = _plain(key, trainer[key]) if by else None
        if mine is None:
            trainer[key] = value
        elif not _agree(mine, _plain(key, value)):
            raise UserError(f"{by} contradicts {place}; let one of them go, or let them say the same")
    if trainer.strategy == ZERO3:
        trainer.strategy = "zero3"
    if trainer.strategy == "auto" and _ranks(trainer) > 1:
        trainer.strategy = "ddp"
    _refuse_to_wait(trainer, said, env)
    _set_timeout(config, arguments)


def _check_strategy(given: Any, place: str) -> Said:
    """The strategy's name among tandem's."""
    name = given.class_path.rpartition(".")[2] if isinstance(given, Namespace) else str(given)
    known = _CLASSES.get(name, "zero3" if name == ZERO3 else name)
    if isinstance(given, str | Namespace) and known not in _STRATEGIES:
        alike = name.lower().startswith(("deepspeed", "fsdp"))
        hint = "zero3 shards the weights (ZeRO-3)" if alike else "one of auto, ddp, zero3 is needed"
        raise UserError(f"{place}: {name} is not supported; {hint}")
    return Said(known, place)


def _check_precision(config: Namespace, arguments: Sequence[str]) -> None:
    """One dtype policy: what is trained is float32, and policy.dtype says what the base is in."""
    precision = config.trainer.precision
    if precision is not None and str(precision) not in ("32-true", "32"):
        by = origin("trainer.precision", arguments) or "trainer.precision"
        raise UserError(
            f"{by}: {precision} is not supported; 32-true, and model.policy.dtype: bfloat16 for a base in bfloat16"
        )


def _settle_precision(config: Namespace, said: Said, arguments: Sequence[str]) -> None:
    """Adapters train in float32; `bf16-true` speaks of the base's weights."""
    value = {"32": "32-true"}.get(said.value, said.value)
    if value not in ("32-true", "bf16-true"):
        raise UserError(
            f"{said.place}: not supported; 32-true, or bf16-true for a base in bfloat16 with adapters in float32"
        )
    config.trainer.precision = "32-true"
    if value == "bf16-true":
        _use_bfloat16(config.model.init_args.policy, said, origin("model.policy.dtype", arguments))


def _use_bfloat16(policy: Namespace, said: Said, by: str | None) -> None:
    if policy.adapter is None:
        raise UserError(
            f"{said.place}: policy.adapter is null, and all weights train in float32 only; use 32-true"
        )
    if by and policy.dtype != "bfloat16":
        raise UserError(f"{by} contradicts {said.place}; let one of them go, or let them say the same")
    policy.dtype = "bfloat16"
    if os.environ.get("RANK", "0") == "0":
        print(
            "--precision=bf16-true: policy.dtype bfloat16 for the base, adapters in float32", file=sys.stderr
        )


def _plain(key: str, value: Any) -> Any:
    """A setting in a form that can be compared; None leaves it to the launcher."""
    if isinstance(value, Namespace):
        return _CLASSES[value.class_path.rpartition(".")[2]]
    if str(value) in ("auto", "-1", "None"):
        return None
    if key == "devices":
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        parts = [part.strip() for part in text.strip("[]").split(",") if part.strip()]
        if not parts or not all(part.isdecimal() for part in parts):
            raise UserError(
                f"trainer.devices: {value} is no number of devices; give 4, a list [0,2], -1 or auto"
            )
        numbers = [int(part) for part in parts]
        return numbers if isinstance(value, list) or "," in text else numbers[0]
    return {"cuda": "gpu", ZERO3: "zero3"}.get(str(value), value)


def _agree(config: Any, launcher: Any) -> bool:
    """A config may choose which devices, if they are as many as were started."""
    if isinstance(config, list) and isinstance(launcher, int):
        return len(config) == launcher
    return config == launcher


def _ranks(trainer: Namespace) -> int:
    devices = _plain("devices", trainer.devices)
    if devices is None:
        on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = torch.cuda.device_count() if on_gpu else 1
    return trainer.num_nodes * (len(devices) if isinstance(devices, list) else devices)


def _refuse_to_wait(trainer: Namespace, said: Mapping[str, Said], env: Mapping[str, str]) -> None:
    """Without a launcher nothing starts the other nodes' processes."""
    if trainer.num_nodes > 1 and "num_nodes" not in said and "MASTER_ADDR" not in env:
        raise UserError(
            f"trainer.num_nodes: {trainer.num_nodes}, but no launcher says where the other nodes are; start by"
            f" `srun` or torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node"
        )


def _set_timeout(config: Namespace, arguments: Sequence[str]) -> None:
    """`rank_timeout`, for a strategy that is given with settings of its own but without this one."""
    strategy = config.trainer.strategy
    if isinstance(strategy, Namespace) and not origin("trainer.strategy.timeout", arguments):
        seconds = float(config.rank_timeout)  # jsonargparse cannot write its own PositiveFloat into a class
        zero3 = _plain("strategy", strategy) == "zero3"
        strategy.init_args.timeout = seconds if zero3 else timedelta(seconds=seconds)


def strategy_of(given: Any, rank_timeout: float) -> Any:
    """The strategy that a name means, whose ranks wait `rank_timeout` seconds for each other and then fail."""
    if given == "ddp":
        return DDPStrategy(timeout=timedelta(seconds=rank_timeout))
    if given == "zero3":
        from trainer.strategy import Zero3

        return Zero3(timeout=rank_timeout)
    return given
