"""RunManifest: what it writes at the start and at each kind of end; a reference that moved is found."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.run_manifest import RunManifest
from callbacks.throughput import Throughput
from tests.callbacks.real import run
from tests.callbacks.tiny import FolderIO, TinyModule, fit, trainer
from trainer.checkpoint import verify
from trainer.module import PreferenceModule
from trainer.schema import UserError


def manifest(root: Path) -> dict:
    return json.loads((root / "manifest.json").read_text(encoding="utf-8"))


class Look(L.Callback):
    """Reads the manifest while the run goes on, or does something at a step."""

    def __init__(self, step: int, action) -> None:  # type: ignore[no-untyped-def]
        self.step, self.action = step, action

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.step:
            self.action(pl_module)


def test_running_then_finished(tmp_path: Path, tiny_llama: Path) -> None:
    seen: list[dict] = []
    look = Look(1, lambda _: seen.append(manifest(tmp_path)))
    saver = ImprovedLossCheckpoint(save_steps=4)
    done = run(tmp_path, tiny_llama, RunManifest(), look, Throughput(), saver)
    assert seen[0]["status"] == "running"
    assert seen[0]["ended"] is None
    found = manifest(tmp_path)
    assert (found["status"], found["step"], found["epoch"], found["error"]) == ("finished", 8, 2, None)
    assert found["model"] == done.module.describe()
    assert found["data"] == done.trainer.datamodule.describe()
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(found["code"]) == 64
    assert found["callbacks"]["ImprovedLossCheckpoint"]["best_checkpoint"] == "step-00000008"
    assert found["callbacks"]["Throughput"]["pairs"] == 16
    assert 0 < found["seconds"] <= found["seconds_total"]


def test_reference_is_fingerprinted_before_and_after(tmp_path: Path, tiny_llama: Path) -> None:
    done = run(tmp_path, tiny_llama, RunManifest(), max_steps=3)
    reference = manifest(tmp_path)["reference"]
    assert reference["before"] == reference["after"] == done.module.reference.fingerprint()
    assert len(reference["before"]) == 64


def test_a_module_without_reference(tmp_path: Path) -> None:
    fit(trainer(tmp_path, RunManifest()), TinyModule(), [1.0])
    assert manifest(tmp_path)["reference"] == {"before": None, "after": None}


def test_a_reference_that_moved_is_an_error(tmp_path: Path, tiny_llama: Path) -> None:
    def move(module: PreferenceModule) -> None:
        with torch.no_grad():
            next(p for p in module.policy.parameters() if not p.requires_grad).add_(1e-3)

    with pytest.raises(UserError, match="the reference moved during training"):
        run(tmp_path, tiny_llama, RunManifest(), Look(2, move), max_steps=3)
    found = manifest(tmp_path)
    assert found["status"] == "failed"
    assert found["reference"]["before"] != found["reference"]["after"]


def test_a_resumed_run_lists_its_attempts_and_adds_their_time(tmp_path: Path, tiny_llama: Path) -> None:
    def attempt(resume: Path | None, *callbacks: L.Callback) -> None:
        saver = ImprovedLossCheckpoint(save_steps=1, keep=-1)
        run(tmp_path, tiny_llama, RunManifest(), saver, *callbacks, resume=resume)

    def fail(_: L.LightningModule) -> None:
        raise RuntimeError("the machine\ncaught fire")

    with pytest.raises(RuntimeError):
        attempt(None, Look(3, fail))
    assert (manifest(tmp_path)["status"], manifest(tmp_path)["error"]) == (
        "failed",
        "RuntimeError: the machine",
    )
    attempt(tmp_path / "checkpoints" / "last")
    found = manifest(tmp_path)
    assert (found["status"], found["from_step"], found["step"]) == ("finished", 2, 8)
    assert [(a["status"], a["step"]) for a in found["attempts"]] == [("failed", 3)]
    assert found["seconds_total"] > found["seconds"]


def test_another_reference_than_before_the_resume_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    state = RunManifest()
    state.load_state_dict(json.loads(json.dumps({"reference": "0" * 64, "world_size": 1, "seconds": 2.0})))
    with pytest.raises(UserError, match="resumed with another reference"):
        run(tmp_path, tiny_llama, state, max_steps=1)


def test_what_fails_before_training_leaves_a_finished_runs_manifest(tmp_path: Path) -> None:
    fit(trainer(tmp_path, RunManifest()), TinyModule(), [1.0])
    before = manifest(tmp_path)
    with pytest.raises(UserError):
        fit(trainer(tmp_path, RunManifest(), Throughput(0)), TinyModule(), [1.0])
    assert manifest(tmp_path) == before


def test_full_disk_is_written_down(tmp_path: Path) -> None:
    runner = trainer(tmp_path, RunManifest(), ImprovedLossCheckpoint(save_steps=1), io=FolderIO(full=1))
    with pytest.raises(UserError):
        fit(runner, TinyModule(), [3.0, 2.0, 1.0])
    found = manifest(tmp_path)
    assert found["status"] == "failed"
    assert "No space left on device" in found["error"]
    assert found["callbacks"]["ImprovedLossCheckpoint"]["best_checkpoint"] == "step-00000001"


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, SystemExit), (signal.SIGTERM, SIGTERMException)]
)
def test_a_real_signal_is_an_interruption(
    tmp_path: Path, tiny_llama: Path, number: int, raised: type[BaseException]
) -> None:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    saver, stop = ImprovedLossCheckpoint(save_steps=1), Look(2, lambda _: os.kill(os.getpid(), number))
    try:
        with pytest.raises(raised):
            run(tmp_path, tiny_llama, RunManifest(), saver, stop)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    found = manifest(tmp_path)
    assert found["status"] == "interrupted"
    assert found["step"] == 2
    assert found["ended"]
    assert verify(tmp_path / "checkpoints" / "step-00000001")


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: is a folder"):
        fit(trainer(tmp_path, RunManifest()), TinyModule(), [1.0])
