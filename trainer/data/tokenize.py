"""Records -> token ids: prompt and completion apart, BOS once, EOS once, and lengths within a limit by one
rule. A completion that is not finished gets no EOS.

Plain text is encoded as plain text: the words `<s>` or `<|im_start|>` in it are letters, not special tokens.
Only what a chat template writes may hold special tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from typing import Literal, TypeVar

from tqdm import tqdm

from trainer.data.chat import MARK, render, render_prompt, render_turns
from trainer.data.encoding import Encoder, Tokenizer
from trainer.schema import (
    Demonstration,
    Message,
    Preference,
    Text,
    TokenizedDemonstration,
    TokenizedPreference,
    UserError,
)

# The tokenizers library shares a batch between threads, one for each core. Processes of our own were not worth their
# start, nor were threads: reading and checking records is the rest, and a chunk of 250 is as fast as one of 1,000.
_CHUNK = 250

R = TypeVar("R", Preference, Demonstration)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a prompt with its longest completion may be, in tokens, and what becomes of longer ones.

    `refuse` stops with a `UserError`; `drop` leaves the record out; `truncate` takes the oldest tokens off
    the prompt (BOS stays), down to what the longest completion leaves, and the end (with EOS) off a
    completion that is too long alone; an earlier answer that lost its beginning is not scored. `max_length` None sets
    no limit.
    """

    max_length: int | None = None
    overlong: Literal["refuse", "truncate", "drop"] = "refuse"

    def __post_init__(self) -> None:
        if self.overlong not in ("refuse", "truncate", "drop"):
            raise UserError(f"overlong is {self.overlong!r}; it should be refuse, truncate or drop")
        if self.max_length is None and self.overlong != "refuse":
            raise UserError(
                f"overlong is {self.overlong!r}, but without max_length nothing is too long; set max_length"
            )
        if self.max_length is not None and self.max_length < 2:
            raise UserError(
                f"max_length is {self.max_length}; it should be 2 or more: a prompt token and one to score"
            )


@dataclasses.dataclass
class TokenCounts:
    """What became of the records, for the manifest. A pair counts once, whichever completion it was."""

    kept: int = 0
    truncated_prompts: int = 0
    truncated_completions: int = 0
    dropped_overlong: int = 0
    dropped_identical: int = 0

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def tokenize_preferences(
    records: Iterable[Preference],
    tokenizer: Tokenizer,
    limits: Limits | None = None,
    counts: TokenCounts | None = None,
) -> list[TokenizedPreference]:
    """Tokenise many pairs, in batches; pairs whose completions are the same tokens are dropped.

    `counts`, where given, is added to. A progress bar appears when it takes more than a few seconds.

    Raises:
        UserError: an empty completion, one that holds a BOS or EOS inside, nothing before the first
            completion token, a pair that is too long under `refuse`, or chat messages that the tokenizer
            cannot render.
    """
    return list(stream_preferences(records, tokenizer, limits, counts))


def stream_preferences(
    records: Iterable[Preference],
    tokenizer: Tokenizer,
    limits: Limits | None = None,
    counts: TokenCounts | None = None,
) -> Iterator[TokenizedPreference]:
    """As `tokenize_preferences`, a batch at a time as it is asked for."""
    counts = TokenCounts() if counts is None else counts
    fields = ("chosen", "rejected")
    found = _tokenized(records, fields, tokenizer, limits or Limits(), counts)
    for record, prompt, _, (chosen, rejected) in found:
        if chosen == rejected:
            counts.dropped_identical += 1
            continue
        counts.kept += 1
        yield TokenizedPreference(prompt, chosen, rejected, record.id)


def tokenize_demonstrations(
    records: Iterable[Demonstration],
    tokenizer: Tokenizer,
    limits: Limits | None = None,
    counts: TokenCounts | None = None,
) -> list[TokenizedDemonstration]:
    """Tokenise many demonstrations, in batches; counts and raises as `tokenize_preferences` does.

    With `scored_turns` all, the turns of a chat are tokenised one by one, where the template parts them: each of the
    assistant's has the tokens that it would have as the last answer. All of them up to the token that ends the turn are
    marked. The last answer closes with EOS, as ever; earlier ones close as the template writes them.
    """
    return list(stream_demonstrations(records, tokenizer, limits, counts))


