"""A run that is cut short and resumed is the run that was not: equal to the bit, mid-epoch, more than once."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path

import lightning as L
import pytest
import torch

from tests.module.records import History, Records, demonstrations, fit, preferences
from tests.tiny_models import make
from trainer.checkpoint import PortableCheckpointIO
from trainer.data.datamodule import PreferenceData, SupervisedData
from trainer.module import PreferenceModule, SupervisedModule
from trainer.optimization import OptimizerConfig, ScheduleConfig
from trainer.policy.load import AdapterConfig, PolicyConfig
from trainer.policy.reference import ReferenceConfig
from trainer.schema import UserError

SCHEDULE = ScheduleConfig(name="cosine", warmup_ratio=0.1)


class SaveAt(L.Callback):
    """Saves after the given optimizer steps, and stops the run after the last of them where asked."""

    def __init__(self, folder: Path, steps: set[int], stop: bool = False) -> None:
        self.folder, self.steps, self.stop = folder, steps, stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch.share.last and trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}")
            if self.stop and trainer.global_step == max(self.steps):
                raise _Cut


class _Cut(Exception):
    pass


def build(base: Path, task: str, optimizer: str):
    policy = PolicyConfig(
        str(base), adapter=None if task == "all" else AdapterConfig(kind="lora", r=4, dropout=0.1)
    )
    config = OptimizerConfig(name=optimizer, lr=1e-2)
    if task == "sft":
        return (
            SupervisedModule(policy, config, SCHEDULE),
            SupervisedData(Records(demonstrations(22), demonstrations(4, seed=1)), batch_size=4),
        )
    reference = ReferenceConfig(kind="sharded" if task == "all" else "shared")
    module = PreferenceModule(policy, reference=reference, optimizer=config, schedule=SCHEDULE)
    return module, PreferenceData(Records(preferences(22), preferences(4, seed=1)), batch_size=4)


def train(base: Path, folder: Path, task: str, optimizer: str, callbacks: list, resume: Path | None = None):
    L.seed_everything(7, verbose=False)
    history = History()
    module, data = build(base, task, optimizer)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        max_epochs=3,
        accumulate_grad_batches=2,
        callbacks=[history, *callbacks],
        plugins=[PortableCheckpointIO()],
    )
    with contextlib.suppress(_Cut):
        trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    return history, {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("task", "optimizer"),
    [("dpo", "adamw"), ("dpo", "rmsprop"), ("dpo", "adafactor"), ("sft", "adamw"), ("all", "sgd")],
)
def test_resumed_equals_uninterrupted_to_the_bit(tiny_llama, tmp_path, task, optimizer) -> None:
    """Cut in the middle of an epoch (step 4 of 6), again in it (5), at an epoch's end (12), and after that (15)."""
    whole, weights = train(tiny_llama, tmp_path, task, optimizer, [])
    assert len(whole.losses) == 18
    losses: list[float] = []
    resume = None
    for cut in (4, 5, 12, 15):
        part, _ = train(tiny_llama, tmp_path, task, optimizer, [SaveAt(tmp_path, {cut}, stop=True)], resume)
        losses += part.losses
        resume = tmp_path / f"step-{cut:08d}"
    part, resumed = train(tiny_llama, tmp_path, task, optimizer, [], resume)
    assert losses + part.losses == whole.losses
    for name in weights:
        assert torch.equal(weights[name], resumed[name]), name


OTHER = {
    "number of training examples was 22 and is 30": {"records": preferences(30)},
    "SHA-256 of the training examples": {
        "records": [dataclasses.replace(p, id="other") for p in preferences(22)]
    },
    "batch_size was 4 and is 2": {"batch_size": 2},
    "seed was 0 and is 1": {"seed": 1},
    "trained on .*llama.* not on .*other": {"base": "other"},
}


@pytest.mark.parametrize("message", OTHER)
def test_resume_with_something_else_is_refused(tiny_llama, tmp_path, message) -> None:
    train(tiny_llama, tmp_path, "dpo", "adamw", [SaveAt(tmp_path, {4}, stop=True)])
    other = OTHER[message]
    base = make("llama", tmp_path / "other", seed=5) if "base" in other else tiny_llama
    module, _ = build(base, "dpo", "adamw")
    data = PreferenceData(
        Records(other.get("records", preferences(22))),
        batch_size=other.get("batch_size", 4),
        seed=other.get("seed", 0),
    )
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=3, plugins=[PortableCheckpointIO()],
        accumulate_grad_batches=2, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        trainer.fit(module, data, ckpt_path=str(tmp_path / "step-00000004"))


def test_saving_changes_nothing(tiny_llama, tmp_path) -> None:
    plain, _ = train(tiny_llama, tmp_path, "dpo", "adamw", [])
    saved, _ = train(tiny_llama, tmp_path, "dpo", "adamw", [SaveAt(tmp_path, set(range(1, 18)))])
    assert plain.losses == saved.losses


def test_start_from_a_checkpoint_is_where_it_was(tiny_llama, tmp_path) -> None:
    """As `policy.start`, a checkpoint gives its adapter; the reference is that adapter, so the loss is ln 2 again."""
    train(tiny_llama, tmp_path, "dpo", "adamw", [SaveAt(tmp_path, {18})])
    adapter = AdapterConfig(kind="lora", r=4, dropout=0.0)
    config = PolicyConfig(str(tiny_llama), adapter, start=str(tmp_path / "step-00000018"))
    module = PreferenceModule(config)
    first = fit(module, PreferenceData(Records(preferences(8))), tmp_path, max_steps=1).steps[0]
    assert first["rewards/margins"] == 0
    assert first["loss"] == pytest.approx(math.log(2))
