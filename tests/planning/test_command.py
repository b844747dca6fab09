"""`tandem plan`: what it prints, what it advises, and one clear line for what cannot be."""

from __future__ import annotations

import dataclasses
import json

import pytest

from launch.cli import main
from launch.commands.plan import asked, parted
from tests.launch.helpers import fit_config
from tests.planning.real import job_for
from trainer.planning.advice import advise
from trainer.planning.hardware import GB, GPUS, Cluster
from trainer.planning.plan import Planner
from trainer.planning.shapes import published
from trainer.policy.reference import ReferenceConfig


@pytest.fixture
def config(tmp_path, tiny_llama):
    return ["--config", str(fit_config(tmp_path, tiny_llama))]


def small(layers: int = 2):
    """Llama-2-7B with few layers: quick, with matrices that are sharded."""
    shape = published("llama-2-7b")
    shape.num_hidden_layers = layers
    return shape


def test_own_words_are_parted_from_those_of_the_config():
    words = ["--config", "a.yaml", "--gpus", "8", "--sweep", "--nodes=2", "--trainer.max_steps", "3"]
    assert parted(words) == (
        ["--gpus", "8", "--sweep", "--nodes=2"],
        ["--config", "a.yaml", "--trainer.max_steps", "3"],
    )


def test_a_plan_is_printed_within_100_columns(config, capsys):
    assert main(["plan", *config, "--tokens", "64", "--gpus", "2"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    for words in (
        "2 GPUs on 1 node, ddp",
        "weights",
        "optimizer",
        "activations",
        "logits",
        "fits",
        "bounds the step",
    ):
        assert words in shown


def test_a_plan_for_machines(config, capsys):
    zero3 = ["--trainer.strategy", "zero3", "--model.reference.kind", "sharded"]
    assert main(["plan", *config, "--tokens", "64", "--gpus", "2", *zero3, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["total"] == sum(plan["memory"].values())
    assert plan["job"]["strategy"] == "zero3"
    assert plan["memory"]["weights"] == plan["memory"]["reference"]
    assert plan["cluster"]["gpus"] == 2
    assert plan["advice"] == []


def test_what_does_not_fit_says_what_to_change(config, capsys):
    arguments = ["--shape", "gpt2", "--tokens", "64", "--gpus", "1", "--gpu_memory", "1.45", "--json"]
    assert main(["plan", *config, *arguments]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"]
    assert "policy.dtype: bfloat16" in [change["setting"] for change in plan["advice"]]
    assert plan["advice"][-1]["fits"]
    assert plan["advice"][-1]["together"] <= 1.45 * GB


def test_each_change_gives_the_plan_that_it_says():
    job = job_for("x", reference=ReferenceConfig(kind="sharded"), strategy="ddp", batch_size=16, tokens=256)
    planner = Planner(small(8))
    plan = planner.plan(job, Cluster(4, 1, GPUS["l4"], 1 * GB, GB))
    advice = advise(planner, plan)
    assert advice[0].setting == "trainer.accumulate_grad_batches: 4"
    accumulated = dataclasses.replace(job, accumulate=4)
    assert advice[0].alone == advice[0].together == planner.plan(accumulated, plan.cluster).total
    shared = next(change for change in advice if change.setting == "reference.kind: shared")
    alone = dataclasses.replace(job, reference=ReferenceConfig(kind="shared"))
    assert shared.alone == planner.plan(alone, plan.cluster).total
    sizes = [plan.total, *(change.together for change in advice)]
    assert sizes == sorted(sizes, reverse=True)
    assert any("--gpus" in change.setting for change in advice)


def test_more_gpus_share_the_weights_and_gather_more(capsys):
    job = job_for("x", reference=ReferenceConfig(kind="sharded"), strategy="zero3", batch_size=64)
    planner = Planner(small(8))
    plans = [
        planner.plan(job, Cluster(n, max(1, n // 8), GPUS["h100"], 80 * GB, 50 * GB)) for n in (2, 8, 64)
    ]
    weights = [plan.memory["weights"] for plan in plans]
    assert weights[0] > 3.5 * weights[1] > 3.5 * 7 * weights[2]
    assert plans[0].gathered < plans[1].gathered < plans[2].gathered
    # A short row on 64 GPUs in 8 nodes: fetching the weights takes longer than computing with them.
    assert plans[-1].seconds.bound == "communication"
    longer = dataclasses.replace(job, policy=dataclasses.replace(job.policy, dtype="bfloat16"), tokens=4000)
    assert planner.plan(longer, Cluster(8, 1, GPUS["h100"], 80 * GB, 50 * GB)).seconds.bound == "compute"


def test_waiting_for_other_nodes_is_told_with_what_helps(config, capsys):
    zero3 = ["--trainer.strategy", "zero3", "--data.batch_size", "16", "--shape", "gpt2", "--tokens", "16"]
    assert main(["plan", *config, *zero3, "--gpus", "16"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "communication bounds the step with zero3's hpz_partition_size: 8 weights are fetched within" in shown
    )


def test_second_copies_within_a_node_spare_the_network():
    job = job_for("x", strategy="zero3", batch_size=64)
    cluster, planner = Cluster(16, 2, GPUS["h100"], 80 * GB, 50 * GB), Planner(small())
    plain = planner.plan(job, cluster)
    copies = dataclasses.replace(job, zero=dataclasses.replace(job.zero, hpz_partition_size=8))
    spared = planner.plan(copies, cluster)
    assert spared.seconds.communication < plain.seconds.communication
    # Twice as much as a sixteenth.
    assert spared.memory["secondary weights"] == pytest.approx(2 * plain.memory["weights"], rel=0.02)


@pytest.mark.slow
def test_a_sweep_over_1_to_64_gpus(config, capsys):
    assert main(["plan", *config, "--shape", "gpt2", "--tokens", "64", "--sweep"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert sum("zero3" in line for line in shown.splitlines()) == 6
    assert main(["plan", *config, "--shape", "gpt2", "--tokens", "64", "--sweep", "--json"]) == 0
    assert [row["cluster"]["gpus"] for row in json.loads(capsys.readouterr().out)][-1] == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0"], "--gpus 0: is below 1"),
        (["--gpus", "many"], "gpus"),
        (["--gpu", "abacus"], "--gpu abacus: not known; give one of a10, "),
        (["--gpus", "3", "--nodes", "2"], "--nodes 2: does not divide --gpus 3"),
        (["--nodes", "0"], "--nodes 0: is below 1"),
        (["--gpus", "4"], "data.batch_size: 2 examples a step are fewer than 4 GPUs"),
        (["--gpu_memory", "-1"], "--gpu_memory: -1 GB is not above 0"),
        (["--tokens", "513"], "--tokens 513: the model has 512 positions"),
        (["--completion_tokens", "64"], "--completion_tokens 64: give 1 to 63"),
        (["--shape", "llama-9"], "--shape llama-9: not known; give one of llama-2-7b"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy: 'fsdp' cannot be planned"),
        (
            ["--gpus", "2", "--trainer.strategy", "single_device"],
            "trainer.strategy: one device, but --gpus is 2",
        ),
        (["--model.policy.base", "/nowhere"], "policy.base: /nowhere is no folder"),
        (["--model.policy.adapter", "null"], "reference.kind: 'shared' needs a frozen base"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(config, arguments, words, capsys):
    tokens = [] if "--tokens" in arguments else ["--tokens", "64"]
    assert main(["plan", *config, *tokens, *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1]
    assert said[-1].startswith("tandem: error: ")


def test_a_folder_without_config_json_is_named(config, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["plan", *config, "--tokens", "64", "--model.policy.base", str(tmp_path / "empty")]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_help_needs_no_config(capsys):
    assert main(["plan", "--help"]) == 0
    assert "--gpu_memory GB" in capsys.readouterr().out


def test_settings_of_the_hardware_are_taken_from_the_config(config):
    given = dataclasses.make_dataclass(
        "Given",
        [
            (name, object, None)
            for name in (
                "gpus",
                "nodes",
                "gpu",
                "gpu_memory",
                "network",
                "tokens",
                "completion_tokens",
                "shape",
                "sweep",
            )
        ],
    )()
    two_nodes = ["--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
    _, job, cluster = asked(given, [*config, *two_nodes])
    assert (cluster.gpus, cluster.nodes, job.strategy) == (2, 2, "ddp")
    assert (job.tokens, job.completion, job.at_once(2)) == (1024, 512, 1)
