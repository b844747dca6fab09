"""ImprovedLossCheckpoint: when it saves, resume (PreferenceModule); dictated losses, pruning, a full disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from tests.callbacks.real import run
from tests.callbacks.tiny import FolderIO, TinyModule, fit, trainer
from trainer.schema import UserError


def folders(root: Path) -> set[str]:
    return {path.name for path in (root / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink()}


def pointed(root: Path, name: str) -> str:
    link = root / "checkpoints" / name
    assert link.is_symlink()
    return link.resolve().name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_saves_when_the_mean_over_the_window_is_the_best_so_far(
    tmp_path: Path, tiny_llama: Path, accumulate: int
) -> None:
    callback = ImprovedLossCheckpoint(save_steps=2, save_last=False, keep=-1)
    done = run(tmp_path, tiny_llama, callback, lr=0.5, max_epochs=3, accumulate_grad_batches=accumulate)
    means = {step: (done.losses[step - 2] + done.losses[step - 1]) / 2 for step in range(2, 13, 2)}
    best = [step for step in means if means[step] == min(means[s] for s in means if s <= step)]
    # Otherwise this shows nothing: some windows improve and some do not.
    assert 2 < len(best) + 1 < len(means)
    assert done.folders == {f"step-{step:08d}" for step in best}
    assert done.pointed("best") == done.pointed("last") == f"step-{best[-1]:08d}"
    assert callback.best == pytest.approx(means[best[-1]], rel=1e-12)
    assert Path(callback.best_model_path).name == f"step-{best[-1]:08d}"


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


def test_steps_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(save_steps=2, save_last=False)
    fit(trainer(tmp_path, callback), TinyModule(), [3.0, 3.0, math.nan, 2.0, math.nan, math.nan])
    assert (callback.best, callback.best_name) == (2.0, "step-00000004")


def test_validation_metric(tmp_path: Path, tiny_llama: Path) -> None:
    callback = ImprovedLossCheckpoint(monitor="val/loss", keep=-1, save_last=False)
    done = run(tmp_path, tiny_llama, callback, lr=0.2, val_check_interval=1)
    seen = done.seen.validations
    best = [step for step in seen if seen[step] == min(seen[s] for s in seen if s <= step)]
    assert len(best) < len(seen) == 8
    assert done.folders == {f"step-{step:08d}" for step in best}
    assert (callback.best, done.pointed("best")) == (min(seen.values()), f"step-{best[-1]:08d}")


def test_the_sanity_check_is_no_look(tmp_path: Path) -> None:
    callback = ImprovedLossCheckpoint(monitor="val/loss")
    runner = trainer(tmp_path, callback, val_check_interval=2)
    fit(runner, TinyModule(validation=[0.5, 0.25]), [1.0] * 4, validate=True)
    assert (callback.best, callback.saved) == (0.25, ["step-00000002", "step-00000004"])


SETTINGS = [(1, 1), (1, 4), (2, 3)]


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda each: "accumulate{}-validate{}".format(*each))
def undisturbed(request, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path):  # type: ignore[no-untyped-def]
    """A whole run, and its settings: optimizer steps in an epoch of four between validations."""
    accumulate, validate = request.param
    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": validate * accumulate}
    callback = ImprovedLossCheckpoint(save_steps=1, keep=-1)
    return run(tmp_path_factory.mktemp("whole"), tiny_llama, callback, **settings), settings


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_resume_equals_the_undisturbed_run(undisturbed, tmp_path: Path, tiny_llama: Path, step: int) -> None:  # type: ignore[no-untyped-def]
    whole, settings = undisturbed
    at = whole.root / "checkpoints" / f"step-{step:08d}"
    again = run(tmp_path, tiny_llama, ImprovedLossCheckpoint(save_steps=1, keep=-1), resume=at, **settings)
    assert again.seen.steps == whole.seen.steps[step:]
    assert again.seen.validations == {s: v for s, v in whole.seen.validations.items() if s > step}
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())
    assert (
        again.callback(ImprovedLossCheckpoint).state_dict()
        == whole.callback(ImprovedLossCheckpoint).state_dict()
    )


def test_resume_in_a_window_goes_on_with_it(tmp_path: Path, tiny_llama: Path) -> None:
    checkpoint = tmp_path / "middle"

    class SaveInTheMiddle(ImprovedLossCheckpoint):
        def on_train_batch_end(self, trainer, *args) -> None:  # type: ignore[no-untyped-def]
            super().on_train_batch_end(trainer, *args)
            if trainer.global_step == 5:
                trainer.save_checkpoint(checkpoint)

    whole = run(tmp_path, tiny_llama, SaveInTheMiddle(save_steps=3, keep=-1))
    again = run(tmp_path, tiny_llama, SaveInTheMiddle(save_steps=3, keep=-1), resume=checkpoint)
    states = [each.callback(SaveInTheMiddle).state_dict() for each in (whole, again)]
    assert states[0] == states[1]
    assert states[0]["best"] == pytest.approx(sum(whole.losses[3:6]) / 3, rel=1e-12)
    assert states[0]["saved"] == ["step-00000003", "step-00000006", "step-00000008"]


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
