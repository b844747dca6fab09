"""The records and tensors that every floor speaks of: shapes and words are stated once, here.

Records (before tokenisation): `Demonstration`, `Preference`. Token ids: `TokenizedDemonstration` and
`TokenizedPreference`. Tensors: `Rows` (what goes through the model), `PreferenceBatch`, `SupervisedBatch`, and
`PairLogps` (what comes out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

from jaxtyping import Float, Int
from torch import Tensor

Split = Literal["train", "validation", "test"]


class UserError(ValueError):
    """What a user gave wrong: one line that names the file, field and value, and says what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


def failure(error: Exception) -> str:
    """What went wrong in a user's own code: an error's type and the first line of its text."""
    text = str(error).strip().split("\n")[0]
    return type(error).__name__ + (f": {text}" if text else "")


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


ScoredTurns = Literal["last", "all"]
"""Which of the assistant's turns in a chat are imitated."""

Text = str | Sequence[Message]
"""Plain text, or the turns of a chat."""


@dataclasses.dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the completion to imitate. `origin` says where it stood (file and row), for messages.

    A completion that was cut (`finished` false) did not end: no EOS is put behind it. With `scored_turns` all, the
    assistant's earlier turns in the prompt are imitated, too.
    """

    prompt: Text
    completion: Text
    id: str
    origin: str = ""
    finished: bool = True
    scored_turns: ScoredTurns = "last"


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and two completions, of which `chosen` is the better. `origin` says where it stood.

    A completion that was cut (`..._finished` false) did not end: no EOS is put behind it.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    id: str
    origin: str = ""
    chosen_finished: bool = True
    rejected_finished: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedDemonstration:
    """`prompt` opens with BOS (where the tokenizer has one), `completion` closes with EOS unless it was cut.

    It was cut where the record says so (`finished`), or by `Limits`. `marks`: for each of the prompt's tokens 1 where
    it is scored, too, as part of an earlier answer, else 0; empty where none is. The first is never scored.
    """

    prompt: list[int]
    completion: list[int]
    id: str
    marks: list[int] = dataclasses.field(default_factory=list)

    @property
    def scored(self) -> int:
        """How many of its tokens are scored."""
        return len(self.completion) + sum(self.marks)

    @property
    def longest(self) -> int:
        """Tokens of its row."""
        return len(self.prompt) + len(self.completion)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedPreference:
    """`prompt` opens with BOS (where the tokenizer has one), both completions close with EOS unless cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    id: str

    @property
    def scored(self) -> int:
        """How many tokens a token-weighted loss counts: those of the chosen."""
        return len(self.chosen)

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two rows."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Segment(NamedTuple):
    """One example in a packed row: its prompt's tokens, then each completion's, back to back from column `start`.

    Every completion follows the prompt in position and in what it sees; completions do not see each other.
    """

    row: int
    start: int
    prompt: int
    completions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Columns that it takes."""
        return self.prompt + sum(self.completions)


@dataclasses.dataclass
class Rows:
    """What one forward pass reads, whatever the layout.

    Without `segments` each row is one sequence, padded at its end. With them rows hold several examples side by side,
    and attention has to keep them apart.

    The hidden state at flat position `scored_positions[i]` (row * time + column) predicts `scored_tokens[i]`, which
    belongs to completion `scored_sequence[i]` of `sequences`.

    Raises:
        ValueError: positions that begin anew within a row without segments.
    """

    input_ids: Int[Tensor, "row time"]
    attention_mask: Int[Tensor, "row time"]
    position_ids: Int[Tensor, "row time"]
    scored_positions: Int[Tensor, " scored"]
    scored_tokens: Int[Tensor, " scored"]
    scored_sequence: Int[Tensor, " scored"]
    sequences: int
    tokens: int
    segments: tuple[Segment, ...] | None = None

    def __post_init__(self) -> None:
        # transformers takes positions that begin anew for packed sequences where there is no mask, and computes others.
        if self.segments is None and self.position_ids.shape[1] > 1:
            anew = (self.position_ids[:, 1:] <= self.position_ids[:, :-1]) & (self.attention_mask[:, 1:] != 0)
            if bool(anew.any()):
                raise ValueError(
                    "positions begin anew within a row that has no segments; say where they stand"
                )


@dataclasses.dataclass
class StepShare:
    """What a micro-batch is of its optimizer step.

    The loss to back-propagate is `example_weight` times the sum of per-example losses plus `token_weight` times the
    sum of per-token losses: accumulation (which divides by the number of micro-batches) and the mean over ranks then
    give exactly the mean over the step. A filler micro-batch has both weights 0.
    """

    example_weight: float
    token_weight: float
    last: bool


@dataclasses.dataclass
class PreferenceBatch:
    """`rows.sequences` is 2 * pairs: the chosen completions first, then the rejected ones in the same order.

    `keys` stand for the pairs' token ids, 16 bytes each, whatever the batch and layout.
    """

    rows: Rows
    pairs: int
    ids: list[str]
    share: StepShare
    keys: list[bytes] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SupervisedBatch:
    """`rows.sequences` is the number of demonstrations."""

    rows: Rows
    ids: list[str]
    share: StepShare


@dataclasses.dataclass
class PairLogps:
    """Log-probabilities of a batch's completions: *sums* over completion tokens (nats), and their counts."""

    chosen: Float[Tensor, " pair"]
    rejected: Float[Tensor, " pair"]
    chosen_tokens: Int[Tensor, " pair"]
    rejected_tokens: Int[Tensor, " pair"]