def stream_demonstrations(
    records: Iterable[Demonstration],
    tokenizer: Tokenizer,
    limits: Limits | None = None,
    counts: TokenCounts | None = None,
) -> Iterator[TokenizedDemonstration]:
    """As `tokenize_demonstrations`, a batch at a time as it is asked for."""
    counts = TokenCounts() if counts is None else counts
    found = _tokenized(records, ("completion",), tokenizer, limits or Limits(), counts)
    for record, prompt, marks, (completion,) in found:
        counts.kept += 1
        yield TokenizedDemonstration(prompt, completion, record.id, marks)


def tokenize_prompt(prompt: Text, tokenizer: Tokenizer, origin: str = "prompt") -> list[int]:
    """Token ids of a prompt to generate from, the same as in training: BOS once, no EOS."""
    plain = isinstance(prompt, str)
    text = prompt if isinstance(prompt, str) else render_prompt(tokenizer, prompt, origin)
    return Encoder(tokenizer).prompts([text], [plain], [origin])[0]


def tokenize_prompts(prompts: Sequence[Text], tokenizer: Tokenizer) -> list[list[int]]:
    """`tokenize_prompt` of many prompts, in one batch."""
    plain = [isinstance(prompt, str) for prompt in prompts]
    origins = [f"prompt {(p if isinstance(p, str) else p[-1]['content'])[:40]!r}" for p in prompts]
    texts = [
        prompt if isinstance(prompt, str) else render_prompt(tokenizer, prompt, origin)
        for prompt, origin in zip(prompts, origins, strict=True)
    ]
    return Encoder(tokenizer).prompts(texts, plain, origins)


def vocabulary(tokenizer: Tokenizer) -> int:
    """All ids of a tokenizer are below this number."""
    return max(tokenizer.get_vocab().values(), default=0) + 1


# --- from records to ids ------------------------------------------------------------------------------------


def _tokenized(
    records: Iterable[R], fields: tuple[str, ...], tokenizer: Tokenizer, limits: Limits, counts: TokenCounts
) -> Iterator[tuple[R, list[int], list[int], list[list[int]]]]:
    """(record, prompt ids, their marks, ids of the completions in the order of `fields`) for each that is kept."""
    encoder = Encoder(tokenizer)
    expected = length_hint(records) or None
    coming = iter(records)
    with tqdm(total=expected, desc="tokenising", unit="record", delay=3, leave=False) as bar:
        while chunk := list(itertools.islice(coming, _CHUNK)):
            origins = [record.origin or record.id for record in chunk]
            texts = [
                _texts(record, fields, tokenizer, origin)
                for record, origin in zip(chunk, origins, strict=True)
            ]
            plain = [isinstance(record.prompt, str) for record in chunk]
            turns = [
                _pieces(record, tokenizer, origin) for record, origin in zip(chunk, origins, strict=True)
            ]
            openings = [own[0] if own else opening for own, (opening, _) in zip(turns, texts, strict=True)]
            prompts = _marked(encoder, encoder.prompts(openings, plain, origins), turns, origins)
            columns = [
                encoder.completions(
                    [closings[i] for _, closings in texts],
                    plain,
                    origins,
                    [_is_finished(record, field) for record in chunk],
                )
                for i, field in enumerate(fields)
            ]
            completed = [list(completions) for completions in zip(*columns, strict=True)]
            bos = encoder.bos is not None
            for record, origin, (prompt, marks), completions in zip(
                chunk, origins, prompts, completed, strict=True
            ):
                fitted = _fit(prompt, completions, bos, limits, counts, origin)
                if fitted is not None:
                    yield record, fitted[0], _left(marks, len(fitted[0]), bos), fitted[1]
            bar.update(len(chunk))


def _pieces(record: Preference | Demonstration, tokenizer: Tokenizer, origin: str) -> list[str]:
    """The turns of a prompt whose earlier answers are to be scored; none where they are not."""
    if isinstance(record, Preference) or record.scored_turns == "last":
        return []
    if record.scored_turns != "all":
        raise UserError(f"{origin}: scored_turns is {record.scored_turns!r}; it should be last or all")
    if isinstance(record.prompt, str):
        raise UserError(
            f"{origin}: scored_turns is all, and the prompt is plain text, which has no turns; give messages, or set"
            " scored_turns to last"
        )
    return render_turns(tokenizer, record.prompt, origin)


