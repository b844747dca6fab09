"""A tiny LightningModule with what the callbacks read, its metrics dictated by its data, and its Trainer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader
from typing_extensions import override

from trainer.schema import StepShare


@dataclasses.dataclass
class Rows:
    tokens: int


@dataclasses.dataclass
class Batch:
    """One micro-batch; `value` is what the module reports as this micro-batch's loss."""

    value: float
    rows: Rows
    pairs: int
    ids: list[str]
    share: StepShare


def batches(values: list[float], accumulate: int = 1) -> list[Batch]:
    return [
        Batch(value, Rows(tokens=10), 2, [f"a{i}", f"b{i}"], StepShare(0.5, 0.0, (i + 1) % accumulate == 0))
        for i, value in enumerate(values)
    ]


class Loader(DataLoader):
    """A loader of given micro-batches that resumes where it was, as tandem's own does."""

    def __init__(self, data: list[Batch]) -> None:
        super().__init__(data, batch_size=None, collate_fn=lambda batch: batch)
        self.start, self.module = 0, None

    def __iter__(self):
        start, self.start = self.start, 0
        return iter(self.dataset[start:])

    def state_dict(self) -> dict[str, int]:
        taken = self.module.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"start": taken % len(self.dataset)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]


class TinyModule(L.LightningModule):
    """A linear model that learns, while its metrics are the batches' own values.

    `validation` are the values of `val/loss`, one for each validation.
    """

    def __init__(self, validation: list[float] | None = None, noise: bool = False) -> None:
        super().__init__()
        self.policy = torch.nn.Linear(4, 1)
        torch.nn.init.ones_(self.policy.weight)
        torch.nn.init.zeros_(self.policy.bias)
        self.validation, self.noise = validation, noise
        self.validations = 0
        self.step_metrics: dict[str, float] = {}
        self.skipped_steps = 0
        self.values: list[float] = []
        self.losses: list[float] = []
        self.seen: list[float] = []

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        x = torch.rand(8, 4) if self.noise else torch.ones(8, 4)
        loss = (self.policy(x) ** 2).mean()
        self.losses.append(loss.item())
        self.values.append(batch.value)
        self.seen.append(batch.value)
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        mean = sum(self.values) / len(self.values)
        self.values = []
        if mean != mean:
            self.skipped_steps += 1
            for parameter in self.parameters():
                parameter.grad = None
        self.step_metrics = {"loss": mean, "logps/chosen": -10 * mean}
        self.log("train/loss", mean, batch_size=1)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    @override
    def on_validation_epoch_end(self) -> None:
        if self.validation is None:
            return
        index = 0 if self.trainer.sanity_checking else self.validations
        self.log("val/loss", self.validation[index], batch_size=1)
        self.validations += not self.trainer.sanity_checking

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["validations"] = self.validations

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validations = checkpoint["validations"]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def describe(self) -> dict[str, Any]:
        return {"module": "TinyModule", "parameters": {"trained": 5, "total": 5}}


class FolderIO(TorchCheckpointIO):
    """Lightning's own checkpoint file inside a folder; after `full` saves the disk is full."""

    def __init__(self, full: int | None = None) -> None:
        super().__init__()
        self.full, self.saves = full, 0

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saves += 1
        if self.full is not None and self.saves > self.full:
            with open("/dev/full", "w") as stream:
                stream.write("a disk without room")
        shutil.rmtree(path, ignore_errors=True)
        super().save_checkpoint(checkpoint, Path(path) / "checkpoint.pt", storage_options)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return torch.load(Path(path) / "checkpoint.pt", weights_only=True)


def trainer(root: Path, *callbacks: L.Callback, io: FolderIO | None = None, **settings: Any) -> L.Trainer:
    """A quiet Trainer on one CPU device."""
    defaults: dict[str, Any] = {
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 1,
    }
    return L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        callbacks=list(callbacks),
        plugins=[io or FolderIO()],
        **(defaults | settings),
    )


def fit(
    runner: L.Trainer,
    module: TinyModule,
    values: list[float],
    *,
    validate: bool = False,
    resume: Path | None = None,
) -> TinyModule:
    """Train on these micro-batches; `validate` gives the run a validation loader."""
    loader = Loader(batches(values, runner.accumulate_grad_batches))
    loader.module = module
    validation = DataLoader(batches([0.0]), batch_size=None, collate_fn=lambda b: b) if validate else None
    torch.manual_seed(0)
    runner.fit(module, loader, validation, ckpt_path=str(resume) if resume else None, weights_only=True)
    return module
