"""The head on completion positions, in chunks: a row of logits stands in memory only while its chunk is worked on.

The log-prob of one token has a gradient that is known up to a factor as soon as its logits are,

    d log p(t | h) / d h = W[t] - sum_v p(v | h) W[v]        (softmax regression; Bishop 2006, equation 4.109),

and the factor, how much the loss moves with this log-prob, comes in the backward pass. So the forward pass keeps one
hidden-sized vector for each scored token, and the backward pass computes no logits. Where the head itself is trained
its logits are computed a second time there, in chunks as well.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainer.policy.kernels import accelerated
from trainer.policy.sharded import is_sharded

_CHUNK_BYTES = {"cpu": 32 << 20, "accelerator": 512 << 20}
"""Of float32 logits in one chunk: what stays near the CPU's caches, and what fills a GPU."""


def head_logps(
    head: nn.Module, hidden: Float[Tensor, "scored width"], tokens: Int[Tensor, " scored"], cap: float | None
) -> Float[Tensor, " scored"]:
    """log p of each token in float32 (nats) under the head's logits, soft-capped by `cap` where it is given.

    Logits are of the head's dtype, what follows them is float32. A plain linear head takes the short way; any other (an
    adapter on it) is called chunk by chunk and recomputed, under ZeRO-3 in one chunk.
    """
    if type(head) is nn.Linear:
        # The head's own forward, for this call: what hooks on it do (DeepSpeed gathers its weight there) happens once.
        head.forward = lambda given: _linear(head, given, tokens, cap)  # type: ignore[method-assign,assignment]
        try:
            return head(hidden)
        finally:
            del head.forward
    rows = _chunk_rows(getattr(head, "out_features", 1 << 17), hidden.device)
    if any(is_sharded(parameter) for parameter in head.parameters()):
        # Each call gathers, and ranks have to gather equally often, whatever they have to score.
        rows = max(1, len(hidden))
    parts = []
    for each, own in zip(hidden.split(rows), tokens.split(rows), strict=True):
        parts.append(checkpoint(_called, head, each, own, cap, use_reentrant=False))
    return torch.cat(parts)


def _linear(head: nn.Linear, hidden: Tensor, tokens: Tensor, cap: float | None) -> Tensor:
    rows = _chunk_rows(head.weight.shape[0], hidden.device)
    result: Tensor = _TokenLogps.apply(hidden, head.weight, head.bias, tokens, cap, rows)
    return result


def _called(head: nn.Module, hidden: Tensor, tokens: Tensor, cap: float | None) -> Tensor:
    logits = head(hidden)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return -nn.functional.cross_entropy(logits.float(), tokens, reduction="none")


def _chunk_rows(vocabulary: int, device: torch.device) -> int:
    size = _CHUNK_BYTES["accelerator" if accelerated(device) else "cpu"]
    return max(16, size // (4 * vocabulary))


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        cap: float | None,
        rows: int,
    ) -> Tensor:
        moved = ctx.needs_input_grad[0]
        logps = torch.empty(len(tokens), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if moved else None
        normalizers = torch.empty_like(logps)
        for start in range(0, len(tokens), rows):
            end = min(start + rows, len(tokens))
            own = tokens[start:end, None]
            logits = _logits(hidden[start:end], weight, bias, cap)
            highest = logits.amax(-1, keepdim=True).float()
            lower = logits.to(torch.float32, copy=cap is not None).sub_(highest)
            of_token = lower.gather(1, own)
            exps = lower.exp_()
            total = exps.sum(-1, keepdim=True)
            logps[start:end] = (of_token - total.log()).squeeze(1)
            normalizers[start:end] = (highest + total.log()).squeeze(1)
            if slopes is None:
                continue
            if cap is None:  # W[t] less the mean of W: divided after the product, which spares two passes
                mean = (exps.to(weight.dtype) @ weight).div_(total)
                slopes[start:end] = weight.index_select(0, own.squeeze(1)).sub_(mean)
            else:
                slope = _slope(exps.div_(total), own, logits, cap)
                torch.mm(slope.to(weight.dtype), weight, out=slopes[start:end])
        trained = [ctx.needs_input_grad[1] and weight, ctx.needs_input_grad[2] and bias]
        ctx.cap, ctx.rows, ctx.trained = cap, rows, any(each is not False for each in trained)
        kept = (hidden, weight, bias, tokens, normalizers) if ctx.trained else ()
        ctx.save_for_backward(slopes, *kept)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *kept = ctx.saved_tensors
        to_hidden = None if slopes is None else slopes.float().mul(gradient[:, None]).to(slopes.dtype)
        if not ctx.trained:
            return to_hidden, None, None, None, None, None
        hidden, weight, bias, tokens, normalizers = kept
        to_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        to_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for start in range(0, len(tokens), ctx.rows):
            end = min(start + ctx.rows, len(tokens))
            logits = _logits(hidden[start:end], weight, bias, ctx.cap)
            shares = logits.float().sub(normalizers[start:end, None]).exp_()
            slope = _slope(shares, tokens[start:end, None], logits, ctx.cap).mul_(gradient[start:end, None])
            to_weight += slope.to(weight.dtype).t() @ hidden[start:end]
            if to_bias is not None:
                to_bias += slope.sum(0)
        rounded = None if to_bias is None else to_bias.to(bias.dtype)
        return to_hidden, to_weight.to(weight.dtype), rounded, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _slope(shares: Tensor, tokens: Tensor, logits: Tensor, cap: float | None) -> Tensor:
    """d log p / d logits before the cap: one at the token, less the shares; `shares` is overwritten."""
    slope = shares.neg_().scatter_add_(1, tokens, torch.ones_like(tokens, dtype=shares.dtype))
    return slope if cap is None else slope.mul_(1 - (logits.float() / cap).square())
