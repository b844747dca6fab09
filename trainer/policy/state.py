"""What is trained, as tensors by name: taken out of a policy, put back, and named as in PEFT's files."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from trainer.policy.adapters import POLICY, narrowed, whole, whole_sizes
from trainer.policy.sharded import kept, read_whole, write_whole
from trainer.schema import UserError


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: those that are trained, and all."""

    trained: int
    total: int

    def __str__(self) -> str:
        return (
            f"{self.trained:,} trained of {self.total:,} parameters ({self.trained / max(self.total, 1):.4%})"
        )


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count each parameter once, tied ones too; under ZeRO-3 (which empties them) by their whole size."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return ParameterCounts(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by the names of `model.state_dict()`, whole; no frozen weight is among them.

    Where they are sharded, every rank must ask, and rank zero gets them; on the others the tensors are empty.
    """
    sizes = whole_sizes(model)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = read_whole(parameter)
            tensor = whole(tensor.flatten(), sizes[name]).view(-1, 1) if name in sizes else tensor
            state[name] = kept(tensor, parameter)
    return state


def load_trained_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put trained tensors back, by the names `trained_state` gave them; where they are sharded, on every rank.

    Raises:
        UserError: a tensor is missing, unknown or of another size.
    """
    fill(model, tensors, {n for n, p in model.named_parameters() if p.requires_grad}, "the checkpoint")


def load_adapter_state(model: PeftModel, tensors: Mapping[str, Tensor], adapter: str, origin: str) -> None:
    """Fill the named adapter from tensors under PEFT's file names; `origin` names the file in messages."""
    names = {
        file_name(name, adapter): name for name, _ in model.named_parameters() if _belongs(name, adapter)
    }
    state = {names.get(key, key): tensor for key, tensor in tensors.items()}
    fill(model, state, set(names.values()), origin)


def fill(model: nn.Module, tensors: Mapping[str, Tensor], names: set[str], origin: str) -> None:
    """Set exactly the parameters `names`; nothing is set unless all fit."""
    _check_names(names, set(tensors), origin)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    sizes, fitted = whole_sizes(model), {}
    for name, parameter in parameters.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        tensor = tensors[name]
        if name in sizes and tensor.numel() == sizes[name]:
            tensor = narrowed(f"{origin}: {name}", tensor, shape[0])
        if tensor.shape != shape:
            raise UserError(
                f"{origin}: {name} has shape {list(tensor.shape)}, the model's has {list(shape)}; "
                "it was trained on another base model or with other adapter settings"
            )
        fitted[name] = tensor
    for name, tensor in fitted.items():
        write_whole(parameters[name], tensor)


def _check_names(expected: set[str], found: set[str], origin: str) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        parts = [
            f"{words} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for words, names in (("lacks", missing), ("has unknown", unknown))
            if names
        ]
        raise UserError(
            f"{origin}: {', '.join(parts)}; the adapter's kind, preset or base model is another one"
        )


def _belongs(name: str, adapter: str) -> bool:
    return adapter in name.split(".")


def file_name(name: str, adapter: str = POLICY) -> str:
    """The name of a parameter in PEFT's files: without the adapter's own name."""
    parts = name.split(".")
    # The adapter's name stands behind the PEFT parameter's (`ia3_l.default`, `lora_A.default.weight`): the
    # last one.
    where = len(parts) - 1 - parts[::-1].index(adapter)
    return ".".join(parts[:where] + parts[where + 1 :])


def file_names(names: list[str], adapter_config: dict[str, Any] | None) -> dict[str, str]:
    """State-dict name -> name in the weights file, for adapters or for all weights."""
    plain = {name: name.removeprefix("policy.") for name in names}
    return {name: file_name(short) for name, short in plain.items()} if adapter_config else plain


def adapter_json(model: PeftModel, base: str) -> dict[str, Any]:
    """The content of `adapter_config.json`, as PEFT itself writes it."""
    config = copy.copy(model.peft_config[POLICY])
    config.inference_mode = True
    config.base_model_name_or_path = base
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
