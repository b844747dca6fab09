"""Preference pairs and demonstrations from files or hub datasets: plain text or chat messages."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

from typing_extensions import override

from trainer.data.cells import EmptyCompletion, check_answer, digest, messages, part_turns, text_or_turns
from trainer.data.files import Table, read_rows
from trainer.data.sources import Loaded, Source, split_share
from trainer.schema import Demonstration, Preference, Split, Text, UserError

_VALIDATION_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class _Dropped:
    """Why a row gives no record."""

    why: str


Record = Preference | Demonstration
_Parse = Callable[[dict[str, Any], str], Record | _Dropped]


@dataclasses.dataclass
class _Rows(Source):
    """What sources over one file (or hub dataset) share: columns, splits, duplicates, counts.

    Args:
        path: .jsonl, .json, .csv or .parquet file, or `owner/name` of a hub dataset.
        split: of the hub dataset to train on (default `train`).
        validation_path: another file or dataset to validate on; without it and `validation_split`, a part of
            `path`. Rows of `path` whose prompt is in it, too, are dropped and counted.
        validation_split: split of the hub dataset to validate on.
        validation_fraction: share of the prompts kept for validation (default 0.05) where none is named.
        columns: ours -> the file's, where the file has other names.
        empty: what to do with a row whose completion is empty: stop there, or leave it out and count it.
        limit: at most so many records of each split, the first ones.
        revision: branch, tag or commit of the hub dataset.
        offline: refuse the network.
    """

    path: str
    split: str | None = None
    validation_path: str | None = None
    validation_split: str | None = None
    validation_fraction: float | None = None
    columns: dict[str, str] | None = None
    empty: Literal["refuse", "drop"] = "refuse"
    limit: int | None = None
    revision: str | None = None
    offline: bool = False

    prompt_template = None
    _known: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self._apart = self.validation_path is not None or self.validation_split is not None
        fraction = self.validation_fraction
        if self._apart and fraction is not None:
            raise UserError(
                f"{self.path}: validation_fraction is {fraction}, but the validation data is named; give one"
            )
        if fraction is not None and not 0 <= fraction < 1:
            raise UserError(
                f"{self.path}: validation_fraction is {fraction}; it should be from 0 up to below 1"
            )
        if self.empty not in ("refuse", "drop"):
            raise UserError(f"{self.path}: empty is {self.empty!r}; it should be refuse or drop")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.path}: limit is {self.limit}; it should be 1 or more")
        mapped = self.columns or {}
        if unknown := sorted(set(mapped) - set(self._known)):
            known = ", ".join(self._known)
            raise UserError(f"{self.path}: columns maps {unknown}; only {known} can be mapped")
        self._names = {name: mapped.get(name, name) for name in self._known}

    def load(self, split: Split) -> Loaded:
        """Records of one split, in the file's order."""
        table = self._table(split)
        held = self._prompts_held_out if self._apart and split == "train" else set()
        return self._collect(table, split, self._parser(table), held)

    def _parser(self, table: Table) -> _Parse:
        """How a row of the table becomes a record."""
        raise AssertionError("each kind of file has its own")

    def _table(self, split: Split) -> Table:
        if split == "test":
            raise UserError(f"{self.path}: has train and validation data only; no test split is set")
        path, part = self.path, self.split
        if split == "validation" and self._apart:
            path, part = self.validation_path or path, self.validation_split
        # Those that were mapped must be there: a misspelt one is not a missing one.
        named = list((self.columns or {}).values())
        rest = [column for column in self._names.values() if column not in named]
        revision = self.revision if path == self.path else None
        return read_rows(
            path, columns=named, optional=rest, split=part, revision=revision, offline=self.offline
        )

    @functools.cached_property
    def _prompts_held_out(self) -> set[str]:
        """Digests of the prompts of the validation data that is named."""
        table = self._table("validation")
        parse = self._parser(table)
        found = (self._record(row, origin, parse) for origin, row in table)
        return {digest(record.prompt) for record in found if not isinstance(record, _Dropped)}

    def _require(self, table: Table, *names: str) -> None:
        missing = [repr(self._names[name]) for name in names if self._names[name] not in table.columns]
        if missing:
            has = ", ".join(table.available)
            raise UserError(f"{table.name}: no column {', '.join(missing)}; its columns are: {has}")

    def _record(self, row: dict[str, Any], origin: str, parse: _Parse) -> Record | _Dropped:
        try:
            return parse({name: row.get(column) for name, column in self._names.items()}, origin)
        except EmptyCompletion:
            if self.empty == "refuse":
                raise
            return _Dropped("empty")

    def _collect(self, table: Table, split: Split, parse: _Parse, held_out: set[str]) -> Loaded:
        counts: Counter[str] = Counter(rows=len(table), kept=0, dropped_duplicate=0, other_splits=0)
        seen: set[str] = set()
        records: list[Record] = []
        for origin, row in table:
            record = self._record(row, origin, parse)
            if isinstance(record, _Dropped):
                counts[f"dropped_{record.why}"] += 1
            elif not self._holds(record, split):
                counts["other_splits"] += 1
            elif held_out and digest(record.prompt) in held_out:
                counts["dropped_in_validation"] += 1
            elif record.id in seen:
                counts["dropped_duplicate"] += 1
            elif self.limit is not None and len(records) == self.limit:
                counts["dropped_over_limit"] += 1
            else:
                seen.add(record.id)
                records.append(record)
        counts["kept"] = len(records)
        return Loaded(cast(Any, records), dict(counts), table.hashes)

    def _holds(self, record: Record, split: Split) -> bool:
        """Whether a record is of the split: by its prompt, so that no prompt both trains and validates."""
        if self._apart:
            return True
        fraction = _VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction
        validates = split_share(digest(record.prompt), "rows/validation") < fraction
        return validates == (split == "validation")


