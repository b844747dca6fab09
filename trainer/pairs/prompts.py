"""What continuations begin with: the first tokens of texts, whole prompts of a file, or nothing at all."""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from trainer.data.cells import digest
from trainer.data.files import Table, read_rows
from trainer.data.sources import described, split_share
from trainer.schema import UserError

Part = Literal["train", "held_out", "all"]
_HELD_OUT = 0.1
_TOGETHER = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue; `key` is its own among those of a source, and the same at each load."""

    key: str
    text: str


@dataclasses.dataclass(frozen=True)
class Prompts:
    """All prompts of a source; `counts` (rows, kept, dropped_<why>) and `hashes` (file -> SHA-256, hub -> commit)."""

    prompts: list[Prompt]
    counts: dict[str, int]
    hashes: dict[str, str]


class PromptSource(abc.ABC):
    """Prompts; a config names one by its `class_path`. Nothing is registered anywhere."""

    @abc.abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Prompts:
        """Read them, the same in the same order each time; `tokenizer` is that of the model that continues them.

        Raises `UserError`: no such file, or no prompt in it, or it needs a tokenizer and there is none.
        """

    def describe(self) -> dict[str, Any]:
        """The source's settings as plain JSON."""
        return described(self)


@dataclasses.dataclass
class NoPrompt(PromptSource):
    """Continuations from nothing: the model's BOS alone.

    Args:
        count: how many times.
        first: number of the first. Others give other texts, for an evaluation, say.
    """

    count: int = 1000
    first: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 0:
            raise UserError(
                f"NoPrompt: count is {self.count} and first {self.first}; they should be at least 1 and 0"
            )

    @override
    def load(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Prompts:
        numbers = range(self.first, self.first + self.count)
        return Prompts([Prompt(f"none-{number}", "") for number in numbers], {"kept": self.count}, {})


class FilePrompts(PromptSource):
    """What sources of a file have in common: each prompt once, in parts and an order that follow from its content.

    A subclass is a dataclass with these fields; it says which prompts the file's rows hold (`_found`).
    """

    path: str
    part: Part
    held_out_fraction: float | None
    limit: int | None
    split: str | None
    revision: str | None
    offline: bool

    def __post_init__(self) -> None:
        if self.part not in ("train", "held_out", "all"):
            raise UserError(f"{self.path}: part is {self.part!r}; it should be train, held_out or all")
        if self.part == "all" and self.held_out_fraction is not None:
            raise UserError(f"{self.path}: held_out_fraction has no effect with part: all; leave it out")
        fraction = self.held_out_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"{self.path}: held_out_fraction is {fraction}; it should be above 0 and below 1")
        for name in ("tokens", "limit", "repeat"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"{self.path}: {name} is {value}; it should be 1 or more")

    @abc.abstractmethod
    def _columns(self) -> list[str]:
        """What each row must have."""

    @abc.abstractmethod
    def _found(
        self, table: Table, tokenizer: PreTrainedTokenizerBase | None, counts: Counter[str]
    ) -> Iterator[str]:
        """The prompts that the rows hold, also those of other parts and those that come again."""

    @override
    def load(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Prompts:
        table = self._table()
        counts: Counter[str] = Counter(rows=len(table), kept=0, dropped_duplicate=0, other_parts=0)
        found: dict[str, str] = {}
        for text in self._found(table, tokenizer, counts):
            key = digest(text)
            if not self._holds(key):
                counts["other_parts"] += 1
            elif key in found:
                counts["dropped_duplicate"] += 1
            else:
                found[key] = text
        keys, repeat = sorted(found), getattr(self, "repeat", 1)
        kept = keys[: self.limit]
        counts.update(kept=len(kept) * repeat, dropped_over_limit=len(keys) - len(kept))
        if not kept:
            raise UserError(f"{self.path}: no prompt is left for part {self.part!r} ({_told(counts)})")
        # The first time under the same key, so that a repeat adds to what was made without.
        names = [(key, f"-{turn}" if turn else "") for key in kept for turn in range(repeat)]
        prompts = [Prompt(key[:24] + suffix, found[key]) for key, suffix in names]
        return Prompts(prompts, dict(counts), table.hashes)

    def _table(self) -> Table:
        return read_rows(
            self.path,
            columns=self._columns(),
            split=self.split,
            revision=self.revision,
            offline=self.offline,
        )

    def _holds(self, key: str) -> bool:
        if self.part == "all":
            return True
        fraction = _HELD_OUT if self.held_out_fraction is None else self.held_out_fraction
        return (split_share(key, "prompts/held_out") < fraction) == (self.part == "held_out")


@dataclasses.dataclass
class TextPrompts(FilePrompts):
    """The first tokens of a column's texts, each beginning once, in an order that follows from their content.

    Which part a prompt is in follows from its content, too: those held out make no pairs, whatever file they come from.

    Args:
        path: .txt (one text a line), .jsonl, .json, .csv or .parquet file, or `owner/name` of a hub dataset.
        column: the texts.
        tokens: how many of each text, as the generator's tokenizer counts; texts that have no more are left out and
            counted. null takes whole texts as they are.
        part: `train`, `held_out` or `all`.
        held_out_fraction: share of the prompts that are held out (default 0.1); give the same everywhere.
        limit: at most so many.
        repeat: how often each comes, with other continuations each time: more pairs where there are few texts.
        split: of the hub dataset (default `train`).
        revision: branch, tag or commit of the hub dataset.
        offline: refuse the network.
    """

    path: str
    column: str = "text"
    tokens: int | None = 8
    part: Part = "train"
    held_out_fraction: float | None = None
    limit: int | None = None
    repeat: int = 1
    split: str | None = None
    revision: str | None = None
    offline: bool = False

    @override
    def _columns(self) -> list[str]:
        return [self.column]

    @override
    def _found(
        self, table: Table, tokenizer: PreTrainedTokenizerBase | None, counts: Counter[str]
    ) -> Iterator[str]:
        if self.tokens is None:
            yield from self._texts(table, counts)
            return
        if tokenizer is None or not tokenizer.is_fast:
            raise UserError(
                f"{self.path}: the first {self.tokens} tokens need a tokenizer of the tokenizers library; give the"
                " generator's, or set tokens to null"
            )
        batch: list[str] = []
        for text in self._texts(table, counts):
            batch.append(text)
            if len(batch) == _TOGETHER:
                yield from _cut(batch, self.tokens, tokenizer, counts)
                batch = []
        yield from _cut(batch, self.tokens, tokenizer, counts)

    def _texts(self, table: Table, counts: Counter[str]) -> Iterator[str]:
        for origin, row in table:
            text = text_of(row, self.column, origin)
            # The blanks at a whole prompt's end are its own; before a beginning they would count as tokens.
            text = text if self.tokens is None else text.strip()
            if text.strip():
                yield text
            else:
                counts["dropped_blank"] += 1


def text_of(row: Mapping[str, Any], column: str, origin: str) -> str:
    """A row's text, empty where there is none. Raises `UserError` for anything else."""
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{origin}: column {column!r} holds {text!r}; it should be text")
    return text or ""


def _cut(
    texts: Sequence[str], tokens: int, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]
) -> Iterator[str]:
    """The first `tokens` tokens of each text, as it is written there; no character is cut in two."""
    if not texts:
        return
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for text, places in zip(texts, encoded["offset_mapping"], strict=True):
        if len(places) > tokens:
            yield text[: places[tokens - 1][1]]
        else:
            counts["dropped_short"] += 1


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
