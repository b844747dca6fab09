"""A batch of pairs laid out by hand: two pairs, rows right-padded, prompts of unequal length."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.schema import PreferenceBatch, Rows, StepShare

PAIRS = [([1, 30, 31, 32], [40, 41, 2], [42, 2]), ([1, 50], [51, 52, 53, 2], [54, 55, 2])]


def pair_batch() -> PreferenceBatch:
    """Chosen rows first, then rejected, as `PreferenceBatch` says."""
    sequences = [(p, c) for p, c, _ in PAIRS] + [(p, r) for p, _, r in PAIRS]
    time = max(len(p) + len(c) for p, c in sequences)
    ids = torch.zeros(len(sequences), time, dtype=torch.long)
    mask, positions, tokens, owners = torch.zeros_like(ids), [], [], []
    for row, (prompt, completion) in enumerate(sequences):
        whole = prompt + completion
        ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
        for offset, token in enumerate(completion):
            positions.append(row * time + len(prompt) + offset - 1)
            tokens.append(token)
            owners.append(row)
    rows = Rows(
        ids,
        mask,
        torch.arange(time).expand_as(ids).clone(),
        torch.tensor(positions),
        torch.tensor(tokens),
        torch.tensor(owners),
        len(sequences),
        int(mask.sum()),
    )
    return PreferenceBatch(rows, len(PAIRS), ["a", "b"], StepShare(1.0, 1.0, True))


def logits(model: torch.nn.Module, count: int = 12) -> Tensor:
    """Logits of two fixed rows."""
    ids = torch.arange(2 * count).view(2, count) * 7 % 200 + 3
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