def _marked(
    encoder: Encoder, openings: list[list[int]], turns: Sequence[list[str]], origins: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Each prompt's ids and marks: its opening, then its turns, of which every other one is an answer."""
    encoded = iter(encoder.turns([piece for pieces in turns for piece in pieces[1:]]))
    found = []
    for opening, pieces, origin in zip(openings, turns, origins, strict=True):
        prompt, marks = list(opening), [0] * len(opening)
        for number in range(1, len(pieces)):
            ids = next(encoded)
            own = encoder.ended(ids, origin) if number % 2 else 0
            prompt += ids
            marks += [1] * own + [0] * (len(ids) - own)
        found.append((prompt, marks if any(marks) else []))
    return found


def _left(marks: list[int], length: int, bos: bool) -> list[int]:
    """The marks of a prompt that was cut to its last `length` tokens (with `bos` the first stays, too)."""
    if not any(marks) or length == len(marks):
        return marks
    marks = [0, *marks[len(marks) - length + 1 :]] if bos else marks[-length:]
    for place in range(int(bos), length):  # what is left of the answer that was cut, or lost all before it
        if not marks[place]:
            break
        marks[place] = 0
    return marks if any(marks) else []


def _texts(record: R, fields: tuple[str, ...], tokenizer: Tokenizer, origin: str) -> tuple[str, list[str]]:
    """Prompt and completions as text, through the chat template where the prompt is a chat."""
    completions: list[Text] = [getattr(record, field) for field in fields]
    for field, completion in zip(fields, completions, strict=True):
        words = completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)
        if not words.strip():
            raise UserError(
                f"{origin}: {field} is empty; a completion should hold at least one character to learn"
            )
    if isinstance(record.prompt, str):
        if not all(isinstance(completion, str) for completion in completions):
            raise UserError(
                f"{origin}: the prompt is plain text and a completion is a chat; both should be the same"
            )
        return record.prompt, [str(completion) for completion in completions]
    opening, closings = render(
        tokenizer, record.prompt, [_turns(completion) for completion in completions], origin
    )
    for i, field in enumerate(fields):
        if not _is_finished(record, field):
            *before, last = _turns(completions[i])
            marked: Message = {"role": last["role"], "content": MARK}
            _, (sample,) = render(tokenizer, record.prompt, [[*before, marked]], origin)
            closings[i] = _cut_off(closings[i], sample, last["content"].strip(), field, origin)
    return opening, closings


def _is_finished(record: Preference | Demonstration, field: str) -> bool:
    if isinstance(record, Demonstration):
        return record.finished
    return record.chosen_finished if field == "chosen" else record.rejected_finished


def _cut_off(closing: str, sample: str, words: str, field: str, origin: str) -> str:
    """A rendered completion up to the end of its words: what a template closes a turn with says that it ended.

    `sample` is the same turn with a mark for words: what stands behind the mark is the template's.
    """
    _, found, suffix = sample.rpartition(MARK)
    spoken = closing.removesuffix(suffix).rstrip()
    if not found or not closing.endswith(suffix) or not spoken.endswith(words):
        raise UserError(
            f"{origin}: {field} is not finished, and the chat template changes its words, so that nothing says"
            " where they end; give plain text"
        )
    return spoken


def _turns(completion: Text) -> Sequence[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    bos: bool,
    limits: Limits,
    counts: TokenCounts,
    origin: str,
) -> tuple[list[int], list[list[int]]] | None:
    """Prompt and completions within `limits`; None where the record is dropped."""
    longest = max(map(len, completions))
    limit = limits.max_length
    if limit is None or len(prompt) + longest <= limit:
        return prompt, completions
    if limits.overlong == "refuse":
        raise UserError(
            f"{origin}: prompt ({len(prompt)} tokens) and completion ({longest}) make "
            f"{len(prompt) + longest} tokens, over max_length {limit}; raise max_length, or set "
            f"overlong to truncate or drop"
        )
    if limits.overlong == "drop":
        counts.dropped_overlong += 1
        return None
    room = max(limit - longest, 1)
    if len(prompt) > room:
        counts.truncated_prompts += 1
        prompt = prompt[:1] + prompt[len(prompt) - room + 1 :] if bos else prompt[-room:]
    if longest > limit - len(prompt):
        counts.truncated_completions += 1
        completions = [completion[: limit - len(prompt)] for completion in completions]
    return prompt, completions
