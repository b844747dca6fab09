"""Devices by name: those that are not here are one line, whatever torch would say."""

from __future__ import annotations

import pytest
import torch

from trainer.pairs.continuations import LocalGenerator
from trainer.policy.devices import check_device, device_named
from trainer.rewards.classifier import ClassifierReward
from trainer.schema import UserError


def counted(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "told"),
    [
        ("cuda", 0, "--device cuda: there is no CUDA device here; give cpu"),
        ("cuda:7", 0, "--device cuda:7: there is no CUDA device here; give cpu"),
        ("cuda:7", 1, "--device cuda:7: there is no such device here; cuda:0 is the only one"),
        ("cuda:2", 2, "--device cuda:2: there is no such device here; there are cuda:0 to cuda:1"),
    ],
)
def test_a_cuda_device_that_is_not_here(monkeypatch, name, count, told) -> None:
    counted(monkeypatch, count)
    with pytest.raises(UserError) as caught:
        device_named(name)
    assert str(caught.value) == told


def test_devices_that_are_here(monkeypatch) -> None:
    counted(monkeypatch, 2)
    assert str(device_named("cuda:1")) == "cuda:1"
    assert device_named(None).type == "cuda"
    assert device_named("cpu").type == "cpu"
    counted(monkeypatch, 0)
    assert device_named(None).type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", "meta"])
def test_what_is_no_device_is_refused_on_any_machine(name) -> None:
    with pytest.raises(UserError, match=f"^x.device: {name}: .*give cpu, cuda or cuda:1$"):
        check_device(name, "x.device:")


def test_another_maker_s_device_that_is_not_here() -> None:
    check_device("xpu", "x.device:")
    if not torch.xpu.is_available():
        with pytest.raises(UserError, match="xpu: there is no such device here"):
            device_named("xpu")


def test_who_names_a_device_says_whose_it_is(monkeypatch, tiny_gpt2) -> None:
    counted(monkeypatch, 1)
    with pytest.raises(UserError, match=r"LocalGenerator\.device: cuda:7: there is no such device here"):
        _ = LocalGenerator(str(tiny_gpt2), device="cuda:7")._model
    with pytest.raises(UserError, match=r"LocalGenerator\.device: gpu: no such device"):
        LocalGenerator(str(tiny_gpt2), device="gpu")
    with pytest.raises(UserError, match=r"ClassifierReward\.device: cuda:7: there is no such device here"):
        ClassifierReward("nowhere", device="cuda:7")(["a"], ["b"])