@dataclasses.dataclass
class PreferenceFile(_Rows):
    """Preference pairs of a file or hub dataset with columns `prompt`, `chosen`, `rejected`.

    Each is plain text or a list of messages (`role`, `content`). Without a `prompt`, the turns that chosen
    and rejected share are the prompt; rows that share none, or whose answers are not one turn, are dropped
    and counted. For whole dialogues in plain text, `prompt_ends` says how a prompt ends. Rows with the same
    chosen and rejected are dropped and counted, and so are repeated rows.

    Args:
        prompt_ends: the mark after whose last occurrence the answer begins (for plain dialogues without
            `prompt` column, such as "\\n\\nAssistant:"); rows whose prompts then differ are dropped and
            counted.
    """

    prompt_ends: str | None = None

    _known = ("prompt", "chosen", "rejected")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_ends == "":
            raise UserError(
                f"{self.path}: prompt_ends is empty; it should be the text that ends a prompt, or null"
            )

    @override
    def _parser(self, table: Table) -> _Parse:
        self._require(table, "chosen", "rejected")
        return self._parse

    def _parse(self, row: dict[str, Any], origin: str) -> Preference | _Dropped:
        prompt = (
            None
            if row["prompt"] is None
            else text_or_turns(row["prompt"], origin, self._names["prompt"], empty=True)
        )
        chosen, rejected = (
            text_or_turns(row[name], origin, self._names[name]) for name in ("chosen", "rejected")
        )
        if self.prompt_ends is not None and not (prompt is None and isinstance(chosen, str)):
            raise UserError(f"{origin}: prompt_ends is for plain text without a prompt column; leave it out")
        parted: tuple[Text, Text, Text] | None
        if isinstance(chosen, str) and isinstance(rejected, str):
            parted = (
                (prompt, chosen, rejected)
                if prompt is not None
                else self._part_plain(chosen, rejected, origin)
            )
        elif isinstance(chosen, str) or isinstance(rejected, str):
            raise UserError(
                f"{origin}: one of chosen and rejected is text, the other messages; both should be the same"
            )
        else:
            parted = part_turns(prompt, chosen, rejected, origin, self._names["prompt"])
        if parted is None:
            return _Dropped("prompts_differ")
        if parted[1] == parted[2]:
            return _Dropped("identical")
        prompt, better, worse = parted
        return Preference(prompt, better, worse, digest(prompt, better, worse)[:24], origin)

    def _part_plain(self, chosen: str, rejected: str, origin: str) -> tuple[str, str, str] | None:
        if self.prompt_ends is None:
            name = self._names["prompt"]
            raise UserError(f"{origin}: no prompt in column {name!r}; give one, messages, or set prompt_ends")
        ends = [text.rfind(self.prompt_ends) for text in (chosen, rejected)]
        if ends[0] < 0 or ends[0] != ends[1]:
            return None
        cut = ends[0] + len(self.prompt_ends)
        if chosen[:cut] != rejected[:cut]:
            return None
        for name, answer in (("chosen", chosen[cut:]), ("rejected", rejected[cut:])):
            if not answer.strip():
                raise EmptyCompletion(
                    f"{origin}: column {self._names[name]!r} has nothing after "
                    f"{self.prompt_ends!r}; set empty to drop such rows"
                )
        return chosen[:cut], chosen[cut:], rejected[cut:]


@dataclasses.dataclass
class DemonstrationFile(_Rows):
    """Demonstrations of a file or hub dataset: columns `prompt` and `completion`, or `messages`.

    Of `messages`, the last turn, which should be the assistant's, is the completion and those before it the
    prompt.
    """

    _known = ("prompt", "completion", "messages")

    @override
    def _parser(self, table: Table) -> _Parse:
        if self._names["messages"] in table.columns and self._names["completion"] not in table.columns:
            return self._parse_messages
        self._require(table, "prompt", "completion")
        return self._parse

    def _parse(self, row: dict[str, Any], origin: str) -> Demonstration:
        prompt = text_or_turns(row["prompt"], origin, self._names["prompt"], empty=True)
        completion = text_or_turns(row["completion"], origin, self._names["completion"])
        if isinstance(prompt, str) and not isinstance(completion, str):
            prompt = [{"role": "user", "content": prompt}]
        return Demonstration(prompt, completion, id=digest(prompt, completion)[:24], origin=origin)

    def _parse_messages(self, row: dict[str, Any], origin: str) -> Demonstration:
        column = self._names["messages"]
        turns = messages(row["messages"], origin, column)
        check_answer(turns, origin, column)
        if len(turns) < 2:
            raise UserError(
                f"{origin}: column {column!r} has one turn; it should hold a prompt, then the answer"
            )
        prompt, completion = turns[:-1], turns[-1:]
        return Demonstration(prompt, completion, id=digest(prompt, completion)[:24], origin=origin)
