"""EarlyStopping on a real Trainer: patience, minimum change, resume, and the best weights back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from callbacks.early_stopping import EarlyStopping
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from tests.callbacks.tiny import TinyModule, fit, trainer
from trainer.schema import UserError


def test_stops_after_patience_validations_and_not_in_the_sanity_check(tmp_path: Path) -> None:
    callback = EarlyStopping(patience=2)
    runner = trainer(tmp_path, callback, val_check_interval=2)
    # The sanity check reports the first value, so counting it would stop one validation too early.
    fit(runner, TinyModule(validation=[1.0, 0.5, 0.75, 0.625, 0.25]), [1.0] * 10, validate=True)
    assert runner.global_step == 8
    assert float(callback.best_score) == 0.5
    assert callback.summary()["stopped"]
    assert "did not improve" in callback.summary()["reason"]


def test_minimum_change(tmp_path: Path) -> None:
    values = [1.0, 0.75, 0.5, 0.25, 0.0]
    for min_delta, steps in ((0.0, 5), (0.125, 5), (0.375, 2)):
        runner = trainer(tmp_path, EarlyStopping(patience=1, min_delta=min_delta), val_check_interval=1)
        fit(runner, TinyModule(validation=values), [1.0] * 5, validate=True)
        assert runner.global_step == steps


def test_train_metric_over_windows_of_accumulated_steps(tmp_path: Path) -> None:
    runner = trainer(
        tmp_path,
        EarlyStopping("train/loss", patience=1, every_n_steps=2),
        accumulate_grad_batches=2,
        max_epochs=3,
    )
    # Means over two steps of two: 3, 2, 2
    fit(runner, TinyModule(), [4.0, 2.0, 5.0, 1.0, 0.0, 4.0, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    assert runner.global_step == 6


def test_train_metric_each_epoch(tmp_path: Path) -> None:
    callback = EarlyStopping("train/loss", patience=2)
    runner = trainer(tmp_path, callback, max_epochs=9)
    fit(runner, TinyModule(), [2.0, 1.0])
    assert runner.global_step == 6
    assert float(callback.best_score) == 1.5


def test_a_metric_that_is_not_finite_stops(tmp_path: Path) -> None:
    runner = trainer(tmp_path, EarlyStopping("train/loss", patience=9, every_n_steps=2))
    # One bad step in a window is left out; a whole bad window stops the run.
    fit(runner, TinyModule(), [1.0, math.nan, 2.0, 1.0, math.nan, math.nan, 1.0, 1.0])
    assert runner.global_step == 6


@pytest.mark.parametrize("interval", [1, 2])
def test_restores_the_best_weights_and_leaves_last_as_it_ended(tmp_path: Path, interval: int) -> None:
    """With two steps between validations the run's end, step 5, was not saved by any of them."""
    checkpoint = ImprovedLossCheckpoint(monitor="val/loss")
    stopping = EarlyStopping(patience=9, restore_best=True)
    runner = trainer(tmp_path, stopping, checkpoint, val_check_interval=interval, max_steps=5)
    module = TinyModule(validation=[0.75, 0.5, 0.75, 0.75, 0.75] if interval == 1 else [0.5, 0.75, 0.75])
    fit(runner, module, [1.0] * 9, validate=True)
    assert checkpoint.best_name == "step-00000002"
    saved = {
        name: torch.load(tmp_path / "checkpoints" / name / "checkpoint.pt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    }
    assert torch.equal(module.policy.weight, saved["best"]["policy.weight"])
    assert not torch.equal(saved["best"]["policy.weight"], saved["last"]["policy.weight"])
    undisturbed = fit(trainer(tmp_path / "whole", max_steps=5), TinyModule(), [1.0] * 9)
    assert torch.equal(saved["last"]["policy.weight"], undisturbed.policy.weight)


def test_resume_goes_on_counting(tmp_path: Path) -> None:
    values = [1.0, 0.5, 0.75, 0.75, 0.75, 0.75]

    def run(resume: str | None) -> tuple[int, dict]:
        callback = EarlyStopping(patience=3)
        saver = ImprovedLossCheckpoint(monitor="val/loss", keep=-1)
        runner = trainer(tmp_path, callback, saver, val_check_interval=1)
        path = tmp_path / "checkpoints" / resume if resume else None
        fit(runner, TinyModule(validation=values), [1.0] * 9, validate=True, resume=path)
        return runner.global_step, callback.state_dict()

    whole = run(None)
    assert whole[0] == 5
    assert json.loads(json.dumps(whole[1])) == whole[1]
    for name in ("step-00000001", "step-00000003", "step-00000004"):
        assert run(name) == whole


def test_a_stopped_run_stays_stopped_unless_patience_grows(tmp_path: Path) -> None:
    def run(patience: int, resume: Path | None) -> tuple[int, int]:
        runner = trainer(
            tmp_path,
            EarlyStopping(patience=patience),
            ImprovedLossCheckpoint(monitor="val/loss"),
            val_check_interval=1,
        )
        module = fit(runner, TinyModule(validation=[1.0] * 9), [1.0] * 9, validate=True, resume=resume)
        return runner.global_step, len(module.seen)

    last = tmp_path / "checkpoints" / "last"
    assert run(2, None) == (3, 3)
    assert run(2, last) == (3, 0)
    assert run(4, last) == (5, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"monitor": "val/loss"}, "never appears, this run has no validation"),
        ({"monitor": "loss"}, "begin with train/ or val/"),
        ({"monitor": "train/loss", "patience": 0}, "patience: 0"),
        ({"monitor": "train/loss", "min_delta": -1.0}, "min_delta: -1"),
        ({"monitor": "train/loss", "every_n_steps": 0}, "every_n_steps: 0"),
        ({"monitor": "train/loss", "restore_best": True}, "needs an ImprovedLossCheckpoint"),
        (
            {"monitor": "train/lost"},
            "no metric 'train/lost' is logged; there are train/logps/chosen, train/loss",
        ),
    ],
)
def test_misconfigured(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(trainer(tmp_path, EarlyStopping(**settings)), TinyModule(), [1.0])


def test_steps_are_refused_for_a_validation_metric(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every_n_steps: has no effect with 'val/loss'"):
        fit(trainer(tmp_path, EarlyStopping(every_n_steps=2)), TinyModule([1.0]), [1.0], validate=True)
    with pytest.raises(UserError, match="mode: 'lower'"):
        EarlyStopping(mode="lower")  # type: ignore[arg-type]
