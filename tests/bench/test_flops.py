"""Operations: worked out by hand, counted, and both alike where nothing is wasted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from launch.bench.flops import counted, layer_weights, matmul_rate, useful_flops

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_weights_of_the_layers_by_hand():
    model = AutoModelForCausalLM.from_config(CONFIG)
    attention, feedforward = 2 * 16 * 16 + 2 * 16 * 8, 3 * 16 * 24
    assert layer_weights(model) == 3 * (attention + feedforward)


def test_useful_operations_by_hand():
    # 3 + 2 / 1 tokens: 6 distinct, 3 scored; triangles of 6, 3 and 1, and the answers see the prompt 3 x 3 times.
    expected = 4 * 1000 * 6 + 4 * 16 * 100 * 3 + 12 * 16 * 3 * (6 + 3 + 1 + 9)
    assert useful_flops(CONFIG, 1000, [(3, 2, 1)]) == expected
    assert useful_flops(CONFIG, 1000, [(3, 2, 1)] * 5) == 5 * expected


def test_counting_matrix_products_forward_and_backward():
    layer = nn.Linear(8, 4, bias=False).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    with counted() as found:
        layer(x).sum().backward()
    # The weights are frozen: two products of 2 x 5 x 8 x 4, not three.
    assert found["flops"] == 2 * 2 * 5 * 8 * 4


class Recomputed(torch.autograd.Function):
    """A product that is computed once more in its backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            return torch.autograd.grad(again @ weight, again, gradient)[0], None


def test_counting_a_backward_pass_within_a_backward_pass():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(5, 8, requires_grad=True)
    with counted() as found:
        Recomputed.apply(layer(x), torch.randn(8, 4)).sum().backward()
    # The layer: one product forward, two backward; the other one twice, and its gradient.
    assert found["flops"] == 2 * 5 * 8 * 8 * 3 + 2 * 5 * 8 * 4 * 3


def test_counting_attention_on_the_cpu():
    query, key, value = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with counted() as found:
        nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
    product = 2 * 2 * 6 * 6 * 8
    # Two products forward; backward four, and the scores once more.
    assert found["flops"] == pytest.approx(7 * product)


def test_the_machine_multiplies():
    assert matmul_rate("float32", "cpu", seconds=0.001, sizes=(256,)) > 1e8
