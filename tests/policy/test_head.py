"""The head in chunks gives the log-probs and gradients that plain logits give, and never holds them whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.policy import head as heads


def plain(head: nn.Linear, hidden: torch.Tensor, tokens: torch.Tensor, cap: float | None) -> torch.Tensor:
    logits = head(hidden)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("adapted", [False, True], ids=["linear", "another module"])
def test_chunks_equal_plain_logits(monkeypatch, cap, bias: bool, trained: bool, adapted: bool) -> None:
    monkeypatch.setattr(heads, "_CHUNK_BYTES", {"cpu": 16 * 4 * 101})
    torch.manual_seed(0)

    class Adapted(nn.Linear):
        pass

    head = (Adapted if adapted else nn.Linear)(12, 101, bias=bias).requires_grad_(trained)
    tokens = torch.randint(0, 101, (37,))
    weights = torch.randn(37)
    found = []
    for compute in (plain, heads.head_logps):
        hidden = torch.linspace(-3, 3, 37 * 12).view(37, 12).sin().mul(4).requires_grad_()
        head.zero_grad()
        logps = compute(head, hidden, tokens, cap)
        (logps * weights).sum().backward()
        gradients = [hidden.grad, *(p.grad.clone() for p in head.parameters() if trained)]
        found.append((logps.detach(), gradients))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(head)


def test_extreme_logits_stay_finite() -> None:
    head = nn.Linear(4, 50, bias=False)
    hidden = (torch.randn(6, 4) * 1e4).requires_grad_()
    logps = heads.head_logps(head, hidden, torch.arange(6), None)
    logps.sum().backward()
    assert bool(logps.isfinite().all())
    assert bool(hidden.grad.isfinite().all())


def test_logits_never_stand_whole(monkeypatch) -> None:
    """The largest tensor that any operator makes, forward and backward, is one chunk's."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.numel = max([self.numel, *sizes])
            return result

    vocabulary, scored = 128_000, 256
    monkeypatch.setattr(heads, "_CHUNK_BYTES", {"cpu": 32 * 4 * vocabulary})
    head = nn.Linear(8, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(scored, 8, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (scored,))
    with Largest() as seen:
        heads.head_logps(head, hidden, tokens, None).sum().backward()
    assert seen.numel == 32 * vocabulary


def test_bfloat16_head_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False).to(torch.bfloat16)
    hidden, tokens = torch.randn(20, 64, dtype=torch.bfloat16), torch.arange(20)
    found = heads.head_logps(head, hidden, tokens, None)
    expected = head(hidden).float().log_softmax(-1)[torch.arange(20), tokens]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
