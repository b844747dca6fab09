"""Preemption: where a request takes effect, that nothing is lost by it, what it says, and with which status."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.alarms import Alarms
from callbacks.early_stopping import EarlyStopping
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.preemption import Preempted, Preemption
from callbacks.run_manifest import RunManifest
from tests.callbacks.real import Seen, run
from tests.callbacks.tiny import TinyModule, fit, trainer
from trainer.schema import UserError


class Ask(L.Callback):
    """Asks this rank's module while the micro-batches of a step run, or in a validation after that step."""

    def __init__(
        self, step: int, name: str = "stop", number: int = signal.SIGTERM, validating: bool = False
    ) -> None:
        self.step, self.name, self.number, self.validating = step, name, number, validating

    def _ask(self, trainer: L.Trainer, pl_module: Any, now: int) -> None:
        if now == self.step:
            pl_module.requests[self.name] = int(self.number)

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        if not self.validating:
            self._ask(trainer, pl_module, trainer.global_step + 1)

    def on_validation_start(self, trainer, pl_module) -> None:
        if self.validating:
            self._ask(trainer, pl_module, trainer.global_step)


SAVES = {
    "every step": lambda: ImprovedLossCheckpoint(save_steps=1),
    "rarely": lambda: ImprovedLossCheckpoint(save_steps=100),
    "improvements only": lambda: ImprovedLossCheckpoint(save_steps=100, save_last=False),
    "validation": lambda: ImprovedLossCheckpoint(monitor="val/loss"),
}


# Eight steps in two epochs; validations after steps 3, 4 (an epoch's end), 7 and 8.
@pytest.mark.parametrize(
    ("saves", "at", "accumulate"),
    [
        ("every step", 2, 1),
        ("rarely", 3, 1),
        ("rarely", 4, 1),
        ("improvements only", 5, 1),
        ("validation", 3, 1),
        ("rarely", 2, 2),
    ],
)
def test_nothing_is_lost(tmp_path: Path, tiny_llama: Path, saves: str, at: int, accumulate: int) -> None:
    settings = {"val_check_interval": 3, "accumulate_grad_batches": accumulate}
    whole = run(tmp_path / "whole", tiny_llama, SAVES[saves](), Preemption(), **settings)
    before = Seen()
    root = tmp_path / "run"
    with pytest.raises(Preempted) as end:
        run(root, tiny_llama, SAVES[saves](), Preemption(), before, RunManifest(), Ask(at), **settings)
    assert (end.value.code, end.value.status) == (143, 143)
    last = root / "checkpoints" / "last"
    assert str(end.value) == (
        f"SIGTERM: stopped at step {at}; saved as {last.resolve()}, `--resume auto` goes on from there"
    )
    assert last.resolve().name == f"step-{at:08d}"
    assert json.loads((root / "manifest.json").read_text())["status"] == "interrupted"
    after = run(root, tiny_llama, SAVES[saves](), Preemption(), resume=last, **settings)
    assert [step["loss"] for step in before.steps] + after.losses == whole.losses
    assert before.validations | after.seen.validations == whole.seen.validations
    for name, weight in whole.weights.items():
        assert torch.equal(weight, after.weights[name]), name


def test_a_request_in_a_validation_waits_for_the_next_step(tmp_path: Path, tiny_llama: Path) -> None:
    ask = Ask(3, validating=True)
    with pytest.raises(Preempted, match="stopped at step 4"):
        run(tmp_path, tiny_llama, ImprovedLossCheckpoint(), Preemption(), ask, val_check_interval=3)


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_steps": 8, "max_epochs": -1}])
@pytest.mark.parametrize("validates", [True, False])
def test_a_request_with_the_last_step_lets_the_run_finish(
    tmp_path: Path, tiny_llama: Path, end: dict[str, int], validates: bool
) -> None:
    validation = {} if validates else {"limit_val_batches": 0}
    callbacks = ImprovedLossCheckpoint(), RunManifest(), Preemption(), Ask(8)
    done = run(tmp_path, tiny_llama, *callbacks, **end, **validation)
    assert done.trainer.global_step == 8
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "finished"


def test_a_run_that_is_stopping_anyway_finishes(tmp_path: Path, tiny_llama: Path) -> None:
    stopping = EarlyStopping("train/lr", every_n_steps=1, patience=2)  # the same at each step
    done = run(tmp_path, tiny_llama, ImprovedLossCheckpoint(), stopping, Preemption(), Ask(3))
    assert done.trainer.global_step == 3


