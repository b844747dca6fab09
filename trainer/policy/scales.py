"""IA³'s multiplication by learned scales, forward and backward, keeping as little as it can.

Frozen matrices keep none of their inputs, so what IA³ keeps is the activation that it scales. In a gated feed-forward
block, down(act(gate) * up * scale), that product is not kept at all: it follows from gate and up, which are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Act = Callable[[Tensor], Tensor]


def scaled(
    activation: Float[Tensor, "*batch features"], scale: Float[Tensor, " features"]
) -> Float[Tensor, "*batch features"]:
    """activation * scale in the activation's dtype; a bfloat16 result is rounded with noise (see `rounded`)."""
    result: Tensor = _Scaled.apply(activation, scale)
    return result


def gated_scaled(
    gate: Float[Tensor, "*batch features"],
    up: Float[Tensor, "*batch features"],
    scale: Float[Tensor, " features"],
    act: Act,
) -> Float[Tensor, "*batch features"]:
    """act(gate) * up * scale, of which `gate` and `up` alone are kept for the backward pass."""
    result: Tensor = _GatedScaled.apply(gate, up, scale, act)
    return result


def rounded(product: Tensor, activation: Tensor) -> Tensor:
    """A product in the dtype of the activation that was scaled.

    float32 to bfloat16 goes up or down with odds that keep the mean, and stays exact where the product is a bfloat16
    number: rounded to the nearest, `x * 1.001` would be `x` again for *every* bfloat16 x. The noise is a hash of the
    feature's index and of the activation before scaling. So it is the same in every batch, layout and rank, in a
    recomputed forward and for policy and reference, and the result never falls as a scale grows.
    """
    if activation.dtype != torch.bfloat16 or product.dtype != torch.float32:
        return product.to(activation.dtype)
    feature = torch.arange(activation.shape[-1], dtype=torch.int16, device=activation.device) * 25033
    # Multiplied by odd numbers (near 2^16 over the golden ratio, and over its square), modulo 2^16: each feature, and
    # each activation, has noise that is spread evenly. It is signed, hence the half.
    noise = torch.add(feature, activation.contiguous().view(torch.int16), alpha=-24943)
    # The upper half of a float32 is a bfloat16.
    summed = (
        noise.to(torch.int32).add_(product.contiguous().view(torch.int32)).add_(0x8000).bitwise_and_(-65536)
    )
    return summed.view(torch.float32).to(torch.bfloat16)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: Tensor, scale: Tensor) -> Tensor:
        to_activation, to_scale = ctx.needs_input_grad
        ctx.dtype = activation.dtype
        ctx.save_for_backward(activation if to_scale else None, scale if to_activation else None)
        return rounded(_product(activation, scale), activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        activation, scale = ctx.saved_tensors
        to_activation = None if scale is None else _product(gradient, scale).to(ctx.dtype)
        return to_activation, None if activation is None else _to_scale(gradient * activation)


class _GatedScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, scale: Tensor, act: Act) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up, scale)
        product = act(gate) * up
        return rounded(_product(product, scale), product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, scale = ctx.saved_tensors
        to_gate, to_up, to_scale, _ = ctx.needs_input_grad
        with torch.enable_grad():
            own = gate.detach().requires_grad_(to_gate)
            opened = ctx.act(own)
        result: list[Tensor | None] = [None, None, None, None]
        if to_scale:
            result[2] = _to_scale((opened.detach() * up).mul_(gradient))
        if to_gate or to_up:
            to_product = _product(gradient, scale).to(gate.dtype)
            result[1] = to_product * opened.detach() if to_up else None
            result[0] = torch.autograd.grad(opened, own, to_product.mul_(up))[0] if to_gate else None
        return tuple(result)


def _to_scale(products: Tensor) -> Tensor:
    """Products of gradient and activation, rounded as these were, summed in float32 over all but the features."""
    return products.flatten(0, -2).sum(0, dtype=torch.float32)


def _product(activation: Tensor, scale: Tensor) -> Tensor:
    # Cast first: a product of two dtypes is thirty times slower on a CPU (torch 2.13).
    if activation.dtype == scale.dtype:
        return activation * scale
    return activation.to(scale.dtype).mul_(scale)
