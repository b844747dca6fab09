"""The device that a setting names."""

from __future__ import annotations

import torch

from trainer.schema import UserError

_ELSEWHERE = ("mps", "xpu", "hpu", "npu", "mlu", "musa", "mtia")
"""What other machines have; torch knows many names more, which no model runs on."""


def check_device(name: str | None, setting: str) -> None:
    """Raises `UserError` for what is no device's name, on any machine."""
    try:
        kind = torch.device("cpu" if name is None else name).type
    except RuntimeError as error:
        raise UserError(f"{setting} {name}: no such device; give cpu, cuda or cuda:1") from error
    if kind not in ("cpu", "cuda", *_ELSEWHERE):
        raise UserError(f"{setting} {name}: models do not run there; give cpu, cuda or cuda:1")


def device_named(name: str | None, setting: str = "--device") -> torch.device:
    """The device of this name; without one cuda, where there is one. Raises `UserError` for one that is not here."""
    check_device(name, setting)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        _check_cuda(device, f"{setting} {name}")
    elif device.type != "cpu":
        _check_elsewhere(device, f"{setting} {name}")
    return device


def _check_cuda(device: torch.device, given: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"{given}: there is no CUDA device here; give cpu")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        known = "cuda:0 is the only one" if count == 1 else f"there are cuda:0 to cuda:{count - 1}"
        raise UserError(f"{given}: there is no such device here; {known}")


def _check_elsewhere(device: torch.device, given: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{given}: there is no such device here; give cpu, cuda or cuda:1") from error
