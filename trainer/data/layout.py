"""How examples are laid into rows for one forward. `concatenated`: one padded row for each completion."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainer.schema import (
    PreferenceBatch,
    Rows,
    StepShare,
    SupervisedBatch,
    TokenizedDemonstration,
    TokenizedPreference,
)


def padded_rows(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> Rows:
    """(prompt, completion) token ids as right-padded rows, one each, every completion token scored.

    A completion's token in column c is predicted by the hidden state in column c - 1, so the prompt must not be empty.
    """
    time = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), time), pad_token_id)
    attention_mask = torch.zeros((len(sequences), time), dtype=torch.long)
    positions, tokens, owners = [], [], []
    for row, (prompt, completion) in enumerate(sequences):
        assert prompt, "an empty prompt predicts nothing"
        length = len(prompt) + len(completion)
        input_ids[row, :length] = torch.tensor(prompt + completion)
        attention_mask[row, :length] = 1
        first = row * time + len(prompt) - 1
        positions.append(torch.arange(first, first + len(completion)))
        tokens.append(torch.tensor(completion))
        owners.append(torch.full((len(completion),), row))
    return Rows(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=torch.arange(time).expand(len(sequences), time).contiguous(),
        scored_positions=torch.cat(positions),
        scored_tokens=torch.cat(tokens),
        scored_sequence=torch.cat(owners),
        sequences=len(sequences),
        tokens=int(attention_mask.sum()),
    )


def concatenated(
    pairs: Sequence[TokenizedPreference], pad_token_id: int, share: StepShare
) -> PreferenceBatch:
    """All chosen rows, then all rejected rows, padded to one length, for one concatenated forward."""
    chosen = [(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [(pair.prompt, pair.rejected) for pair in pairs]
    rows = padded_rows(chosen + rejected, pad_token_id)
    return PreferenceBatch(rows=rows, pairs=len(pairs), ids=[pair.id for pair in pairs], share=share)


def supervised(
    examples: Sequence[TokenizedDemonstration], pad_token_id: int, share: StepShare
) -> SupervisedBatch:
    """Demonstrations as padded rows, their completions scored."""
    rows = padded_rows([(example.prompt, example.completion) for example in examples], pad_token_id)
    return SupervisedBatch(rows=rows, ids=[example.id for example in examples], share=share)
