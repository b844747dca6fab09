"""The device that a setting names."""

from __future__ import annotations

import torch

from trainer.schema import UserError


def check_device(name: str | None, setting: str) -> None:
    """Raises `UserError` for what is no device's name, on any machine."""
    try:
        torch.device(name or "cpu")
    except RuntimeError as error:
        raise UserError(f"{setting} {name}: no such device; give cpu, cuda or cuda:1") from error


def device_named(name: str | None, setting: str = "--device") -> torch.device:
    """The device of this name; without one cuda, where there is one. Raises `UserError` for one that is not here."""
    check_device(name, setting)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{setting} {name}: there is no CUDA device here; give cpu")
    return device
