"""A tree of Python values as JSON, its tensors apart: what a checkpoint holds beside weights, without any
pickle.

JSON knows fewer types than Python. A value that it lacks becomes an object with one key that begins with `$`:

| value | JSON | | value | JSON |
|---|---|---|---|---|
| tensor | `{"$tensor": name}` | | tuple | `{"$tuple": [...]}` |
| NumPy array | `{"$numpy": name}` | | set | `{"$set": [...]}` |
| dict with keys that are no text | `{"$dict": [[key, value], ...]}` | | bytes | `{"$bytes": base64}` |
| nan, inf | `{"$float": "nan"}` | | dtype, device, path | `{"$dtype": "float32"}`, ... |

Dataclasses and namespaces come back as dicts, enum members and NumPy numbers as their plain values.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.schema import UserError


def encode(value: Any, tensors: dict[str, Tensor], where: str = "") -> Any:
    """The value as JSON; its tensors are added to `tensors` under names that say where they stood.

    Raises:
        UserError: naming the key of a value that has no safe form.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, (np.integer, np.bool_)):
        return value.item()
    if isinstance(value, Tensor):
        return {"$tensor": _store(value.detach().cpu().contiguous().clone(), tensors, where)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"$numpy": _store(torch.from_numpy(value.copy()), tensors, where)}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, (torch.dtype, torch.device, PurePath)):
        return {
            "$" + _NAMED[type(value)] if type(value) in _NAMED else "$path": str(value).removeprefix("torch.")
        }
    return _encode_container(value, tensors, where)


def _store(tensor: Tensor, tensors: dict[str, Tensor], where: str) -> str:
    """Keep the tensor under a name of its own: keys like 1 and "1" look alike."""
    while where in tensors:
        where += "'"
    tensors[where] = tensor
    return where


_NAMED = {torch.dtype: "dtype", torch.device: "device"}


def _encode_container(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return _encode_mapping(value, tensors, where)
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [encode(item, tensors, _under(where, str(i))) for i, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return {"$tuple" if isinstance(value, tuple) else "$set": items}
    raise UserError(
        f"checkpoint key '{where}': a {type(value).__module__}.{type(value).__qualname__} has no safe form; "
        "keep numbers, text, lists, dicts and tensors in the state instead"
    )


def _encode_mapping(value: Mapping[Any, Any], tensors: dict[str, Tensor], where: str) -> Any:
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {str(key): encode(item, tensors, _under(where, key)) for key, item in value.items()}
    pairs = [
        [encode(key, tensors, _under(where, f"key {i}")), encode(item, tensors, _under(where, str(key)))]
        for i, (key, item) in enumerate(value.items())
    ]
    return {"$dict": pairs}


def _under(where: str, name: str) -> str:
    return f"{where}/{name}" if where else name


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, content), *_ = value.items()
        if key in _DECODERS:
            return _DECODERS[key](content, tensors)
    return {key: decode(item, tensors) for key, item in value.items()}


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$tensor": lambda name, tensors: tensors[name],
    "$numpy": lambda name, tensors: tensors[name].numpy(),
    "$float": lambda text, tensors: float(text),
    "$bytes": lambda text, tensors: base64.b64decode(text),
    "$dtype": lambda name, tensors: getattr(torch, name),
    "$device": lambda name, tensors: torch.device(name),
    "$path": lambda text, tensors: Path(text),
    "$tuple": lambda items, tensors: tuple(decode(items, tensors)),
    "$set": lambda items, tensors: set(decode(items, tensors)),
    "$dict": lambda pairs, tensors: {decode(key, tensors): decode(item, tensors) for key, item in pairs},
}
