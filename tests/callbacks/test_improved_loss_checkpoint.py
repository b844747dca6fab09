"""ImprovedLossCheckpoint on a real Trainer: when it saves, what it keeps, resume, and a full disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from tests.callbacks.tiny import FolderIO, TinyModule, fit, trainer
from trainer.schema import UserError


def folders(root: Path) -> set[str]:
    return {path.name for path in (root / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()}


def pointed(root: Path, name: str) -> str:
    link = root / "checkpoints" / name
    assert link.is_symlink()
    return link.resolve().name


def test_saves_when_the_mean_over_the_window_is_the_best_so_far(tmp_path: Path) -> None:
    # Windows of two: 3.5, 4.0 (though 0.1 is the lowest single loss), 3.0, 3.0
    callback = ImprovedLossCheckpoint(save_steps=2, save_last=False, keep=-1)
    fit(trainer(tmp_path, callback), TinyModule(), [4.0, 3.0, 7.9, 0.1, 3.5, 2.5, 3.0, 3.0])
    assert folders(tmp_path) == {"step-00000002", "step-00000006"}
    assert pointed(tmp_path, "best") == pointed(tmp_path, "last") == "step-00000006"
    assert callback.best == 3.0
    assert Path(callback.best_model_path).name == "step-00000006"


def test_mode_max(tmp_path: Path) -> None:
    fit(
        trainer(tmp_path, ImprovedLossCheckpoint(save_steps=1, mode="max", keep=-1)),
        TinyModule(),
        [1.0, 3.0, 2.0],
    )
    assert pointed(tmp_path, "best") == "step-00000002"


def test_keeps_best_and_newest_and_prunes_the_others(tmp_path: Path) -> None:
    fit(trainer(tmp_path, ImprovedLossCheckpoint(save_steps=1)), TinyModule(), [3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    assert folders(tmp_path) == {"step-00000002", "step-00000005", "step-00000006"}
    assert (pointed(tmp_path, "best"), pointed(tmp_path, "last")) == ("step-00000002", "step-00000006")


def test_the_end_of_the_run_is_saved_as_last(tmp_path: Path) -> None:
    fit(trainer(tmp_path, ImprovedLossCheckpoint(save_steps=2)), TinyModule(), [3.0, 1.0, 2.0])
    assert (pointed(tmp_path, "best"), pointed(tmp_path, "last")) == ("step-00000002", "step-00000003")


def test_accumulated_micro_batches_count_as_one_step(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(save_steps=2, save_last=False, keep=-1)
    runner = trainer(tmp_path, callback, accumulate_grad_batches=2)
    # Steps' means: 2, 4 | 1, 3 | 9, 9
    fit(runner, TinyModule(), [1.0, 3.0, 4.0, 4.0, 1.0, 1.0, 2.0, 4.0, 9.0, 9.0, 9.0, 9.0])
    assert runner.global_step == 6
    assert folders(tmp_path) == {"step-00000002", "step-00000004"}
    assert callback.best == 2.0


def test_steps_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(save_steps=2, save_last=False)
    fit(trainer(tmp_path, callback), TinyModule(), [3.0, 3.0, math.nan, 2.0, math.nan, math.nan])
    assert (callback.best, callback.best_name) == (2.0, "step-00000004")


def test_validation_metric_and_not_in_the_sanity_check(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(monitor="val/loss", keep=-1)
    module = TinyModule(validation=[0.5, 0.25, 0.375])
    runner = trainer(tmp_path, callback, val_check_interval=2)
    fit(runner, module, [1.0] * 6, validate=True)
    assert (callback.best, pointed(tmp_path, "best"), pointed(tmp_path, "last")) == (
        0.25,
        "step-00000004",
        "step-00000006",
    )
    assert folders(tmp_path) == {"step-00000002", "step-00000004", "step-00000006"}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validate", [0, 2, 5])
@pytest.mark.parametrize(
    "at", ["step-00000002", "step-00000003", "step-00000005", "step-00000006", "step-00000009"]
)
def test_resume_equals_the_undisturbed_run(tmp_path: Path, at: str, validate: int, accumulate: int) -> None:
    """`validate` is the optimizer steps between validations in an epoch of five, 0 for none."""
    values = [5.0, 4.0, 6.0, 3.0, 2.0] * accumulate
    settings: dict = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    if validate:
        settings["val_check_interval"] = validate * accumulate

    def run(resume: Path | None) -> tuple[TinyModule, ImprovedLossCheckpoint]:
        callback = ImprovedLossCheckpoint(save_steps=1, keep=-1)
        module = TinyModule(validation=[0.5] * 9 if validate else None)
        fit(trainer(tmp_path, callback, **settings), module, values, validate=bool(validate), resume=resume)
        return module, callback

    whole, whole_callback = run(None)
    assert whole.validations == {0: 0, 2: 4, 5: 2}[validate]
    module, callback = run(tmp_path / "checkpoints" / at)
    assert module.seen == whole.seen[int(at[5:]) * accumulate :]
    assert torch.equal(module.policy.weight, whole.policy.weight)
    assert module.validations == whole.validations
    assert callback.state_dict() == whole_callback.state_dict()


def test_resume_in_a_window_goes_on_with_it(tmp_path: Path) -> None:
    values = [5.0, 1.0, 4.0, 8.0, 3.0, 3.0]
    first, checkpoint = TinyModule(), tmp_path / "middle"

    class SaveInTheMiddle(ImprovedLossCheckpoint):
        def on_train_batch_end(self, trainer, *args) -> None:  # type: ignore[no-untyped-def]
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 3:
                trainer.save_checkpoint(checkpoint)

    fit(trainer(tmp_path, SaveInTheMiddle(save_steps=2, keep=-1)), first, values)
    resumed = SaveInTheMiddle(save_steps=2, keep=-1)
    fit(trainer(tmp_path, resumed), TinyModule(), values, resume=checkpoint)
    assert resumed.best == 3.0
    assert resumed.saved == ["step-00000002", "step-00000004", "step-00000006"]


def test_state_is_json(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(save_steps=1)
    assert json.loads(json.dumps(callback.state_dict())) == callback.state_dict()
    fit(trainer(tmp_path, callback), TinyModule(), [0.1, 0.2, 0.3])
    other = ImprovedLossCheckpoint(save_steps=1)
    other.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert other.state_dict() == callback.state_dict()


def test_full_disk_keeps_the_last_good_checkpoint_and_says_so_in_one_line(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(save_steps=1)
    runner = trainer(tmp_path, callback, io=FolderIO(full=2))
    with pytest.raises(UserError) as error:
        fit(runner, TinyModule(), [3.0, 2.0, 1.0, 0.5])
    message = str(error.value)
    assert "\n" not in message
    assert "No space left on device" in message
    assert "step-00000003" in message
    assert f"last good checkpoint is {tmp_path}/checkpoints/step-00000002" in message
    assert runner.global_step == 3
    assert folders(tmp_path) == {"step-00000001", "step-00000002"}
    assert pointed(tmp_path, "best") == pointed(tmp_path, "last") == "step-00000002"
    assert callback.best == 2.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"save_steps": 0}, "save_steps: 0"),
        ({"keep": 0}, "keep: 0"),
        ({"mode": "least"}, "'least'"),
        ({"monitor": "loss"}, "begin with train/ or val/"),
        ({"monitor": "val/loss"}, "never appears, this run has no validation"),
        ({"monitor": "val/loss", "save_steps": 5, "save_last": False}, "save_steps: has no effect"),
    ],
)
def test_misconfigured(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(trainer(tmp_path, ImprovedLossCheckpoint(**settings)), TinyModule(), [1.0])


def test_absent_metric_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no metric 'train/lost' is logged; there are train/logps/chosen, train/loss"
    ):
        fit(trainer(tmp_path, ImprovedLossCheckpoint(monitor="train/lost")), TinyModule(), [1.0] * 4)


def test_absent_validation_metric_is_found_in_the_sanity_check(tmp_path: Path) -> None:
    module = TinyModule(validation=[1.0])
    with pytest.raises(UserError, match=r"no metric 'val/los' is logged; there are val/loss$"):
        fit(trainer(tmp_path, ImprovedLossCheckpoint(monitor="val/los")), module, [1.0] * 4, validate=True)
    assert not module.seen


def test_two_of_them_are_refused(tmp_path: Path) -> None:
    runner = trainer(
        tmp_path, ImprovedLossCheckpoint(), ImprovedLossCheckpoint(monitor="train/logps/chosen", mode="max")
    )
    with pytest.raises(UserError, match="this run has 2 of them"):
        fit(runner, TinyModule(), [1.0])
