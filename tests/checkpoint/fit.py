"""A real, short fit of the real module: dropout in its loss, a schedule, and callbacks with a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from tests.module.records import History, Records, preferences
from trainer.checkpoint import PortableCheckpointIO
from trainer.data.datamodule import PreferenceData
from trainer.module import PreferenceModule
from trainer.optimization import OptimizerConfig, ScheduleConfig
from trainer.policy.load import AdapterConfig, PolicyConfig
from trainer.policy.reference import ReferenceConfig

BATCHES, EPOCHS = 3, 4


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
) -> tuple[PreferenceModule, L.Trainer, History]:
    """Train to the end, saving under `folder/checkpoints`, from the beginning or from a checkpoint."""
    L.seed_everything(seed, verbose=False)
    module = PreferenceModule(
        PolicyConfig(str(base), adapter),
        reference=ReferenceConfig("sharded" if adapter is None else "shared"),
        optimizer=OptimizerConfig(lr=0.01),
        schedule=ScheduleConfig(name="cosine", warmup_steps=2),
    )
    records = Records(preferences(2 * BATCHES, longest=8))
    records.prompt_template = "{text}"
    history = History()
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[PortableCheckpointIO()],
        callbacks=[history, EarlyStopping("train/loss", patience=100), Saver(folder / "checkpoints")],
    )
    data = PreferenceData(records, batch_size=2)
    trainer.fit(module, data, ckpt_path=str(resume) if resume else None)
    return module, trainer, history
