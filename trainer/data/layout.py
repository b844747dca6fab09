"""How examples are laid into rows for one forward.

`prefix_shared`: a pair is one segment, prompt | chosen | rejected, and segments stand back to back in one row without
padding; the prompt is computed once. `concatenated`: one padded row for each completion. Both give the same log-probs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from trainer.schema import (
    PreferenceBatch,
    Rows,
    Segment,
    StepShare,
    SupervisedBatch,
    TokenizedDemonstration,
    TokenizedPreference,
)


def packed_row(examples: Sequence[tuple[list[int], Sequence[list[int]]]]) -> Rows:
    """Examples (prompt, completions) back to back in one row; completion c of example e is sequence c * examples + e.

    Each completion's positions go on from its prompt's. The prompt's last token predicts the first of every completion.
    """
    ids: list[int] = []
    positions, scored, tokens, owners, segments = [], [], [], [], []
    for number, (prompt, completions) in enumerate(examples):
        assert prompt, "an empty prompt predicts nothing"
        assert all(completions), "an empty completion has nothing to score"
        start = len(ids)
        ids += prompt
        positions.append(torch.arange(len(prompt)))
        for turn, completion in enumerate(completions):
            first = len(ids)
            ids += completion
            positions.append(torch.arange(len(prompt), len(prompt) + len(completion)))
            scored.append(torch.arange(first - 1, first + len(completion) - 1))
            scored[-1][0] = start + len(prompt) - 1
            tokens.append(torch.tensor(completion))
            owners.append(torch.full((len(completion),), turn * len(examples) + number))
        segments.append(Segment(0, start, len(prompt), tuple(map(len, completions))))
    return Rows(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones((1, len(ids)), dtype=torch.long),
        position_ids=torch.cat(positions)[None],
        scored_positions=torch.cat(scored),
        scored_tokens=torch.cat(tokens),
        scored_sequence=torch.cat(owners),
        sequences=sum(len(completions) for _, completions in examples),
        tokens=len(ids),
        segments=tuple(segments),
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


def content_key(pair: TokenizedPreference) -> bytes:
    """16 bytes that stand for a pair's token ids: BLAKE2b of prompt, chosen and rejected, each with its length."""
    parts = (pair.prompt, pair.chosen, pair.rejected)
    ids = np.array([number for part in parts for number in (len(part), *part)], dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def concatenated(
    pairs: Sequence[TokenizedPreference], pad_token_id: int, share: StepShare
) -> PreferenceBatch:
    """All chosen rows, then all rejected rows, padded to one length, for one concatenated forward."""
    chosen = [(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [(pair.prompt, pair.rejected) for pair in pairs]
    return _pairs(padded_rows(chosen + rejected, pad_token_id), pairs, share)


def prefix_shared(
    pairs: Sequence[TokenizedPreference], pad_token_id: int, share: StepShare
) -> PreferenceBatch:
    """Each pair as prompt | chosen | rejected, back to back in one row; nothing is padded."""
    return _pairs(packed_row([(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]), pairs, share)


def _pairs(rows: Rows, pairs: Sequence[TokenizedPreference], share: StepShare) -> PreferenceBatch:
    keys = [content_key(pair) for pair in pairs]
    return PreferenceBatch(rows, len(pairs), [pair.id for pair in pairs], share, keys)


def supervised(
    examples: Sequence[TokenizedDemonstration], pad_token_id: int, share: StepShare
) -> SupervisedBatch:
    """Demonstrations as padded rows, their completions scored, and what their marks say."""
    rows = padded_rows([(example.prompt, example.completion) for example in examples], pad_token_id)
    rows = _marked(rows, [example.marks for example in examples])
    return SupervisedBatch(rows=rows, ids=[example.id for example in examples], share=share)


def packed(
    examples: Sequence[TokenizedDemonstration], pad_token_id: int, share: StepShare
) -> SupervisedBatch:
    """Demonstrations back to back in one row; nothing is padded."""
    rows = packed_row([(example.prompt, (example.completion,)) for example in examples])
    rows = _marked(rows, [example.marks for example in examples])
    return SupervisedBatch(rows=rows, ids=[example.id for example in examples], share=share)


def _marked(rows: Rows, marks: Sequence[list[int]]) -> Rows:
    """Rows of one completion for each prompt, whose marked prompt tokens are scored, too; see `TokenizedDemonstration`.

    They stand behind the others in `scored_...`; the order makes no difference to sums.
    """
    if not any(marks):
        return rows
    time = rows.input_ids.shape[1]
    starts = (
        [row * time for row in range(len(marks))]
        if rows.segments is None
        else [segment.row * time + segment.start for segment in rows.segments]
    )
    where, owners = [], []
    for number, (start, own) in enumerate(zip(starts, marks, strict=True)):
        assert not own[:1] or not own[0], "nothing predicts a prompt's first token"
        found = torch.tensor(own, dtype=torch.long).nonzero()[:, 0] + start
        where.append(found)
        owners.append(torch.full_like(found, number))
    places = torch.cat(where)
    return dataclasses.replace(
        rows,
        scored_positions=torch.cat([rows.scored_positions, places - 1]),
        scored_tokens=torch.cat([rows.scored_tokens, rows.input_ids.flatten()[places]]),
        scored_sequence=torch.cat([rows.scored_sequence, *owners]),
    )


def _marks(rows: Rows) -> list[list[int]]:
    """The marks of packed rows' prompts, one list for each segment; empty where nothing is marked."""
    assert rows.segments is not None
    scored, time = rows.scored_positions.cpu(), rows.input_ids.shape[1]
    found = []
    for segment in rows.segments:
        # A prompt's last token predicts the completion: what the others predict is the prompt's own.
        first = segment.row * time + segment.start
        own = scored[(scored >= first) & (scored < first + segment.prompt - 1)] - first + 1
        marks = torch.zeros(segment.prompt, dtype=torch.long)
        marks[own] = 1
        found.append(marks.tolist() if len(own) else [])
    return found


# --- one layout from another --------------------------------------------------------------------------------


def separated(rows: Rows, pad_token_id: int) -> Rows:
    """Packed rows as `padded_rows` lays the same sequences: for models that cannot attend to packed ones."""
    assert rows.segments is not None
    found: list[tuple[list[int], list[int]]] = [([0], [0])] * rows.sequences
    for number, segment in enumerate(rows.segments):
        prompt, completions = _example(rows, segment)
        for turn, completion in enumerate(completions):
            found[turn * len(rows.segments) + number] = (prompt, completion)
    again, marks = padded_rows(found, pad_token_id), _marks(rows)
    return _moved(_marked(again, marks) if any(marks) else again, rows.input_ids.device)


def picked(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Some segments of one packed row, as a packed row."""
    examples = [_example(rows, rows.segments[number]) for number in numbers]  # type: ignore[index]
    marks = _marks(rows)
    return _moved(_marked(packed_row(examples), [marks[n] for n in numbers]), rows.input_ids.device)


def altered(rows: Rows) -> Rows:
    """A packed row with other tokens wherever the last segment's last completion must not look.

    Each token becomes the next larger one of the row, the largest the least.
    """
    assert rows.segments is not None
    ids = sorted({*rows.input_ids.flatten().tolist()})
    other = dict(zip(ids, ids[1:] + ids[:1], strict=True))
    examples = [_example(rows, segment) for segment in rows.segments]
    *before, (prompt, completions) = examples
    changed = [([other[i] for i in own], [[other[i] for i in each] for each in all_]) for own, all_ in before]
    changed.append((prompt, [[other[i] for i in each] for each in completions[:-1]] + completions[-1:]))
    return _moved(_marked(packed_row(changed), _marks(rows)), rows.input_ids.device)


def _example(rows: Rows, segment: Segment) -> tuple[list[int], list[list[int]]]:
    own = rows.input_ids[segment.row, segment.start : segment.start + segment.tokens].cpu()
    prompt, *completions = own.split([segment.prompt, *segment.completions])
    return prompt.tolist(), [completion.tolist() for completion in completions]


def spread(rows: Rows, row_tokens: int) -> Rows:
    """One packed row as several of at most `row_tokens` (or the longest segment), padded: for masks of whole rows.

    Segments fall into the fullest row that has room, the longest first.
    """
    assert rows.segments is not None
    assert len(rows.input_ids) == 1
    room = max(row_tokens, max(segment.tokens for segment in rows.segments))
    filled: list[int] = []
    placed: list[Segment] = [None] * len(rows.segments)  # type: ignore[list-item]
    for number in sorted(range(len(placed)), key=lambda n: -rows.segments[n].tokens):  # type: ignore[index]
        segment = rows.segments[number]
        fitting = [row for row, used in enumerate(filled) if used + segment.tokens <= room]
        row = max(fitting, key=lambda row: filled[row], default=len(filled))
        if row == len(filled):
            filled.append(0)
        placed[number] = segment._replace(row=row, start=filled[row])
        filled[row] += segment.tokens
    time = max(filled)
    device = rows.input_ids.device
    new = [torch.arange(s.tokens) + s.row * time + s.start for s in placed]
    where = torch.cat(new).to(device)

    def laid(values: Tensor) -> Tensor:
        return values.new_zeros(len(filled) * time).index_copy(0, where, values[0]).view(len(filled), time)

    return dataclasses.replace(
        rows,
        input_ids=laid(rows.input_ids),
        attention_mask=laid(rows.attention_mask),
        position_ids=laid(rows.position_ids),
        scored_positions=where[rows.scored_positions],
        segments=tuple(placed),
    )


def places(rows: Rows) -> tuple[Int[Tensor, "row time"], Int[Tensor, "row time"], Int[Tensor, "row time"]]:
    """For each column of packed rows: its segment's number, its branch, its position.

    The branch is 0 in a prompt and c + 1 in completion c. Padding is a segment of its own.
    """
    assert rows.segments is not None
    example = torch.full(rows.input_ids.shape, -1)
    branch = torch.zeros_like(example)
    for number, segment in enumerate(rows.segments):
        end = segment.start + segment.prompt
        example[segment.row, segment.start : segment.start + segment.tokens] = number
        for turn, length in enumerate(segment.completions):
            branch[segment.row, end : end + length] = turn + 1
            end += length
    return example, branch, rows.position_ids.cpu()


def _moved(rows: Rows, device: torch.device) -> Rows:
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(rows).items() if isinstance(value, Tensor)
    }
    return dataclasses.replace(rows, **tensors)