def test_nothing_happens_unasked(tmp_path: Path, tiny_llama: Path) -> None:
    assert len(run(tmp_path, tiny_llama, ImprovedLossCheckpoint(), Preemption()).losses) == 8


class Scontrol:
    """A `scontrol` that writes down its arguments; the real one is asked in tests/slurm."""

    def __init__(self, folder: Path, status: int) -> None:
        folder.mkdir()
        self.asked, program = folder / "asked", folder / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {self.asked}\necho "no such job" >&2\nexit {status}\n')
        program.chmod(0o755)
        self.path = f"{folder}:{os.environ['PATH']}"


WARNED = {"name": "requeue", "number": signal.SIGUSR1}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`slurm(status, **environment)`: inside a job of SLURM, as far as the callback sees."""

    def start(status: int = 0, **environment: str) -> Scontrol:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        scontrol = Scontrol(tmp_path / "bin", status)
        monkeypatch.setenv("PATH", scontrol.path)
        return scontrol

    return start


def warned(root: Path, base: Path, preemption: Preemption, ask: Ask | None = None) -> str:
    with pytest.raises(Preempted) as end:
        run(root, base, ImprovedLossCheckpoint(), preemption, ask or Ask(2, **WARNED))
    assert end.value.code == 138
    assert (root / "checkpoints" / "last").resolve().name == "step-00000002"
    return str(end.value)


def test_slurm_is_asked_to_requeue_the_job(tmp_path: Path, tiny_llama: Path, slurm) -> None:
    scontrol = slurm(SLURM_JOB_ID="41")
    told = warned(tmp_path / "run", tiny_llama, Preemption())
    assert told.startswith("SIGUSR1: stopped at step 2; SLURM job 41 is requeued; saved as ")
    assert scontrol.asked.read_text() == "requeue 41\n"


def test_of_an_array_only_its_own_task(tmp_path: Path, tiny_llama: Path, slurm) -> None:
    scontrol = slurm(SLURM_JOB_ID="43", SLURM_ARRAY_JOB_ID="41", SLURM_ARRAY_TASK_ID="2")
    warned(tmp_path / "run", tiny_llama, Preemption())
    assert scontrol.asked.read_text() == "requeue 41_2\n"


def test_a_requeue_that_fails_is_said_and_never_status_0(tmp_path: Path, tiny_llama: Path, slurm) -> None:
    slurm(1, SLURM_JOB_ID="41")
    told = warned(tmp_path / "run", tiny_llama, Preemption())
    assert "SLURM job 41 could not be requeued (no such job); saved as" in told


def test_no_requeue_outside_slurm_nor_where_it_is_not_wanted(tmp_path: Path, tiny_llama: Path, slurm) -> None:
    scontrol = slurm()
    assert "requeued" not in warned(tmp_path / "a", tiny_llama, Preemption())
    os.environ["SLURM_JOB_ID"] = "41"
    try:
        assert "requeued" not in warned(tmp_path / "b", tiny_llama, Preemption(requeue=False))
    finally:
        del os.environ["SLURM_JOB_ID"]
    assert not scontrol.asked.exists()


def test_sigterm_does_not_requeue(tmp_path: Path, tiny_llama: Path, slurm) -> None:
    scontrol = slurm(SLURM_JOB_ID="41")
    with pytest.raises(Preempted, match="SIGTERM"):
        run(tmp_path / "run", tiny_llama, ImprovedLossCheckpoint(), Preemption(), Ask(2))
    assert not scontrol.asked.exists()


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ImprovedLossCheckpoint"):
        fit(trainer(tmp_path, Preemption()), TinyModule(), [1.0])


def test_steps_that_are_not_finite_end_the_run_with_a_good_checkpoint(tmp_path: Path) -> None:
    module, nan = TinyModule(), float("nan")
    runner = trainer(tmp_path, Alarms(max_not_finite=3), ImprovedLossCheckpoint(save_steps=100))
    with pytest.raises(UserError, match=r"3 steps in a row; .*saved as .*step-00000005") as end:
        fit(runner, module, [1.0, 1.0, nan, nan, nan, 1.0])
    saved = torch.load(Path(str(end.value).rsplit(" ", 1)[1]) / "checkpoint.pt", weights_only=True)
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000005"
    # After the second step nothing moved.
    good = TinyModule()
    fit(trainer(tmp_path / "good", max_steps=2), good, [1.0, 1.0])
    assert torch.equal(saved["state_dict"]["policy.weight"], good.policy.weight)
