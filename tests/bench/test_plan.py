"""What is measured in which order, and what follows from measurements."""

from __future__ import annotations

import pytest

from launch.bench.plan import Settings, candidates, choose, seconds, steps
from launch.bench.rows import fit
from trainer.schema import UserError


def result(ends: list[float], memory: int = 0, setup: float = 1.0, reference: float | None = 2.0) -> dict:
    return {
        "epoch_seconds": ends, "peak_memory_bytes": memory, "setup_seconds": setup, "reference_seconds": reference,
    }  # fmt: skip


def swept(settings: dict, ends: list[float], memory: int, arm: str = "trl") -> dict:
    return {"arm": arm, "job": {"settings": settings}, "result": result(ends, memory)}


def test_epochs_that_were_not_run_take_as_long_as_the_last():
    assert seconds(result([10.0, 15.0, 21.0]), 2) == 15.0
    assert seconds(result([10.0, 15.0]), 4) == 25.0
    # After one epoch: 3 of the 10 seconds were preparation.
    assert seconds(result([10.0]), 3) == 10.0 + 2 * 7.0
    assert seconds(result([10.0], reference=None), 2) == 10.0 + 9.0


def test_the_batch_is_swept_from_one_to_the_whole():
    found = candidates(16, whole=True)
    for precomputed in (True, False):
        sizes = [
            each["per_device_train_batch_size"]
            for each in found
            if each["precompute_ref_log_probs"] == precomputed and not each["gradient_checkpointing"]
        ]
        assert sizes == [1, 2, 4, 8, 16]
    assert [each["per_device_train_batch_size"] for each in candidates(12, whole=False)[:4]] == [1, 2, 4, 12]


def test_the_fastest_and_the_leanest_are_chosen():
    found = [
        swept({"a": 1}, [10.0], 1000),
        swept({"b": 1}, [6.0], 3000),
        # As lean as the leanest but for chance, and faster.
        swept({"c": 1}, [9.0], 1010),
        {"arm": "trl", "job": {"settings": {"d": 1}}, "error": "ended by signal 9"},
    ]
    assert choose(found, 3) == {
        "trl_fastest": {"b": 1}, "trl_leanest": {"c": 1}, "ranked": [{"b": 1}, {"c": 1}, {"a": 1}]
    }  # fmt: skip
    assert choose(found[3:], 3) == {}


def test_what_was_disturbed_once_is_still_found():
    found = [swept({"a": 1}, [60.0], 1000), swept({"b": 1}, [20.0], 3000), swept({"a": 1}, [10.0], 1000)]
    assert choose(found[:2], 1)["trl_fastest"] == {"b": 1}
    assert choose(found, 1)["trl_fastest"] == {"a": 1}
    assert choose(found, 1)["ranked"] == [{"b": 1}, {"a": 1}]


def test_what_is_tried_after_the_candidates_does_not_change_which_are_tried_again():
    found = [swept({"a": 1}, [9.0], 1000), swept({"b": 1}, [6.0], 1000)]
    found += [swept({"a": 1}, [1.0], 1000, "trl_again"), swept({"live": 1}, [0.5], 1000, "trl_live")]
    assert choose(found, 1)["trl_fastest"] == {"live": 1}
    assert choose(found, 1)["ranked"] == choose(found[:2], 1)["ranked"] == [{"b": 1}, {"a": 1}]


def test_a_precomputed_reference_pays_when_epochs_follow():
    live = {**swept({"live": 1}, [], 0), "result": result([10.0], reference=None)}
    precomputed = {**swept({"precomputed": 1}, [], 0), "result": result([10.5], reference=4.0)}
    assert choose([live, precomputed], 1)["trl_fastest"] == {"live": 1}
    assert choose([live, precomputed], 3)["trl_fastest"] == {"precomputed": 1}


def test_arms_take_turns_within_each_repeat():
    runs = [step.arm for step in steps(Settings(dtypes=("float32",), repeats=2)) if step.purpose == "run"]
    assert runs == ["tandem", "trl_defaults", "trl_fastest", "trl_leanest"] * 2


def test_the_live_reference_is_tried_at_the_best_batch():
    tried = [step for step in steps(Settings(dtypes=("float32",))) if step.purpose == "sweep"]
    best = {"trl_fastest": {"per_device_train_batch_size": 2, "precompute_ref_log_probs": True}}
    live = tried[-1].job(best)["settings"]
    assert live == {"per_device_train_batch_size": 2, "precompute_ref_log_probs": False}
    assert tried[-1].after_sweep


def test_arms_with_the_same_settings_are_measured_once():
    runs = {s.arm: s for s in steps(Settings(dtypes=("float32",), repeats=1)) if s.purpose == "run"}
    same = {"trl_fastest": {"a": 1}, "trl_leanest": {"a": 1}}
    assert runs["trl_fastest"].key(same) == runs["trl_leanest"].key(same)
    other = {"trl_fastest": {"a": 1}, "trl_leanest": {"a": 2}}
    assert runs["trl_fastest"].key(other) != runs["trl_leanest"].key(other)
    # What is compared by memory runs one epoch, what is compared by speed all.
    assert runs["trl_fastest"].job(other)["epochs"] == 3
    assert runs["trl_leanest"].job(other)["epochs"] == 1


def test_the_defaults_of_trl_are_left_alone():
    run = next(s for s in steps(Settings()) if s.purpose == "run" and s.arm == "trl_defaults")
    assert run.job({})["settings"] == {"per_device_train_batch_size": 8, "bf16": True}


def test_a_straight_line_is_found():
    found = fit([[100, 1.2], [200, 2.2], [400, 4.2]])
    assert found["intercept_seconds"] == pytest.approx(0.2)
    assert found["seconds_per_token"] == pytest.approx(0.01)
    assert found["r_squared"] == pytest.approx(1.0)
    assert fit([[100, 1.0], [100, 1.1]])["r_squared"] is None


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dtypes": ("bf16",)}, "--dtypes bf16: not known; give some of bfloat16, float32"),
        ({"arms": ("trl",)}, "--arms trl: not known"),
        ({"pairs": 20}, "--pairs 20: should be a multiple of --batch_size 16"),
        ({"epochs": ()}, "--epochs : should be 1 or more"),
    ],
)
def test_wrong_settings_are_told(wrong, told):
    with pytest.raises(UserError, match=told):
        Settings(**wrong)
