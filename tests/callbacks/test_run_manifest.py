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
from tests.callbacks.language import LanguageModule
from tests.callbacks.tiny import FolderIO, TinyModule, fit, trainer
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


def test_running_then_finished(tmp_path: Path) -> None:
    seen: list[dict] = []
    look = Look(1, lambda _: seen.append(manifest(tmp_path)))
    fit(
        trainer(tmp_path, RunManifest(), look, Throughput(), ImprovedLossCheckpoint(save_steps=1)),
        TinyModule(),
        [1.0] * 3,
    )
    assert seen[0]["status"] == "running"
    assert seen[0]["ended"] is None
    found = manifest(tmp_path)
    assert (found["status"], found["step"], found["epoch"], found["error"]) == ("finished", 3, 1, None)
    assert found["model"] == {"module": "TinyModule", "parameters": {"trained": 5, "total": 5}}
    assert found["versions"]["torch"] == torch.__version__
    assert len(found["code"]) == 64
    assert found["callbacks"]["ImprovedLossCheckpoint"]["best_checkpoint"] == "step-00000001"
    assert found["callbacks"]["Throughput"]["pairs"] == 6
    assert 0 < found["seconds"] <= found["seconds_total"]
    assert found["reference"] == {"before": None, "after": None}


def test_reference_is_fingerprinted_before_and_after(tmp_path: Path, tiny_llama: Path) -> None:
    fit(trainer(tmp_path, RunManifest()), LanguageModule(tiny_llama), [1.0] * 3)
    reference = manifest(tmp_path)["reference"]
    assert reference["before"] == reference["after"]
    assert len(reference["before"]) == 64


def test_a_reference_that_moved_is_an_error(tmp_path: Path, tiny_llama: Path) -> None:
    def move(module: LanguageModule) -> None:
        with torch.no_grad():
            next(p for p in module.policy.parameters() if not p.requires_grad).add_(1e-3)

    with pytest.raises(UserError, match="the reference moved during training"):
        fit(trainer(tmp_path, RunManifest(), Look(2, move)), LanguageModule(tiny_llama), [1.0] * 3)
    found = manifest(tmp_path)
    assert found["status"] == "failed"
    assert found["reference"]["before"] != found["reference"]["after"]


def test_a_resumed_run_lists_its_attempts_and_adds_their_time(tmp_path: Path, tiny_llama: Path) -> None:
    def run(resume: Path | None, base: Path, *callbacks: L.Callback) -> None:
        saver = ImprovedLossCheckpoint(save_steps=1, keep=-1)
        fit(
            trainer(tmp_path, RunManifest(), saver, *callbacks),
            LanguageModule(base),
            [1.0] * 4,
            resume=resume,
        )

    def fail(_: L.LightningModule) -> None:
        raise RuntimeError("the machine\ncaught fire")

    with pytest.raises(RuntimeError):
        run(None, tiny_llama, Look(3, fail))
    assert (manifest(tmp_path)["status"], manifest(tmp_path)["error"]) == (
        "failed",
        "RuntimeError: the machine",
    )
    run(tmp_path / "checkpoints" / "last", tiny_llama)
    found = manifest(tmp_path)
    assert (found["status"], found["from_step"], found["step"]) == ("finished", 2, 4)
    assert [(a["status"], a["step"]) for a in found["attempts"]] == [("failed", 3)]
    assert found["seconds_total"] > found["seconds"]

    state = RunManifest()
    state.load_state_dict(json.loads(json.dumps({"reference": "0" * 64, "world_size": 1, "seconds": 2.0})))
    with pytest.raises(UserError, match="resumed with another reference"):
        fit(trainer(tmp_path, state), LanguageModule(tiny_llama), [1.0])


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
def test_a_real_signal_is_an_interruption(tmp_path: Path, number: int, raised: type[BaseException]) -> None:
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    saver, stop = ImprovedLossCheckpoint(save_steps=1), Look(2, lambda _: os.kill(os.getpid(), number))
    try:
        with pytest.raises(raised):
            fit(trainer(tmp_path, RunManifest(), saver, stop), TinyModule(), [1.0] * 9)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    found = manifest(tmp_path)
    assert found["status"] == "interrupted"
    assert found["step"] == 2
    assert found["ended"]
    assert (tmp_path / "checkpoints" / "last" / "checkpoint.pt").is_file()


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json: is a folder"):
        fit(trainer(tmp_path, RunManifest()), TinyModule(), [1.0])
