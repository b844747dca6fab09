"""EarlyStopping: patience, resume, the best weights back (PreferenceModule); the rest by dictated metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from typing_extensions import override

from callbacks.early_stopping import EarlyStopping
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from tests.callbacks.real import run
from tests.callbacks.tiny import TinyModule, fit, trainer
from trainer.schema import UserError


def test_stops_after_patience_validations(tmp_path: Path, tiny_llama: Path) -> None:
    callback = EarlyStopping(patience=2, mode="max")
    done = run(tmp_path, tiny_llama, callback, lr=0.2, val_check_interval=1)
    losses = list(done.seen.validations.values())
    # The second validation is the highest, the two after it are not.
    assert losses.index(max(losses)) == 1
    assert done.trainer.global_step == len(losses) == 4
    assert float(callback.best_score) == losses[1]
    assert callback.summary()["stopped"]
    assert "did not improve" in callback.summary()["reason"]


def test_the_sanity_check_is_no_look(tmp_path: Path) -> None:
    runner = trainer(tmp_path, EarlyStopping(patience=2), val_check_interval=2)
    # The sanity check reports the first value, so counting it would stop one validation too early.
    fit(runner, TinyModule(validation=[1.0, 0.5, 0.75, 0.625, 0.25]), [1.0] * 10, validate=True)
    assert runner.global_step == 8


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


class AtTheEnd(L.Callback):
    """The weights that a callback finds at the end of training."""

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {n: p.clone() for n, p in pl_module.policy.named_parameters() if p.requires_grad}  # type: ignore[operator,union-attr]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_restores_the_best_weights_after_everything_else(
    tmp_path: Path, tiny_llama: Path, interval: int, first: bool
) -> None:
    """With two steps between validations the run's end, step 5, was not saved by any of them."""
    end, stopping = AtTheEnd(), EarlyStopping(patience=9, mode="max", restore_best=True)
    checkpoint = ImprovedLossCheckpoint(monitor="val/loss", mode="max")
    callbacks = [checkpoint, stopping, end] if first else [checkpoint, end, stopping]
    settings = {"lr": 0.2, "max_steps": 5, "val_check_interval": interval}
    done = run(tmp_path, tiny_llama, *callbacks, **settings)
    assert done.pointed("best") == "step-00000002"
    assert done.pointed("last") == "step-00000005"
    last = run(tmp_path / "plain", tiny_llama, **settings).weights
    assert equal(end.weights, last)
    assert equal(done.saved("last"), last)
    assert equal(done.weights, done.saved("best"))
    assert not equal(done.weights, last)


def test_without_restore_best_the_last_weights_stay(tmp_path: Path, tiny_llama: Path) -> None:
    callbacks = EarlyStopping(patience=1, mode="max"), ImprovedLossCheckpoint(monitor="val/loss", mode="max")
    done = run(tmp_path, tiny_llama, *callbacks, lr=0.2, val_check_interval=1)
    assert (done.pointed("best"), done.pointed("last")) == ("step-00000002", "step-00000003")
    assert equal(done.weights, done.saved("last"))


def test_resume_goes_on_counting(tmp_path: Path, tiny_llama: Path) -> None:
    def state(resume: str | None) -> tuple[int, dict]:
        stopping = EarlyStopping(patience=3, mode="max")
        saver = ImprovedLossCheckpoint(monitor="val/loss", mode="max", keep=-1)
        path = tmp_path / "checkpoints" / resume if resume else None
        done = run(tmp_path, tiny_llama, stopping, saver, lr=0.2, val_check_interval=1, resume=path)
        return done.trainer.global_step, stopping.state_dict()

    whole = state(None)
    assert whole[0] == 5
    assert json.loads(json.dumps(whole[1])) == whole[1]
    for name in ("step-00000001", "step-00000003", "step-00000004"):
        assert state(name) == whole


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
