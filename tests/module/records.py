"""A source of records held in memory, and a short fit, for the tests of the modules."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import torch

from trainer.data.sources import Loaded
from trainer.policy.sharded import is_sharded
from trainer.policy.state import trained_state
from trainer.schema import Demonstration, Preference, Split


class Records:
    """The given records as the training split; as validation too where asked."""

    prompt_template = None

    def __init__(self, records: list[Any], validation: list[Any] | None = None) -> None:
        self.splits = {"train": records, "validation": validation or [], "test": []}

    def describe(self) -> dict[str, Any]:
        return {"records": {split: len(records) for split, records in self.splits.items()}}

    def load(self, split: Split) -> Loaded:
        return Loaded(records=self.splits[split], counts={"kept": len(self.splits[split])}, hashes={})


def words(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice("abcdefg ") for _ in range(rng.randint(1, longest)))


def preferences(count: int, seed: int = 0, longest: int = 24) -> list[Preference]:
    """Random pairs of unequal lengths."""
    rng = random.Random(seed)
    return [
        Preference(
            "Q" + words(rng, longest),
            "A" + words(rng, longest),
            "B" + words(rng, longest),
            str(i),
            f"row {i}",
        )
        for i in range(count)
    ]


def demonstrations(count: int, seed: int = 0, longest: int = 24) -> list[Demonstration]:
    """Random demonstrations of unequal lengths."""
    return [Demonstration(p.prompt, p.chosen, p.id, p.origin) for p in preferences(count, seed, longest)]


class History(L.Callback):
    """Keeps each optimizer step's metrics, the gradients before they are clipped, and what was trained in the end."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.gradients: list[dict[str, Any]] = []
        self.trained: dict[str, list[float]] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if pl_module._taken[-1][1].share.last:
            named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
            gradients = {name: whole_gradient(parameter) for name, parameter in named}
            self.gradients.append(
                {name: gradient for name, gradient in gradients.items() if gradient is not None}
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch.share.last:
            self.steps.append(dict(pl_module.step_metrics))

    def on_train_end(self, trainer, pl_module) -> None:
        self.trained = {
            name: tensor.flatten().tolist() for name, tensor in trained_state(pl_module.policy).items()
        }

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]


def whole_gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    if is_sharded(parameter):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).detach().clone()
    return None if parameter.grad is None else parameter.grad.detach().clone()


def fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    folder: Path,
    resume: str | None = None,
    **settings: Any,
) -> History:
    """Train quietly, on one CPU device unless told otherwise; returns what happened."""
    history = History()
    settings = {
        "accelerator": "cpu",
        "max_steps": 5,
        "callbacks": [],
        "enable_checkpointing": False,
        **settings,
    }
    L.Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **{**settings, "callbacks": [history, *settings["callbacks"]]},
    ).fit(module, data, ckpt_path=resume)
    return history
