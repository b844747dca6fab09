"""Preference pairs and demonstrations from files or hub datasets: plain text or chat messages."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast

from trainer.data.cells import EmptyCompletion, check_answer, digest, messages, part_turns, text_or_turns
from trainer.data.files import Table, read_rows
from trainer.data.sources import Loaded, Source, split_share
from trainer.schema import Demonstration, Preference, Split, Text, UserError

R = TypeVar("R", Preference, Demonstration)
_VALIDATION_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class _Dropped:
    """Why a row gives no record."""

    why: str


class _Rows(Source):
    """What sources over one file (or hub dataset) share: columns, splits, duplicates, counts."""

    _columns: tuple[str, ...] = ()

    def __init__(
        self,
        path: str,
        split: str | None,
        validation_path: str | None,
        validation_split: str | None,
        validation_fraction: float | None,
        columns: Mapping[str, str] | None,
        empty: str,
        limit: int | None,
        revision: str | None,
        offline: bool,
    ) -> None:
        apart = validation_path is not None or validation_split is not None
        if apart and validation_fraction is not None:
            raise UserError(
                f"{path}: validation_fraction is {validation_fraction}, but the validation data is named; "
                f"give one"
            )
        if validation_fraction is not None and not 0 <= validation_fraction < 1:
            raise UserError(
                f"{path}: validation_fraction is {validation_fraction}; it should be from 0 up to below 1"
            )
        if empty not in ("refuse", "drop"):
            raise UserError(f"{path}: empty is {empty!r}; it should be refuse or drop")
        if limit is not None and limit < 1:
            raise UserError(f"{path}: limit is {limit}; it should be 1 or more")
        unknown = sorted(set(columns or {}) - set(self._columns))
        if unknown:
            raise UserError(f"{path}: columns maps {unknown}; only {', '.join(self._columns)} can be mapped")
        self.prompt_template: str | None = None
        self.path, self.empty, self.limit = path, empty, limit
        self._mapped = tuple(columns or {})  # these must be there: a misspelt one is not a missing one
        self.columns = {name: (columns or {}).get(name, name) for name in self._columns}
        default = 0.0 if apart else _VALIDATION_FRACTION
        self.validation_fraction = default if validation_fraction is None else validation_fraction
        self._revision, self._offline = revision, offline
        self._train = (path, split)
        self._validation = (
            (path if validation_path is None else validation_path, validation_split) if apart else None
        )

    def _table(self, split: Split) -> Table:
        if split == "test":
            raise UserError(f"{self.path}: has train and validation data only; no test split is set")
        path, part = self._validation if split == "validation" and self._validation else self._train
        revision = self._revision if path == self.path else None
        named = [self.columns[name] for name in self._mapped]
        rest = [column for column in self.columns.values() if column not in named]
        return read_rows(
            path, columns=named, optional=rest, split=part, revision=revision, offline=self._offline
        )

    def _require(self, table: Table, *names: str) -> None:
        missing = [repr(self.columns[name]) for name in names if self.columns[name] not in table.columns]
        if missing:
            has = ", ".join(table.available)
            raise UserError(f"{table.name}: no column {', '.join(missing)}; its columns are: {has}")

    def _collect(
        self, table: Table, split: Split, parse: Callable[[dict[str, Any], str], R | _Dropped]
    ) -> Loaded:
        counts: Counter[str] = Counter(rows=len(table), kept=0, dropped_duplicate=0, other_splits=0)
        seen: set[str] = set()
        records: list[R] = []
        for origin, row in table:
            try:
                record = parse({name: row.get(column) for name, column in self.columns.items()}, origin)
            except EmptyCompletion:
                if self.empty == "refuse":
                    raise
                record = _Dropped("empty")
            if isinstance(record, _Dropped):
                counts[f"dropped_{record.why}"] += 1
            elif not self._holds(record, split):
                counts["other_splits"] += 1
            elif record.id in seen:
                counts["dropped_duplicate"] += 1
            elif self.limit is not None and len(records) == self.limit:
                counts["dropped_over_limit"] += 1
            else:
                seen.add(record.id)
                records.append(record)
        counts["kept"] = len(records)
        return Loaded(cast(Any, records), dict(counts), table.hashes)

    def _holds(self, record: Preference | Demonstration, split: Split) -> bool:
        """Whether a record is of the split: by its prompt, so that no prompt both trains and validates."""
        if self._validation is not None:
            return True
        validates = split_share(digest(record.prompt), "rows/validation") < self.validation_fraction
        return validates == (split == "validation")


class PreferenceFile(_Rows):
    """Preference pairs of a file or hub dataset with columns `prompt`, `chosen`, `rejected`.

    Each is plain text or a list of messages (`role`, `content`). Without a `prompt`, the turns that chosen
    and rejected share are the prompt; rows that share none, or whose answers are not one turn, are dropped
    and counted. For whole dialogues in plain text, `prompt_ends` says how a prompt ends. Rows with the same
    chosen and rejected are dropped and counted, and so are repeated rows.

    Args:
        path: .jsonl, .json, .csv or .parquet file, or `owner/name` of a hub dataset.
        split: of the hub dataset to train on (default `train`).
        validation_path: another file or dataset to validate on; without it and `validation_split`, a part of
            `path`.
        validation_split: split of the hub dataset to validate on.
        validation_fraction: share of the prompts kept for validation (default 0.05) where none is named.
        columns: ours -> the file's, where the file calls `prompt`, `chosen` or `rejected` otherwise.
        prompt_ends: the mark after whose last occurrence the answer begins (for plain dialogues without
            `prompt` column, such as "\\n\\nAssistant:"); rows whose prompts then differ are dropped and
            counted.
        empty: what to do with a row whose completion is empty: stop there, or leave it out and count it.
        limit: at most so many records of each split, the first ones.
        revision: branch, tag or commit of the hub dataset.
        offline: refuse the network.
    """

    _columns = ("prompt", "chosen", "rejected")

    def __init__(
        self,
        path: str,
        split: str | None = None,
        validation_path: str | None = None,
        validation_split: str | None = None,
        validation_fraction: float | None = None,
        columns: dict[str, str] | None = None,
        prompt_ends: str | None = None,
        empty: Literal["refuse", "drop"] = "refuse",
        limit: int | None = None,
        revision: str | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(
            path,
            split,
            validation_path,
            validation_split,
            validation_fraction,
            columns,
            empty,
            limit,
            revision,
            offline,
        )
        if prompt_ends == "":
            raise UserError(
                f"{path}: prompt_ends is empty; it should be the text that ends a prompt, or null"
            )
        self.prompt_ends = prompt_ends

    def load(self, split: Split) -> Loaded:
        """Pairs of one split, in the file's order."""
        table = self._table(split)
        self._require(table, "chosen", "rejected")
        return self._collect(table, split, self._parse)

    def _parse(self, row: dict[str, Any], origin: str) -> Preference | _Dropped:
        prompt = (
            None
            if row["prompt"] is None
            else text_or_turns(row["prompt"], origin, self.columns["prompt"], empty=True)
        )
        chosen, rejected = (
            text_or_turns(row[name], origin, self.columns[name]) for name in ("chosen", "rejected")
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
            parted = part_turns(prompt, chosen, rejected)
        if parted is None:
            return _Dropped("prompts_differ")
        if parted[1] == parted[2]:
            return _Dropped("identical")
        prompt, better, worse = parted
        return Preference(prompt, better, worse, digest(prompt, better, worse)[:24], origin)

    def _part_plain(self, chosen: str, rejected: str, origin: str) -> tuple[str, str, str] | None:
        if self.prompt_ends is None:
            name = self.columns["prompt"]
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
                    f"{origin}: column {self.columns[name]!r} has nothing after "
                    f"{self.prompt_ends!r}; set empty to drop such rows"
                )
        return chosen[:cut], chosen[cut:], rejected[cut:]


