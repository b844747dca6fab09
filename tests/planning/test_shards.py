"""Shares and gathering as ZeRO-3 has them: the rules, and the real DeepSpeed on two ranks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from tests import tiny_models
from tests.distributed.ranks import on_ranks
from tests.planning.real import job_for, planner_for
from trainer.optimization import OptimizerConfig
from trainer.planning.fixed import fixed_bytes
from trainer.planning.shards import (
    Use,
    Weight,
    ZeroSettings,
    gathering,
    persistent,
    shard_bytes,
    sharded_bytes,
)
from trainer.policy.reference import ReferenceConfig


def test_shares_are_padded():
    assert [shard_bytes(10, ranks, 2) for ranks in (1, 2, 3, 4, 16)] == [20, 10, 8, 6, 2]


def test_small_parameters_stay_whole_beside_their_shares():
    weights = [Weight(100, 4, False), Weight(1000, 2, False), Weight(100, 4, True)]
    assert persistent(weights, ZeroSettings(100)) == [True, False, True]
    assert persistent(weights, ZeroSettings(100, model_persistence_threshold=150)) == [True, False, False]
    assert sharded_bytes(weights, 4, ZeroSettings(100)) == 2 * (100 + 400) + 500
    assert sharded_bytes(weights, 1, ZeroSettings(100)) == 400 + 2000 + 400


def test_settings_come_from_the_strategy_and_from_deepspeeds_own():
    given = {
        "param_persistence_threshold": 7,
        "offload": "optimizer",
        "timeout": 60.0,
        "config": {"stage3_prefetch_bucket_size": 1e4, "reduce_bucket_size": "5e6", "overlap_comm": True},
    }
    expected = ZeroSettings(7, prefetch_bucket_size=10_000, reduce_bucket_size=5_000_000, offload="optimizer")
    assert ZeroSettings.of(given) == expected


def test_what_is_used_soon_again_is_kept():
    """Three layers forward and back. Worked by hand: without prefetch, the last layer alone is kept at the turn."""
    weights = [Weight(10, 1, False)] * 3
    uses = [Use([index]) for index in (0, 1, 2, 2, 1, 0)]
    none = {"param_persistence_threshold": 0, "prefetch_bucket_size": 0}
    alone = gathering(uses, weights, ZeroSettings(**none, max_reuse_distance=0))
    assert (alone.first, alone.again, alone.peak) == (30, 30, 10)
    last = gathering(uses, weights, ZeroSettings(**none, max_reuse_distance=10))
    assert (last.first, last.again, last.peak) == (30, 20, 10)
    everything = gathering(uses, weights, ZeroSettings(**none))
    assert (everything.first, everything.again, everything.peak) == (30, 0, 30)


def test_what_is_computed_again_is_let_go_with_the_backward_that_asked():
    """One layer of two modules, checkpointed: forward, backward of the second, forward again, and the rest."""
    weights = [Weight(10, 1, False)] * 2
    uses = [Use([0]), Use([1]), Use([1]), Use([0], True), Use([1], True), Use([0])]
    seen = gathering(uses, weights, ZeroSettings(0, prefetch_bucket_size=0, max_reuse_distance=0))
    assert (seen.first, seen.again, seen.peak) == (20, 30, 20)


def test_offload_moves_bytes_to_the_cpus_memory(tiny_llama):
    def fixed(offload: Any) -> tuple[dict[str, int], int]:
        job = job_for(tiny_llama, strategy="zero3", zero=ZeroSettings(0, offload=offload))
        return fixed_bytes(job, 2, planner_for(job).models(job).weights())

    (none, nothing), (optimizer, state), (parameters, everything) = map(
        fixed, ("none", "optimizer", "parameters")
    )
    assert nothing == 0 < state < everything
    assert none["optimizer"] > optimizer["optimizer"] == 0
    assert parameters["weights"] == parameters["adapter"] == 0 < none["weights"] == optimizer["weights"]
    assert everything - state == none["weights"] + none["adapter"]


def runs(base: str) -> dict[str, dict[str, Any]]:
    """Fits under ZeRO-3 whose settings make prefetching and reuse matter for a tiny model."""
    zero = {
        "param_persistence_threshold": 500,
        "config": {"stage3_prefetch_bucket_size": 3000, "stage3_max_reuse_distance": 9000},
    }
    common = {"base": base, "task": "dpo", "strategy": "zero3", "zero3": zero, "epochs": 1}
    return {
        "shared": common,
        "sharded": {**common, "reference": "sharded", "dtype": "bfloat16"},
        "checkpointing": {**common, "gradient_checkpointing": True},
        "lora": {**common, "adapter": {"kind": "lora"}, "reference": "sharded"},
    }


@pytest.mark.distributed
@pytest.mark.slow
def test_what_deepspeed_gathers_is_what_is_planned(tmp_path):
    base = tiny_models.make("llama", tmp_path / "base", layers=4)
    all_runs = runs(str(base))
    (tmp_path / "plan.json").write_text(json.dumps({"runs": all_runs, "folder": str(tmp_path), "ranks": 2}))
    on_ranks("tests.planning.gathers", tmp_path / "plan.json", 2)
    for name, settings in all_runs.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        seen = found["gathered"]
        job = job_of(base, settings)
        planner = planner_for(job)
        weights = planner.models(job).weights()
        whole = [*weights["policy"], *weights["reference"]]
        # Weighed before the first forward, after which small parameters lie whole beside their shares.
        none_whole = dataclasses.replace(job.zero, param_persistence_threshold=-1)
        held = {kind: found["shares"][kind][0] for kind in weights if weights[kind]}
        assert held == {kind: sharded_bytes(weights[kind], 2, none_whole) for kind in held}, name
        expected = gathering(planner.trace(job, 2).uses, whole, job.zero)
        # The trial of packed rows comes before the first micro-batch, which is recorded, and the next ones followed;
        # validation comes at the end of the epoch.
        assert {"bytes": expected.bytes, "peak": expected.peak} in seen[2:5], (name, expected, seen)


def job_of(base: Any, settings: dict[str, Any]) -> Any:
    """The job that a run of `tests.distributed.ranks` is."""
    from trainer.policy.load import AdapterConfig

    return job_for(
        base,
        adapter=AdapterConfig(**settings.get("adapter", {"kind": "ia3"})),
        dtype=settings.get("dtype", "float32"),
        gradient_checkpointing=settings.get("gradient_checkpointing", False),
        reference=ReferenceConfig(kind=settings.get("reference", "shared")),
        optimizer=OptimizerConfig("sgd", lr=0.1),
        strategy="zero3",
        zero=ZeroSettings.of(settings["zero3"]),
    )
