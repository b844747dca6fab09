"""IA³'s own backward gives autograd's gradients and keeps fewer bytes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from tests.policy.test_layouts import pairs
from trainer.data.layout import prefix_shared
from trainer.policy import adapters
from trainer.policy.adapters import AdapterConfig, attach
from trainer.policy.logprobs import pair_logps
from trainer.policy.scales import gated_scaled, rounded, scaled
from trainer.schema import StepShare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", ["both", "activation", "scale"])
def test_scaled_has_autograds_gradients(dtype, moved: str) -> None:
    torch.manual_seed(0)
    found = []
    start = torch.randn(3, 5, 8).to(dtype), 1 + torch.randn(8) / 10
    weight = torch.randn(3, 5, 8)
    for compute in (scaled, lambda a, s: (a * s).to(a.dtype)):
        activation, scale = (part.clone() for part in start)
        activation.requires_grad_(moved != "scale")
        scale.requires_grad_(moved != "activation")
        (compute(activation, scale).float() * weight).sum().backward()
        found.append([part.grad for part in (activation, scale) if part.requires_grad])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0], found[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_block_has_autograds_gradients(act: str, dtype) -> None:
    torch.manual_seed(0)
    opened, weight = ACT2FN[act], torch.randn(4, 6, 8)
    start = torch.randn(4, 6, 8).to(dtype), torch.randn(4, 6, 8).to(dtype), 1 + torch.randn(8) / 10
    found = []
    for compute in (
        lambda gate, up, scale: gated_scaled(gate, up, scale, opened),
        lambda gate, up, scale: scaled(opened(gate) * up, scale),
    ):
        inputs = [part.clone().requires_grad_() for part in start]
        out = compute(*inputs)
        (out.float() * weight).sum().backward()
        found.append((out.detach(), [part.grad for part in inputs]))
    assert torch.equal(found[0][0], found[1][0])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0][1], found[1][1], atol=tolerance, rtol=tolerance)


def kept_bytes(folder, monkeypatch, blocks: tuple[str, ...]) -> int:
    """Bytes that a forward keeps for its backward, weights aside."""
    monkeypatch.setattr(adapters, "_GATED_BLOCKS", blocks)
    policy = attach(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tandem"), AdapterConfig()
    )
    there = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = pair_logps(policy, prefix_shared(pairs([(40, 30, 30)]), 0, StepShare(1.0, 1.0, True)))
        loss = (logps.chosen - logps.rejected).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "mistral"])
def test_gated_blocks_keep_fewer_bytes(models, family: str, monkeypatch) -> None:
    folder, names = models(family), adapters._GATED_BLOCKS
    assert kept_bytes(folder, monkeypatch, names) < 0.95 * kept_bytes(folder, monkeypatch, ())


def test_rounding_with_noise_keeps_the_mean_and_exact_numbers() -> None:
    activation = torch.full((100_000,), 1.5, dtype=torch.bfloat16)
    product = activation * torch.tensor([1.001])
    assert rounded(product, activation).float().mean().item() == pytest.approx(1.5015, rel=1e-4)
    assert torch.equal(rounded(activation.float(), activation), activation)


def test_merged_and_unloaded_models_go_the_plain_way(tiny_llama) -> None:
    policy = attach(AutoModelForCausalLM.from_pretrained(tiny_llama), AdapterConfig())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = policy(ids).logits
        plain = policy.merge_and_unload()
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-5)
