from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import math
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from trainer.checkpoint.tree import decode, encode
from trainer.schema import UserError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def there_and_back(value):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, tensors), allow_nan=False)
    return decode(json.loads(text), load(save(tensors)))


keys = (
    st.text(max_size=5)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.tuples(st.integers(), st.text(max_size=3))
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(st.integers(), max_size=4)
        | st.dictionaries(st.sampled_from(["$tensor", "$dict", "$tuple", "a/b", "a"]), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one, two) -> bool:
    """Equal, and of the same types all the way down (1, 1.0 and True are three values)."""
    if isinstance(one, dict):
        return [*map(repr, one)] == [*map(repr, two)] and all(
            same(a, b) for a, b in zip(one.values(), two.values(), strict=True)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@given(trees)
@settings(max_examples=300, deadline=None)
def test_any_tree_comes_back(tree):
    assert same(there_and_back(tree), tree)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_come_back(dtype, shape):
    tensor = (torch.rand(shape) * 5).to(dtype)
    found = there_and_back({"a": [tensor], 7: tensor, "view": tensor.expand(2, *shape)})
    for value in (found["a"][0], found[7]):
        assert value.dtype == dtype
        assert torch.equal(value, tensor)
    assert torch.equal(found["view"], tensor.expand(2, *shape))


def test_names_that_look_alike_stay_apart():
    tree = {
        "a": {"b": torch.ones(1)},
        "a/b": torch.zeros(1),
        1: torch.full((1,), 2.0),
        "1": torch.full((1,), 3.0),
    }
    found = there_and_back(tree)
    assert [found["a"]["b"].item(), found["a/b"].item(), found[1].item(), found["1"].item()] == [1, 0, 2, 3]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Settings:
    rate: float
    path: Path


def test_other_values_come_back_as_stated():
    found = there_and_back(
        {
            "inf": [math.inf, -math.inf, math.nan],
            "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.arange(3)],
            "ordered": OrderedDict(b=1, a=2),
            "default": defaultdict(int, a=1),
            "enum": Colour.RED,
            "dataclass": Settings(0.1, Path("a/b")),
            "namespace": argparse.Namespace(x=1),
            "torch": [torch.float32, torch.device("cpu"), torch.Size([2, 3])],
        }
    )
    assert found["inf"][:2] == [math.inf, -math.inf]
    assert math.isnan(found["inf"][2])
    assert found["numpy"][:3] == [0.5, 3, True]
    assert np.array_equal(found["numpy"][3], np.arange(3))
    assert (found["ordered"], list(found["ordered"])) == ({"b": 1, "a": 2}, ["b", "a"])
    assert (found["default"], found["enum"]) == ({"a": 1}, "red")
    assert found["dataclass"] == {"rate": 0.1, "path": Path("a/b")}
    assert found["namespace"] == {"x": 1}
    assert found["torch"] == [torch.float32, torch.device("cpu"), (2, 3)]


@pytest.mark.parametrize("value", [lambda: None, object(), Settings, 1j, np.array(["a"], dtype=object)])
def test_what_has_no_safe_form_is_refused(value):
    with pytest.raises(UserError, match="checkpoint key 'deep/0'"):
        encode({"deep": [value]}, {})
