"""Weights and optimizer exact to the byte, activations against saved-tensor hooks, on real tiny models."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.planning.real import job_for, planner_for, saved_bytes, with_checkpointing
from trainer.optimization import OptimizerConfig, build_optimizer
from trainer.planning.fixed import fixed_bytes, optimizer_bytes
from trainer.planning.hardware import GB, GPUS, Cluster
from trainer.planning.model import build_models
from trainer.planning.plan import Planner
from trainer.planning.shapes import SHAPES, published
from trainer.policy.base import PolicyConfig
from trainer.policy.load import AdapterConfig, load_policy
from trainer.policy.reference import ReferenceConfig, build_reference

LORA = AdapterConfig(kind="lora", r=4)


def bytes_of(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["shared", "sharded"])
def test_weights_and_reference_are_exact(models, family, dtype, kind):
    for adapter in (AdapterConfig(), LORA):
        reference = ReferenceConfig(kind=kind)
        job = job_for(models(family), adapter=adapter, dtype=dtype, reference=reference)
        policy = load_policy(job.policy)
        real = build_reference(reference, job.policy, policy)
        planned, host = fixed_bytes(job, 1, planner_for(job).models(job).weights())
        trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
        assert host == 0
        assert planned["weights"] + planned["adapter"] == bytes_of(policy)
        assert planned["adapter"] == planned["gradients"] == trained > 0
        assert planned["reference"] == (0 if real.model is None else bytes_of(real.model))


def test_all_weights_and_their_state_are_exact(tiny_llama):
    job = job_for(tiny_llama, adapter=None, reference=ReferenceConfig(kind="sharded"))
    policy = load_policy(job.policy)
    planned, _ = fixed_bytes(job, 1, planner_for(job).models(job).weights())
    assert planned["weights"] == planned["gradients"] == planned["reference"] == bytes_of(policy)
    assert planned["optimizer"] == state_bytes(job.optimizer, list(policy.parameters()))


def state_bytes(config: OptimizerConfig, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of every tensor in a real optimizer's state after one step."""
    optimizer = build_optimizer(config, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig("adamw"),
        OptimizerConfig("rmsprop"),
        OptimizerConfig("rmsprop", momentum=0.9),
        OptimizerConfig("sgd"),
        OptimizerConfig("sgd", momentum=0.9),
        OptimizerConfig("adafactor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(7,), (12, 1), (6, 10)], ids=str)
def test_optimizer_state_is_exact(config, shape):
    for dtype in (torch.float32, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        planned = optimizer_bytes(config, shape, parameter.element_size())
        assert planned == state_bytes(config, [parameter]), dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [AdapterConfig(), LORA, None], ids=["ia3", "lora", "all"])
def test_activations_are_what_saved_tensor_hooks_count(models, family, dtype, adapter):
    plain = job_for(models(family), adapter=adapter, dtype=dtype, reference=ReferenceConfig(kind="sharded"))
    for layout in ("prefix_shared", "concatenated"):
        laid = dataclasses.replace(plain, layout=layout)
        for job in (laid, with_checkpointing(laid)):
            planned = sum(planner_for(job).trace(job, 1).saved.values())
            assert planned == pytest.approx(saved_bytes(job, examples=2), rel=0.1), job.policy
        # Else the second half would show nothing.
        assert saved_bytes(with_checkpointing(laid), 2) < 0.7 * saved_bytes(laid, 2)


def test_what_few_examples_show_holds_for_many(tiny_llama):
    job = job_for(tiny_llama, batch_size=7)
    planner = planner_for(job)
    quick, whole = planner.trace(job, 1), planner._traced(job, 7)
    assert sum(quick.peak.values()) == pytest.approx(sum(whole.peak.values()), rel=0.01)
    assert sum(quick.saved.values()) == pytest.approx(sum(whole.saved.values()), rel=0.01)
    assert quick.flops == whole.flops


def test_flops_are_the_known_formulas():
    """2 N T for a forward and, with frozen weights, for a backward; 4 N T where weights need gradients too."""
    shape = published("llama-2-7b")
    shape.num_hidden_layers, shape.vocab_size = 8, 320
    tokens, flops = 2 * 64, {}
    for name, adapter in (("frozen", AdapterConfig()), ("trained", None)):
        job = job_for("x", adapter=adapter, reference=None, tokens=64, completion=32)
        planner = Planner(shape)
        flops[name] = planner.trace(job, 1).flops
    layers = sum(
        p.numel()
        for n, p in build_models(shape, PolicyConfig("x", None), None).policy.named_parameters()
        if "layers" in n
    )
    assert flops["frozen"]["policy"] == pytest.approx(2 * layers * tokens, rel=0.03)
    # The first layer's queries, keys and values come from what needs no gradient: 3 % of eight layers' products.
    assert flops["frozen"]["backward"] == pytest.approx(2 * layers * tokens, rel=0.05)
    assert flops["trained"]["backward"] == pytest.approx(4 * layers * tokens, rel=0.03)
    assert flops["frozen"]["reference"] == 0


PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
}


def test_shapes_have_the_published_numbers_of_parameters():
    found = {
        name: sum(
            w.numel for w in build_models(published(name), PolicyConfig(name, None), None).weights()["policy"]
        )
        for name in SHAPES
    }
    assert found == PUBLISHED


def test_one_gpu_of_llama_2_7b():
    """The parts of a plan sum up, and are of the size that people meet: 13.5 GB of weights in bfloat16."""
    job = job_for("llama-2-7b", dtype="bfloat16", tokens=512, completion=256, reference=ReferenceConfig())
    plan = Planner(published("llama-2-7b")).plan(job, Cluster(1, 1, GPUS["h100"], 80 * GB, GB))
    assert plan.memory["weights"] == 2 * 6_738_415_616
    assert plan.parameters.trained == 614_400
    assert plan.total == sum(plan.memory.values())
    assert plan.fits
    assert plan.seconds.bound == "compute"
    assert plan.gathered == plan.reduced == 0
