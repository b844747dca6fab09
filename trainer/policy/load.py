"""A policy from its settings: base model, adapter, and where it starts; and what it was made of."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.policy import sharded
from trainer.policy.adapters import (
    LORA_ALPHA,
    LORA_R,
    POLICY,
    AdapterConfig,
    attach,
    first_line,
    whole_sizes,
)
from trainer.policy.base import (
    PolicyConfig,
    architecture,
    base_fingerprint,
    load_base,
    load_tokenizer,
    read_config,
)
from trainer.policy.folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    check_base,
    is_adapter,
    read_manifest,
    resolve,
    verify,
)
from trainer.policy.published import read_published
from trainer.policy.state import (
    ParameterCounts,
    adapter_json,
    count_parameters,
    load_adapter_state,
    load_trained_state,
    trained_state,
)
from trainer.provenance import sha256_file
from trainer.schema import UserError

__all__ = [
    "AdapterConfig",
    "ParameterCounts",
    "PolicyConfig",
    "base_fingerprint",
    "count_parameters",
    "describe_for_checkpoint",
    "fingerprint",
    "load_base",
    "load_frozen",
    "load_policy",
    "load_tokenizer",
    "load_trained_state",
    "saved_policy",
    "trained_state",
]

log = logging.getLogger(__name__)


def load_policy(config: PolicyConfig) -> PeftModel | PreTrainedModel:
    """The policy, ready to be trained: adapter `default` trainable in float32 and the base frozen, or all
    trainable.

    Raises:
        UserError: the base or the start is missing, refused, or they do not fit each other.
    """
    if config.adapter is None and config.dtype != "float32":
        log.warning(
            "policy.dtype: bfloat16 weights lose small updates to rounding; train all weights in float32"
        )
    policy = _build(config)
    if config.gradient_checkpointing:
        # Not the reentrant way, which wants an input with a gradient and runs backwards inside a backward.
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        compile_layers(policy)
    log.info("%s: %s", config.base, count_parameters(policy))
    return policy.train()


def compile_layers(policy: nn.Module) -> None:
    """Have each of the policy's layers compiled when it first runs, for rows of any length.

    Raises:
        UserError: under ZeRO-3, whose hooks gather weights in between; or layers that are not known.
    """
    if sharded.active():
        raise UserError(
            "policy.compile: does not go with zero3, whose hooks would cut every layer up; set it to false"
        )
    layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"policy.compile: the layers of {type(policy).__name__} are not known; set it to false"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def load_frozen(config: PolicyConfig) -> PeftModel | PreTrainedModel:
    """The same model with nothing trainable, in evaluation mode: to generate with, or as a reference."""
    return _build(config).requires_grad_(False).eval()


def _build(config: PolicyConfig) -> PeftModel | PreTrainedModel:
    start = resolve(config.start) if config.start is not None else None
    if config.adapter is None:
        return load_base(config, _weights_start(config, start))
    if start is not None and start.is_dir() and not is_adapter(start):
        raise UserError(
            f"policy.start: {start} holds all weights, no adapter; give it as policy.base instead"
        )
    adapter, structure = _shape(config, start)
    policy = attach(load_base(config), adapter, structure)
    if start is not None:
        fill_adapter(policy, start, POLICY, config)
    return policy


def _weights_start(config: PolicyConfig, start: Path | None) -> Path | None:
    if start is None:
        return None
    if start.is_file() or is_adapter(start):
        raise UserError(
            f"policy.start: {start} is an adapter, but policy.adapter is null; set policy.adapter"
        )
    if read_manifest(start) is not None:
        verify(start)
    own, base = read_config(str(start), config), read_config(config.base, config)
    if architecture(own) != architecture(base):
        raise UserError(
            f"policy.start: {start} is {architecture(own)}, but {config.base} is {architecture(base)}"
        )
    return start


def _shape(config: PolicyConfig, start: Path | None) -> tuple[AdapterConfig, PeftConfig | None]:
    """The adapter's settings, and the saved adapter's PEFT config where they leave the shape to it."""
    adapter = config.adapter
    assert adapter is not None
    if start is None or start.is_file():
        return adapter, None
    saved = read_peft_config(start)
    if (kind := kind_of(saved)) != adapter.kind:
        raise UserError(f"policy.adapter.kind: '{adapter.kind}', but {start} is '{kind}'; set it to '{kind}'")
    if not adapter.unset:
        _check_factor(adapter, saved, start)
        return adapter, None
    if _saved_preset(start) == "paper":
        return dataclasses.replace(adapter, preset="paper"), None
    # Only the shape is taken; PEFT would warn of another base's name.
    saved.base_model_name_or_path, saved.inference_mode = None, False
    return adapter, saved


def _check_factor(adapter: AdapterConfig, saved: Any, start: Path) -> None:
    """Other settings would make another model of the same weights: LoRA multiplies its update by alpha / r."""
    r, alpha = adapter.r or LORA_R, adapter.alpha or LORA_ALPHA
    if adapter.kind == "lora" and r == saved.r and (alpha != saved.lora_alpha or saved.use_rslora):
        raise UserError(
            f"policy.adapter.alpha: {alpha}, but {start} was trained with {saved.lora_alpha}"
            f"{' and use_rslora' if saved.use_rslora else ''}; give that adapter's, or kind: lora alone"
        )


def _saved_preset(folder: Path) -> Any:
    return ((read_manifest(folder) or {}).get("adapter") or {}).get("preset")


def read_peft_config(folder: Path) -> PeftConfig:
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: not a PEFT config ({first_line(error)})") from error


def kind_of(saved: PeftConfig) -> Any:
    """PEFT's name of the method, as `AdapterConfig.kind` has it."""
    return str(getattr(saved.peft_type, "value", saved.peft_type)).lower()


