"""Runs of PreferenceModule on PreferenceData with portable checkpoints, for the tests of the callbacks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from trainer.checkpoint import PortableCheckpointIO
from trainer.data.datamodule import PreferenceData
from trainer.data.homoglyphs import INSTRUCTION, substitute
from trainer.data.sources import Loaded
from trainer.module import PreferenceModule
from trainer.optimization import OptimizerConfig
from trainer.policy.load import PolicyConfig
from trainer.schema import Preference, Split

TEXTS = ["so cold", "you go", "с горы", "cosy", "око", "soon", "рука", "cry", "cook", "сок", "yes", "no cow"]


class Pairs:
    """Eight pairs to train on (four steps of two), four to validate on."""

    prompt_template = INSTRUCTION

    def load(self, split: Split) -> Loaded:
        texts = TEXTS[:8] if split == "train" else TEXTS[8:]
        made = [Preference(INSTRUCTION.format(text=text), substitute(text), text, id=text) for text in texts]
        return Loaded(made, {"kept": len(made)}, {})

    def describe(self) -> dict[str, Any]:
        return {"texts": len(TEXTS)}


class Seen(L.Callback):
    """Each optimizer step's metrics, and each validation's loss with the step that it came after."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.validations: dict[int, float] = {}

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if args[1].share.last:
            self.steps.append(dict(pl_module.step_metrics))  # type: ignore[arg-type]

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validations[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


@dataclasses.dataclass
class Run:
    root: Path
    module: PreferenceModule
    trainer: L.Trainer
    seen: Seen

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.seen.steps]

    def callback(self, kind: type) -> Any:
        return next(each for each in self.trainer.callbacks if isinstance(each, kind))  # type: ignore[attr-defined]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.module.policy.named_parameters() if p.requires_grad}

    def saved(self, name: str) -> dict[str, torch.Tensor]:
        """The trained weights of a checkpoint, by the policy's names."""
        state = PortableCheckpointIO().load_checkpoint(self.root / "checkpoints" / name)["state_dict"]
        return {name.removeprefix("policy."): tensor for name, tensor in state.items()}

    @property
    def folders(self) -> set[str]:
        found = (self.root / "checkpoints").iterdir()
        return {path.name for path in found if path.is_dir() and not path.is_symlink()}

    def pointed(self, name: str) -> str:
        link = self.root / "checkpoints" / name
        assert link.is_symlink()
        return link.resolve().name


def run(
    root: Path,
    base: Path,
    *callbacks: L.Callback,
    lr: float = 0.05,
    resume: Path | None = None,
    **settings: Any,
) -> Run:
    """Train quietly on one CPU device, two epochs unless told otherwise; the same numbers each time."""
    torch.manual_seed(1)
    seen = Seen()
    defaults: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        callbacks=[seen, *callbacks],
        plugins=[PortableCheckpointIO()],
        **(defaults | settings),
    )
    module = PreferenceModule(PolicyConfig(base=str(base)), optimizer=OptimizerConfig(lr=lr))
    data = PreferenceData(Pairs(), batch_size=2)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return Run(root, module, trainer, seen)
