"""A model that answers, from command-line settings: base and adapter, tokenizer, its prompt template."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from transformers import PreTrainedTokenizerBase

from launch.launchers import launched
from launch.quiet import quiet
from trainer.data.homoglyphs import INSTRUCTION
from trainer.policy.devices import device_named
from trainer.policy.folders import read_manifest, resolve
from trainer.policy.load import PolicyConfig, fingerprint, load_frozen, load_tokenizer, saved_policy
from trainer.schema import UserError

TINY = Path(__file__).resolve().parent.parent / "configs" / "models" / "tiny_letters"


@dataclasses.dataclass(frozen=True)
class Answering:
    """A model ready to answer. `prompt_template` holds `{text}` where the adapter was trained with one."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    prompt_template: str | None
    description: dict[str, Any]


def answering(given: Namespace) -> Answering:
    """Load what the settings of `launch.commands.parsing.add_model` say."""
    quiet()
    # DeepSpeed, which PEFT imports when it is installed, logs to stdout: that is for the answers alone.
    with contextlib.redirect_stdout(sys.stderr):
        return _load(given)


def _load(given: Namespace) -> Answering:
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    config = _policy_config(given)
    fabric = join_ranks(given.device)
    model = sharded_model(config, fabric) if given.sharded else load_frozen(config)
    tokenizer = load_tokenizer(config.base, config.revision, config.offline, config.trust_remote_code)
    manifest = (
        read_manifest(resolve(given.adapter)) if given.adapter and resolve(given.adapter).is_dir() else None
    ) or {}
    description = {
        "base": config.base,
        "adapter": given.adapter,
        "step": manifest.get("step"),
        "dtype": config.dtype,
        "fingerprint": fingerprint(config),
    }
    if is_first():
        print(f"model: {config.base}{f' with {config.start}' if config.start else ''}", file=sys.stderr)
    template = manifest.get("prompt_template")
    if given.adapter is None and Path(config.base).resolve() == TINY:
        template = INSTRUCTION
    if not given.sharded:
        model.to(fabric.device if fabric else device_named(given.device))  # type: ignore[arg-type]
    return Answering(model, tokenizer, template, description)


def join_ranks(device: str | None) -> Fabric | None:
    """Join the other processes that a launcher (torchrun, srun) has started; None where this is the only one.

    Raises `UserError` for a device, where each process has its own.
    """
    said = launched(os.environ)
    devices, nodes = (said[key].value if key in said else 1 for key in ("devices", "num_nodes"))
    if devices * nodes == 1:
        return None
    if device not in (None, "cpu", "cuda"):
        raise UserError(
            f"--device {device}: each of {devices * nodes} processes has its own; give cpu or cuda"
        )
    kind = device_named(device).type
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy="ddp")
    fabric.launch()
    os.environ["LOCAL_RANK"] = str(fabric.local_rank)  # DeepSpeed asks for it, and `srun` does not set it
    return fabric


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def sharded_model(config: PolicyConfig, fabric: Fabric | None) -> Any:
    if fabric is None:
        raise UserError("--sharded: there is one process only; start several, with torchrun or srun")
    from trainer.policy.sharded import sharding
    from trainer.strategy import Zero3, answering

    shards = Zero3().config
    assert isinstance(shards, dict)
    with sharding(shards):
        return answering(load_frozen(config), shards)


def _policy_config(given: Namespace) -> PolicyConfig:
    for name in ("base", "adapter"):
        if getattr(given, name) == "":  # a variable of the shell that is not set
            raise UserError(f"--{name}: is empty; give a model, or leave it out")
    names = ("revision", "dtype", "offline", "trust_remote_code")
    settings = {name: getattr(given, name) for name in names}
    if given.adapter is not None:
        return saved_policy(given.adapter, given.base, **settings)
    return PolicyConfig(given.base or str(TINY), adapter=None, **settings)


def config_tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that a fit config trains with: the policy's."""
    policy = config.model.init_args.policy
    return load_tokenizer(policy.base, policy.revision, policy.offline, policy.trust_remote_code)