def saved_policy(path: str | Path, base: str | None = None, **settings: Any) -> PolicyConfig:
    """The settings with which a saved adapter, checkpoint or run is loaded: its own base unless `base` is
    given.

    Args:
        settings: other fields of `PolicyConfig` (dtype, offline, ...).
    """
    folder = resolve(path)
    if folder.is_file():
        if base is None:
            raise UserError(f"{path}: a .pth file does not say its base model; give the base too")
        return PolicyConfig(base, AdapterConfig(), str(folder), **settings)
    if not is_adapter(folder):
        return PolicyConfig(base or str(folder), None, str(folder), **settings)
    saved, manifest = read_peft_config(folder), read_manifest(folder) or {}
    base = base or (manifest.get("base") or {}).get("name") or saved.base_model_name_or_path
    if base is None:
        raise UserError(f"{folder / ADAPTER_CONFIG}: does not name its base model; give the base too")
    kind = kind_of(saved)
    if kind not in ("ia3", "lora"):
        raise UserError(f"{folder / ADAPTER_CONFIG}: holds a '{kind}' adapter; only ia3 and lora can be used")
    return PolicyConfig(base, AdapterConfig(kind=kind, preset=_saved_preset(folder)), str(folder), **settings)


def fill_adapter(policy: PeftModel, path: Path, adapter: str, config: PolicyConfig) -> None:
    """Fill the named adapter from a `.pth` file or a PEFT folder (checked, if it has a manifest)."""
    if path.is_file():
        load_adapter_state(policy, read_published(path, policy, adapter), adapter, str(path))
        return
    if read_manifest(path) is not None:
        verify(path)
        check_base(path, config.base, base_fingerprint(config.base, config.revision, config.offline))
    load_adapter_state(policy, read_adapter(path), adapter, str(path))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's file names, from safetensors only."""
    if not (folder / ADAPTER).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        what = (
            "holds only adapter_model.bin, a pickle that could run code"
            if pickled
            else "the adapter's weights are missing"
        )
        raise UserError(f"{folder}: {what}; {ADAPTER} is expected")
    try:
        return load_file(folder / ADAPTER)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / ADAPTER}: damaged ({first_line(error)})") from error


def fingerprint(config: PolicyConfig) -> dict[str, Any]:
    """Which weights a policy begins with: those of its base, and SHA-256 of its start (None without one)."""
    start = None
    if config.start is not None:
        path = resolve(config.start)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        start = {"path": str(path), "files": {file.name: sha256_file(file) for file in files}}
    return {"base": base_fingerprint(config.base, config.revision, config.offline), "start": start}


def describe_for_checkpoint(policy: nn.Module, config: PolicyConfig) -> dict[str, Any]:
    """What a checkpoint must say of its policy for PEFT or transformers alone to load it. Plain JSON."""
    adapter, adapter_config = None, None
    if isinstance(policy, PeftModel):
        assert config.adapter is not None
        adapter_config = adapter_json(policy, config.base)
        # PEFT's config cannot say that GPT-2's queries are left out, and a start that could may be gone by
        # now.
        preset = "paper" if whole_sizes(policy) else config.adapter.preset
        adapter = {"kind": config.adapter.kind, "preset": preset}
    model_config = getattr(policy, "config", None) if adapter_config is None else None
    return {
        "adapter_config": adapter_config,
        "adapter": adapter,
        "model_config": json.loads(model_config.to_json_string(use_diff=False))
        if model_config is not None
        else None,
        "base": base_fingerprint(config.base, config.revision, config.offline),
        "config": {"policy": dataclasses.asdict(config)},
    }