class DemonstrationFile(_Rows):
    """Demonstrations of a file or hub dataset: columns `prompt` and `completion`, or `messages`.

    Of `messages`, the last turn, which should be the assistant's, is the completion and those before it the
    prompt. Arguments as for `PreferenceFile`; `columns` can map `prompt`, `completion` and `messages`.

    Args:
        path: .jsonl, .json, .csv or .parquet file, or `owner/name` of a hub dataset.
        split: of the hub dataset to train on (default `train`).
        validation_path: another file or dataset to validate on; without it and `validation_split`, a part of
            `path`.
        validation_split: split of the hub dataset to validate on.
        validation_fraction: share of the prompts kept for validation (default 0.05) where none is named.
        columns: ours -> the file's.
        empty: what to do with a row whose completion is empty: stop there, or leave it out and count it.
        limit: at most so many records of each split, the first ones.
        revision: branch, tag or commit of the hub dataset.
        offline: refuse the network.
    """

    _columns = ("prompt", "completion", "messages")

    def __init__(
        self,
        path: str,
        split: str | None = None,
        validation_path: str | None = None,
        validation_split: str | None = None,
        validation_fraction: float | None = None,
        columns: dict[str, str] | None = None,
        empty: Literal["refuse", "drop"] = "refuse",
        limit: int | None = None,
        revision: str | None = None,
        offline: bool = False,
    ) -> None:
        super().__init__(
            path,
            split,
            validation_path,
            validation_split,
            validation_fraction,
            columns,
            empty,
            limit,
            revision,
            offline,
        )

    def load(self, split: Split) -> Loaded:
        """Demonstrations of one split, in the file's order."""
        table = self._table(split)
        if self.columns["messages"] in table.columns and self.columns["completion"] not in table.columns:
            return self._collect(table, split, self._parse_messages)
        self._require(table, "prompt", "completion")
        return self._collect(table, split, self._parse)

    def _parse(self, row: dict[str, Any], origin: str) -> Demonstration:
        prompt = text_or_turns(row["prompt"], origin, self.columns["prompt"], empty=True)
        completion = text_or_turns(row["completion"], origin, self.columns["completion"])
        if isinstance(prompt, str) and not isinstance(completion, str):
            prompt = [{"role": "user", "content": prompt}]
        return Demonstration(prompt, completion, id=digest(prompt, completion)[:24], origin=origin)

    def _parse_messages(self, row: dict[str, Any], origin: str) -> Demonstration:
        column = self.columns["messages"]
        turns = messages(row["messages"], origin, column)
        check_answer(turns, origin, column)
        if len(turns) < 2:
            raise UserError(
                f"{origin}: column {column!r} has one turn; it should hold a prompt, then the answer"
            )
        prompt, completion = turns[:-1], turns[-1:]
        return Demonstration(prompt, completion, id=digest(prompt, completion)[:24], origin=origin)
