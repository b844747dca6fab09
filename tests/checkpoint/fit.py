"""A real, short fit: a tiny policy, noise in its loss, a schedule, callbacks and a datamodule with state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from trainer.checkpoint import (
    PortableCheckpointIO,
    describe_for_checkpoint,
    load_trained_state,
    set_rng_state,
    trained_state,
)
from trainer.policy.load import AdapterConfig, PolicyConfig, load_policy

BATCHES, EPOCHS = 3, 4


class Module(L.LightningModule):
    """Its loss has noise in it, so that a generator which is not put back is seen."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config, self.policy = config, load_policy(config)
        self.strict_loading = False
        self.losses: list[float] = []
        self.restored: dict[str, Any] | None = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        noise = torch.rand(()) + 0.5
        loss = noise * self.policy(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, 2, BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_state(self.policy)
        checkpoint["tandem"] = {
            **describe_for_checkpoint(self.policy, self.config),
            "prompt_template": "{text}",
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint["rng"][0]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
        load_trained_state(self.policy, state_dict)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.restored is not None:
            set_rng_state(self.restored)
            self.restored = None


class Data(L.LightningDataModule):
    """Batches of ids in a fixed order; how many were used is its state."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0

    def train_dataloader(self) -> DataLoader:
        ids = torch.arange(BATCHES * 2 * 8).view(BATCHES * 2, 8) * 5 % 200 + 3
        # A generator of its own: a new iterator draws a seed, which must not come from the global one.
        return DataLoader(ids, batch_size=2, generator=torch.Generator())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.used += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.used = state["used"]


class Saver(Checkpoint):
    """Saves at the end of each epoch, and has a state with everything that JSON lacks.

    Lightning runs `Checkpoint`s last: after EarlyStopping, whose state is saved here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, {"nan": float("nan"), 3: (1, 2), "scores": torch.ones(2).bfloat16()}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}")

    def state_dict(self) -> dict[Any, Any]:
        return self.state

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.state = state


def fit(
    base: Path,
    folder: Path,
    adapter: AdapterConfig | None = AdapterConfig(),
    resume: Path | None = None,
    seed: int = 0,
) -> tuple[Module, L.Trainer]:
    """Train to the end, saving under `folder/checkpoints`, from the beginning or from a checkpoint."""
    L.seed_everything(seed)
    module = Module(PolicyConfig(str(base), adapter))
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[PortableCheckpointIO()],
        callbacks=[EarlyStopping("train/loss", patience=100), Saver(folder / "checkpoints")],
    )
    trainer.fit(module, Data(), ckpt_path=str(resume) if resume else None)
    return module, trainer
