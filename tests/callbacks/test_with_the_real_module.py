"""All callbacks together on PreferenceModule and PreferenceData, with portable checkpoints."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typing_extensions import override

from callbacks.alarms import Alarms
from callbacks.early_stopping import EarlyStopping
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.run_manifest import RunManifest
from callbacks.sample_generation import SampleGeneration
from callbacks.throughput import Throughput
from trainer.checkpoint import PortableCheckpointIO
from trainer.data.datamodule import PreferenceData
from trainer.data.homoglyphs import INSTRUCTION, substitute
from trainer.data.sources import Loaded
from trainer.generation import Sampling
from trainer.module import PreferenceModule
from trainer.optimization import OptimizerConfig
from trainer.policy.load import PolicyConfig
from trainer.schema import Preference, Split, UserError

TEXTS = ["so cold", "you go", "с горы", "cosy", "око", "soon", "рука", "cry", "cook", "сок", "yes", "no cow"]


@dataclasses.dataclass
class Pairs:
    """Eight pairs to train on (four steps of two), four to validate on."""

    prompt_template: str | None = INSTRUCTION

    def load(self, split: Split) -> Loaded:
        texts = TEXTS[:8] if split == "train" else TEXTS[8:]
        made = [Preference(INSTRUCTION.format(text=text), substitute(text), text, id=text) for text in texts]
        return Loaded(made, {"kept": len(made)}, {})


class Losses(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args) -> None:  # type: ignore[no-untyped-def]
        self.steps.append(dict(pl_module.step_metrics))  # type: ignore[arg-type]


def run(root: Path, base: Path, *extra: L.Callback, samples: bool = True, resume: Path | None = None):  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    losses = Losses()
    callbacks = [
        RunManifest(),
        losses,
        Throughput(every_n_steps=2),
        *([SampleGeneration(["so cold"], 2, Sampling(max_new_tokens=4, do_sample=True))] if samples else []),
        Alarms(every_n_steps=2),
        EarlyStopping(patience=9, restore_best=True),
        ImprovedLossCheckpoint(monitor="val/loss", keep=-1, save_steps=1),
        *extra,
    ]
    runner = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        plugins=[PortableCheckpointIO()],
        logger=TensorBoardLogger(root, name="", version=""),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        val_check_interval=2,
    )
    module = PreferenceModule(PolicyConfig(base=str(base)), optimizer=OptimizerConfig(lr=0.05))
    data = PreferenceData(Pairs(), batch_size=2)
    runner.fit(module, data, ckpt_path=str(resume) if resume else None, weights_only=True if resume else None)
    return module, runner, losses.steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("whole")
    return root, *run(root, tiny_llama)


def test_manifest_samples_and_best_weights(whole, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    root, module, runner, steps = whole
    assert runner.global_step == 8
    assert len(steps) == 8
    found = json.loads((root / "manifest.json").read_text())
    assert found["status"] == "finished"
    assert found["data"]["prompt_template"] == INSTRUCTION
    assert found["reference"]["before"] == found["reference"]["after"] is not None
    assert found["callbacks"]["Throughput"]["pairs"] == 16
    assert found["model"]["parameters"]["trained"] > 0
    lines = [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert lines[0]["policy"] == lines[0]["reference"] == lines[-1]["reference"]
    # restore_best: the module holds what lies in checkpoints/best, and plain PEFT loads that.
    best = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), root / "checkpoints" / "best"
    )
    wanted = {name: p for name, p in best.named_parameters() if "ia3" in name}
    held = {name: p for name, p in module.policy.named_parameters() if name in wanted}
    assert wanted
    assert all(torch.equal(wanted[name], held[name]) for name in wanted)


def test_samples_do_not_change_training(whole, tmp_path: Path, tiny_llama: Path) -> None:  # type: ignore[no-untyped-def]
    assert run(tmp_path, tiny_llama, samples=False)[2] == whole[3]


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_resume_equals_the_undisturbed_run(whole, tmp_path: Path, tiny_llama: Path, step: int) -> None:  # type: ignore[no-untyped-def]
    root, _, first, steps = whole
    _, second, rest = run(tmp_path, tiny_llama, resume=root / "checkpoints" / f"step-{step:08d}")
    assert rest == steps[step:]
    for name in (EarlyStopping, ImprovedLossCheckpoint, SampleGeneration, Alarms):
        states = [
            next(callback for callback in runner.callbacks if isinstance(callback, name)).state_dict()
            for runner in (first, second)
        ]
        assert states[0] == states[1]


def test_a_disk_that_refuses(tmp_path: Path, tiny_llama: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(L.Callback):
        """From step 3 on no file may grow beyond 100 bytes: the kernel refuses, as a full disk does."""

        @override
        def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:  # type: ignore[no-untyped-def]
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

        @override
        def on_exception(self, *args) -> None:  # type: ignore[no-untyped-def]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        with pytest.raises(UserError, match=r"step-00000003: could not be saved: .*File too large") as error:
            run(tmp_path, tiny_llama, Full(), samples=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-00000002" in str(error.value)
    assert "\n" not in str(error.value)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000002", "best", "last"}
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000002"
    _, runner, _ = run(tmp_path, tiny_llama, samples=False, resume=tmp_path / "checkpoints" / "last")
    assert runner.global_step == 8
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["from_step"] == 2
