"""Floating-point operations: what a pair needs at least, what an arm spends, what the machine can do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}


def useful_flops(config: Any, weights: int, lengths: Iterable[Sequence[int]]) -> float:
    """What training an adapter on pairs of these lengths takes at least, once each, with a cached reference.

    `weights`: those of the layers' matrices (`layer_weights`). `lengths`: tokens of prompt, chosen and rejected.

    4N for each distinct token (the prompt once), N the weights: 2N forward, 2N for the
    gradient that passes through frozen weights. The head's 4 x hidden x vocabulary for each completion token.
    Attention's 12 x width x layers for each (query, key) that sees each other: two products forward, four backward.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    total = 0.0
    for prompt, chosen, rejected in lengths:
        seen = sum(n * (n + 1) / 2 for n in (prompt, chosen, rejected)) + prompt * (chosen + rejected)
        total += 4.0 * weights * (prompt + chosen + rejected)
        total += 4.0 * hidden * config.vocab_size * (chosen + rejected)
        total += 12.0 * width * config.num_hidden_layers * seen
    return total


def layer_weights(model: Any) -> int:
    """Weights of a model's matrices, without embeddings and head."""
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in ends)


def count_of(flops: int, model: str, lengths: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What an arm reports of operations that were counted over pairs of these lengths."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        weights = layer_weights(AutoModelForCausalLM.from_config(config))
    useful = useful_flops(config, weights, lengths)
    return {"flops": flops, "useful_flops": useful, "pairs": len(lengths)}


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Inside, matrix products and attention are counted; the sum is in `["flops"]` afterwards."""
    from torch.utils.flop_counter import FlopCounterMode

    found = {"flops": 0}
    counter = FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    # torch 2.13's tracker of modules cannot bear `autograd.grad` inside a backward pass; nothing is asked by module.
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        yield found
    found["flops"] = int(counter.get_total_flops())


class _NoModules(contextlib.nullcontext):
    """In the place of torch's tracker: everything is counted as one."""

    parents = ("Global",)


def _cpu_attention() -> dict[Any, Any]:
    """torch 2.13 knows the cost of CUDA's attention kernels, not that of the CPU's: the same products."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def matmul_rate(dtype: str, device: str, seconds: float = 1.0, sizes: Sequence[int] | None = None) -> float:
    """FLOP/s of the best of several big matrix products on this machine in that dtype."""
    kind = getattr(torch, dtype)
    best = 0.0
    for size in sizes or _SIZES[device]:
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        for right in (b, b.t()):
            best = max(best, 2.0 * size**3 / _fastest(a, right, device, seconds / 2))
        del a, b
    return best


def _fastest(a: Tensor, b: Tensor, device: str, seconds: float) -> float:
    """Seconds of the fastest of many products, after one that warms up."""
    times: list[float] = []
    _ = a @ b
    synchronize(device)
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        start = time.perf_counter()
        _ = a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
