"""All callbacks together on PreferenceModule and PreferenceData, with portable checkpoints."""

from __future__ import annotations

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
from tests.callbacks.real import Run, run
from trainer.data.homoglyphs import INSTRUCTION
from trainer.data.tokenize import tokenize_prompt
from trainer.generation import Sampling, generate
from trainer.schema import UserError


def whole_run(
    root: Path, base: Path, *extra: L.Callback, samples: bool = True, resume: Path | None = None
) -> Run:
    callbacks = [
        RunManifest(),
        Throughput(every_n_steps=2),
        Alarms(every_n_steps=2),
        # Before SampleGeneration, as a configuration's callbacks stand; its last samples must not change.
        EarlyStopping(mode="max", patience=9, restore_best=True),
        *([SampleGeneration(["so cold"], 2, Sampling(max_new_tokens=12, do_sample=True))] if samples else []),
        ImprovedLossCheckpoint(monitor="val/loss", mode="max", keep=-1, save_steps=1),
        *extra,
    ]
    logger = TensorBoardLogger(root, name="", version="")
    return run(root, base, *callbacks, lr=0.2, resume=resume, logger=logger, val_check_interval=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Run:
    return whole_run(tmp_path_factory.mktemp("whole"), tiny_llama)


def samples_of(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()]


def test_manifest_and_samples(whole: Run) -> None:
    assert whole.trainer.global_step == len(whole.seen.steps) == 8
    found = json.loads((whole.root / "manifest.json").read_text())
    assert found["status"] == "finished"
    assert found["data"]["prompt_template"] == INSTRUCTION
    assert found["reference"]["before"] == found["reference"]["after"] is not None
    assert found["callbacks"]["Throughput"]["pairs"] == 16
    assert found["model"]["parameters"]["trained"] > 0
    lines = samples_of(whole.root)
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert lines[0]["policy"] == lines[0]["reference"] == lines[-1]["reference"]


def test_the_module_ends_with_the_best_weights(whole: Run, tiny_llama: Path) -> None:
    """The module holds what lies in checkpoints/best, and plain PEFT loads that."""
    assert (whole.pointed("best"), whole.pointed("last")) == ("step-00000002", "step-00000008")
    best = peft_model(whole, tiny_llama, "best")
    wanted = {name: p for name, p in best.named_parameters() if "ia3" in name}
    held = {name: p for name, p in whole.module.policy.named_parameters() if name in wanted}
    assert wanted
    assert all(torch.equal(wanted[name], held[name]) for name in wanted)


def test_the_last_samples_are_of_the_last_steps_weights(whole: Run, tiny_llama: Path) -> None:
    tokenizer, sampling = whole.module.tokenizer, Sampling(max_new_tokens=12, do_sample=True)
    prompt = tokenize_prompt(INSTRUCTION.format(text="so cold"), tokenizer)
    answers = {
        name: generate(peft_model(whole, tiny_llama, name), tokenizer, [prompt], sampling, keys=["so cold"])
        for name in ("best", "last")
    }
    # Otherwise this shows nothing.
    assert answers["best"][0].text != answers["last"][0].text
    assert samples_of(whole.root)[-1]["policy"] == answers["last"][0].text


def peft_model(done: Run, base: Path, name: str) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, done.root / "checkpoints" / name)


def test_samples_do_not_change_training(whole: Run, tmp_path: Path, tiny_llama: Path) -> None:
    assert whole_run(tmp_path, tiny_llama, samples=False).seen.steps == whole.seen.steps


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_resume_equals_the_undisturbed_run(whole: Run, tmp_path: Path, tiny_llama: Path, step: int) -> None:
    again = whole_run(tmp_path, tiny_llama, resume=whole.root / "checkpoints" / f"step-{step:08d}")
    assert again.seen.steps == whole.seen.steps[step:]
    for kind in (EarlyStopping, ImprovedLossCheckpoint, SampleGeneration, Alarms):
        assert again.callback(kind).state_dict() == whole.callback(kind).state_dict()


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
            whole_run(tmp_path, tiny_llama, Full(), samples=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-00000002" in str(error.value)
    assert "\n" not in str(error.value)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000001", "step-00000002", "best", "last"}
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000002"
    again = whole_run(tmp_path, tiny_llama, samples=False, resume=tmp_path / "checkpoints" / "last")
    assert again.trainer.global_step == 8
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["from_step"] == 2
