"""Adapters as the published system saves them: a `.pth` file with a state dict of IA³ scales."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from trainer.policy.adapters import POLICY, whole_sizes
from trainer.policy.state import file_name
from trainer.schema import UserError

_WORDS = {
    "key": {"k", "key", "keys", "lk"},
    "value": {"v", "value", "values", "lv"},
    "ff": {"down", "ffn", "mlp", "ff", "lff", "feedforward"},
}


def read_published(path: Path, policy: PeftModel, adapter: str = POLICY) -> dict[str, Tensor]:
    """The file's scales under PEFT's file names, for the named adapter of `policy`.

    Keys may be PEFT's own, or any that hold the layer's number and one of k, v, (down | ffn | mlp | ff).

    Raises:
        UserError: the file holds more than tensors (nothing in it is run), or keys that match nothing.
    """
    tensors = _read(path)
    shapes = _shapes(policy, adapter)
    places = {_place(name): name for name in shapes if _place(name) is not None}
    found: dict[str, Tensor] = {}
    unmatched = []
    for key, tensor in tensors.items():
        name = _peft_name(key, shapes) or places.get(_place(key))
        if name is None or name in found or tensor.numel() != shapes[name].numel():
            unmatched.append(f"{key} {list(tensor.shape)}")
        else:
            found[name] = tensor.detach().float().reshape(shapes[name])
    if unmatched:
        listed = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
        raise UserError(
            f"{path}: fits no adapter of this model: {listed}; expected like {next(iter(shapes))}"
        )
    return found


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: refused, it is not a file of plain tensors ({told})") from error
    if (
        isinstance(content, dict)
        and len(content) == 1
        and isinstance(inner := next(iter(content.values())), dict)
    ):
        content = inner
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(t, Tensor) for t in content.values())
    ):
        raise UserError(f"{path}: holds no state dict (names with tensors are expected)")
    return content


def _shapes(policy: PeftModel, adapter: str) -> dict[str, torch.Size]:
    """PEFT file name -> the shape it has there."""
    sizes = whole_sizes(policy)
    return {
        file_name(name, adapter): torch.Size((sizes[name], 1)) if name in sizes else parameter.shape
        for name, parameter in policy.named_parameters()
        if adapter in name.split(".")
    }


def _peft_name(key: str, shapes: Mapping[str, torch.Size]) -> str | None:
    """The file name that the key is, with or without the adapter's name and the prefixes."""
    plain = key.removeprefix("policy.").removesuffix(f".{POLICY}")
    return next(
        (name for name in (plain, f"base_model.model.{plain}", f"base_model.{plain}") if name in shapes), None
    )


def _place(key: str) -> tuple[int, str] | None:
    """(layer, key | value | ff) that a name speaks of; None where it does not say both, once."""
    # `ia3` is the method's name; its 3 is no layer.
    words = re.findall(r"[a-z]+|\d+", key.lower().replace("ia3", ""))
    numbers = [int(word) for word in words if word.isdigit()]
    kinds = {kind for kind, known in _WORDS.items() if known & set(words)}
    return (numbers[0], kinds.pop()) if len(numbers) == 1 and len(kinds) == 1 else None
