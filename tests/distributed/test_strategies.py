"""One device, two DDP ranks and two ZeRO-3 ranks see the same numbers: losses, rewards, gradients, norms, weights.

20 examples in steps of 8 leave ranks uneven in an epoch's last step, with rows of unequal length. SGD and RMSprop,
since Adam would hide a wrong scale; clipped and accumulated; each reference kind; weights from disk, in float32. The
one device has two padded rows for each pair and a live reference; the ranks have prompts shared, rows packed under a
budget that cuts a step in several, and the reference's log-probs kept after the first epoch.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import made, run_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1000)]  # ranks on a busy machine

SGD = {"name": "sgd", "lr": 0.1}
RMSPROP = {"name": "rmsprop", "lr": 1e-3}
LORA = {"kind": "lora", "r": 4}
CASES = {
    "dpo-sharded-sgd": {"task": "dpo", "reference": "sharded", "optimizer": SGD, "accumulate": 2},
    "dpo-shared-rmsprop-clipped": {
        "task": "dpo",
        "reference": "shared",
        "optimizer": RMSPROP,
        "clip": 0.05,
        "accumulate": 2,
        "schedule": {"name": "cosine", "warmup_ratio": 0.1},
    },
    "nll-from-an-adapter": {
        "task": "dpo+nll",
        "reference": "shared",
        "optimizer": SGD,
        "clip": 0.5,
        "start": True,
    },
    "nll-against-a-copy": {"task": "dpo+nll", "reference": "sharded", "optimizer": SGD, "start": True},
    "lora-recomputed": {
        "task": "dpo",
        "adapter": LORA,
        "reference": "shared",
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "gradient_checkpointing": True,
    },
    "all-weights": {
        "task": "dpo",
        "adapter": None,
        "reference": "sharded",
        "optimizer": SGD,
        "accumulate": 2,
    },
    "gpt2-paper": {
        "task": "dpo",
        "family": "gpt2",
        "adapter": {"kind": "ia3", "preset": "paper"},
        "reference": "sharded",
        "optimizer": SGD,
    },
    "gemma2": {"task": "dpo", "family": "gemma2", "reference": "shared", "optimizer": SGD, "accumulate": 2},
    "sft": {"task": "sft", "optimizer": RMSPROP, "clip": 1.0, "accumulate": 2},
}
LONG = ("dpo-sharded-sgd", "dpo-shared-rmsprop-clipped")
EPOCHS = {name: 10 if name in LONG else 4 for name in CASES}  # of 3 steps
PLAIN = {"data": {"layout": "concatenated", "token_budget": None}, "cache": None}
PACKED = {"data": {"layout": "prefix_shared", "token_budget": 160}}
VARIED = "dpo-sharded-sgd"
VARIANTS = {
    "small-tensors-whole": {"param_persistence_threshold": 100_000},
    "second-copy-in-the-node": {"hpz_partition_size": 2},
    "optimizer-offloaded": {"offload": "optimizer"},
    "parameters-offloaded": {"offload": "parameters"},
}


@pytest.fixture(scope="module")
def seen(models, tiny_llama, tmp_path_factory):
    """What one device, DDP and ZeRO-3 saw of each case: `seen["zero3"]["sft"]`."""
    folder = tmp_path_factory.mktemp("strategies")
    start = folder / "start"
    made({"base": str(tiny_llama), "task": "sft", "epochs": 1, "save": {"3": "start"}}, 1, folder)
    cases = {
        name: {
            "base": str(models(case.get("family", "llama"))),
            "epochs": EPOCHS[name],
            **case,
            "start": str(start) if "start" in case else None,
        }
        for name, case in CASES.items()
    }
    plans = {
        f"{kind}.{name}": {**case, **PACKED, "strategy": kind}
        for kind in ("ddp", "zero3")
        for name, case in cases.items()
    }
    plans |= {
        name: {**cases[VARIED], **PACKED, "strategy": "zero3", "zero3": zero3}
        for name, zero3 in VARIANTS.items()
    }
    out = run_on_ranks(folder, 2, plans)
    two = {kind: {name: out[f"{kind}.{name}"] for name in cases} for kind in ("ddp", "zero3")}
    variants = {name: out[name] for name in VARIANTS}
    one = {name: made({**case, **PLAIN}, 1, folder) for name, case in cases.items()}
    return {"one": one, **two, "variants": variants}


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_device(seen, name, strategy) -> None:
    one, two = seen["one"][name], seen[strategy][name]
    assert len(one["steps"]) == 3 * EPOCHS[name]
    for mine, theirs in zip(one["steps"], two["steps"], strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5, rel=1e-5)
    assert two["validation"] == pytest.approx(one["validation"], abs=1e-5, rel=1e-5)
    for mine, theirs in zip(one["gradients"], two["gradients"], strict=True):
        _assert_close(mine, theirs)
    _assert_close(one["trained"], two["trained"])


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_of_zero3_change_no_number(seen, name) -> None:
    one, two = seen["one"][VARIED], seen["variants"][name]
    for mine, theirs in zip(one["steps"], two["steps"], strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5, rel=1e-5)
    _assert_close(one["trained"], two["trained"])


def _assert_close(mine, theirs) -> None:
    assert mine.keys() == theirs.keys()
    assert mine
    for name in mine:
        torch.testing.assert_close(torch.tensor(theirs[name]), torch.tensor(mine[name]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_holds_its_share(seen, name) -> None:
    shares = seen["zero3"][name]["shares"]
    assert "policy" in shares
    assert ("reference" in shares) == (CASES[name]["task"] != "sft")
    for model, (held, whole) in shares.items():
        expected = 0 if model == "reference" and CASES[name]["reference"] == "shared" else whole / 2
        assert held == pytest.approx(expected, rel=0.01)
