"""What two ranks under ZeRO-3 do beside training: a bf16 base, samples, steps that are not finite, resuming."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import made, run_on_ranks
from tests.tiny_models import make
from trainer.checkpoint import verify

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]  # ranks on a busy machine

ADAMW = {"name": "adamw", "lr": 1e-2}
COSINE = {"name": "cosine", "warmup_ratio": 0.1}
LARGE = {"name": "sgd", "lr": 10.0}  # far enough for answers to change; Adam would blow up last digits
PROMPTS = ["ab", "cde f"]
ROOMS = ["a" * 506, "bc"]
LORA = {"kind": "lora", "r": 4, "dropout": 0.1}
NAN = {
    f"{strategy}-{where}": {
        "task": "dpo",
        "optimizer": ADAMW,
        "epochs": 2,
        "strategy": strategy,
        "nan": {"step": 2, "rank": 1, "where": where},
    }
    for strategy in ("ddp", "zero3")
    for where in ("loss", "gradient")
}
RUN = {"task": "dpo", "optimizer": ADAMW, "schedule": COSINE, "epochs": 3, "accumulate": 2, "clip": 0.1}
DROPOUT = {**RUN, "adapter": LORA, "strategy": "zero3"}
IA3 = {**RUN, "strategy": "zero3"}
ALL = {
    **IA3,
    "adapter": None,
    "reference": "sharded",
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("zero3")


@pytest.fixture(scope="module")
def wide(folder):
    return make("llama", folder / "wide", hidden=256)


@pytest.fixture(scope="module")
def seen(tiny_llama, tiny_gpt2, folder, wide):
    """All that two ranks do in one start."""
    base = str(tiny_llama)
    where = {name: str(folder / name) for name in ("whole-4", "part-5", "all-4", "ia3-4")}
    runs = {
        "bf16": {"task": "dpo", "base": str(wide), "dtype": "bfloat16", "reference": "sharded", "strategy": "zero3",
                 "epochs": 1, "scale": 1e-3, "optimizer": ADAMW},
        "samples": {"task": "dpo", "strategy": "zero3", "epochs": 1, "prompts": PROMPTS, "optimizer": LARGE},
        # GPT-2 has no position behind its last: one prompt leaves room for 6 tokens, the other for all 8.
        "rooms": {"task": "dpo", "base": str(tiny_gpt2), "strategy": "zero3", "epochs": 1, "prompts": ROOMS},
        **NAN,
        "hopeless": {"task": "dpo", "strategy": "zero3", "optimizer": ADAMW, "patience": 3,
                     "nan": {"step": [4, 5, 6, 7, 8], "rank": 1, "where": "loss"}},
        "all": {**ALL, "save": {"4": "all-4"}},
        "all-rest": {**ALL, "resume": where["all-4"]},
        "whole": {**DROPOUT, "save": {"4": "whole-4"}},
        "part": {**DROPOUT, "resume": where["whole-4"], "save": {"5": "part-5"}},
        "rest": {**DROPOUT, "resume": where["part-5"]},
        "ia3": {**IA3, "save": {"4": "ia3-4"}},
        "zero3-to-ddp": {**IA3, "strategy": "ddp", "resume": where["ia3-4"], "save": {"4": "x", "5": "ddp-5"}},
        "ddp-to-zero3": {**IA3, "resume": str(folder / "ddp-5")},
    }  # fmt: skip
    return run_on_ranks(folder, 2, {name: {"base": base, **settings} for name, settings in runs.items()})


def test_a_bf16_base_takes_two_bytes_and_a_small_change_of_a_scale_shows(seen) -> None:
    run = seen["bf16"]
    assert run["seen"]["MovedScale"] == {"moved": [True] * 4, "frozen": ["torch.bfloat16"]}
    trained = sum(len(values) for values in run["trained"].values())
    (held, whole), (copy_held, copy) = run["shares"]["policy"], run["shares"]["reference"]
    assert whole == copy + 4 * trained
    assert held == pytest.approx(whole / 2, rel=0.01)
    assert copy_held == pytest.approx(copy / 2, rel=0.01)
    assert run["losses"][0] == pytest.approx(math.log(2))
    assert run["losses"][-1] != run["losses"][0]


def test_both_ranks_answer_as_one_device_does(seen, tiny_llama, tmp_path) -> None:
    settings = {"base": str(tiny_llama), "task": "dpo", "epochs": 1, "prompts": PROMPTS, "optimizer": LARGE}
    answers = seen["samples"]["samples"]
    assert answers == made(settings, 1, tmp_path)["samples"]
    before, after = answers[:4], answers[4:]
    assert before[0::2] == before[1::2] == after[1::2], "the reference, and the policy at its start"
    assert after[0::2] != after[1::2], "the adapter is not there when the model generates"


def test_ranks_whose_answers_have_other_lengths_wait_for_each_other(seen, tiny_gpt2, tmp_path) -> None:
    settings = {"base": str(tiny_gpt2), "task": "dpo", "epochs": 1, "prompts": ROOMS}
    assert seen["rooms"]["samples"] == made(settings, 1, tmp_path)["samples"]


@pytest.mark.parametrize("name", NAN)
def test_no_rank_takes_a_step_that_is_not_finite_on_one(seen, name, tiny_llama, tmp_path) -> None:
    run = seen[name]
    assert run["skipped"] == 1
    assert len(run["losses"]) == 6
    assert [math.isfinite(step["grad_norm"]) for step in run["steps"]] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    by_loss = name.endswith("loss")
    assert math.isfinite(run["losses"][2]) != by_loss
    # The other steps are those of a run in which the third changed nothing, whoever trains.
    clean = made({**NAN[name], "base": str(tiny_llama), "strategy": "auto",
                  "nan": {"step": 2, "rank": 0, "where": "loss"}}, 1, tmp_path)  # fmt: skip
    assert run["losses"][3:] == pytest.approx(clean["losses"][3:], abs=1e-5)
    for tensor, values in clean["trained"].items():
        torch.testing.assert_close(
            torch.tensor(run["trained"][tensor]), torch.tensor(values), atol=1e-5, rtol=1e-5
        )
    assert all("step 2" in line and "row " not in line and "its examples: " in line for line in run["errors"])
    ranks = [line.split(",")[0] for line in run["errors"]]
    assert ranks == (["rank 1"] if by_loss else ["rank 0", "rank 1"])
    assert all(
        example.strip().isdigit() for example in run["errors"][-1].split("its examples:")[1].split(",")
    )


def test_both_ranks_end_together_after_steps_that_were_not_finite(seen, folder) -> None:
    one, two = seen["hopeless"]["ended"]
    assert one == two
    assert "not finite in 3 steps in a row" in one
    (saved,) = [path for path in (folder / "ended" / "checkpoints").iterdir() if not path.is_symlink()]
    assert saved.name in one
    verify(saved)
    assert all(
        bool(tensor.isfinite().all()) for tensor in load_file(saved / "adapter_model.safetensors").values()
    )


def test_a_resume_under_zero3_is_equal_to_the_bit(seen) -> None:
    """Cut in the middle of an epoch, and once more in the same; with dropout, a schedule and clipping."""
    whole = seen["whole"]["losses"]
    assert len(whole) == 9
    assert seen["part"]["losses"] == whole[4:]
    assert seen["rest"]["losses"] == whole[5:]
    assert seen["rest"]["trained"] == seen["whole"]["trained"]


def test_all_weights_are_saved_and_resumed_without_a_pickle(seen, folder) -> None:
    assert seen["all-rest"]["losses"] == seen["all"]["losses"][4:]
    assert seen["all-rest"]["trained"] == seen["all"]["trained"]
    kinds = {path.suffix for path in (folder / "all-4").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".jinja"}


def test_a_checkpoint_goes_from_strategy_to_strategy(seen) -> None:
    whole = seen["ia3"]
    assert seen["zero3-to-ddp"]["losses"] == pytest.approx(whole["losses"][4:], abs=1e-5)
    assert seen["ddp-to-zero3"]["losses"] == pytest.approx(whole["losses"][5:], abs=1e-5)
    _assert_same_weights(seen["ddp-to-zero3"], whole)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(seen, tiny_llama, folder, tmp_path, ranks) -> None:
    """Three ranks do not divide the tensors evenly."""
    base, whole = str(tiny_llama), seen["ia3"]
    one = made({**IA3, "base": base, "strategy": "auto", "resume": str(folder / "ia3-4"), "save": {"5": "one-5"}},
               1, tmp_path)  # fmt: skip
    assert one["losses"] == pytest.approx(whole["losses"][4:], abs=1e-5)
    back = run_on_ranks(tmp_path, ranks, {"back": {**IA3, "base": base, "resume": str(tmp_path / "one-5")}})[
        "back"
    ]
    assert back["losses"] == pytest.approx(whole["losses"][5:], abs=1e-5)
    _assert_same_weights(back, whole)


def _assert_same_weights(one, other) -> None:
    for name, values in other["trained"].items():
        torch.testing.assert_close(
            torch.tensor(one["trained"][name]), torch.tensor(values), atol=1e-5, rtol=1e-5
        )
