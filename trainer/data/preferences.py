"""Preference pairs and demonstrations from files or hub datasets: plain text or chat messages."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, cast

from typing_extensions import override

from trainer.data.cells import (
    BrokenRow,
    EmptyCompletion,
    check_answer,
    check_earlier_answers,
    digest,
    messages,
    part_plain,
    part_turns,
    text_or_turns,
    yes_or_no,
)
from trainer.data.digests import Digests
from trainer.data.files import Table, fingerprint, read_rows
from trainer.data.lines import BrokenLine
from trainer.data.sources import Loaded, Source, Streamed, split_share
from trainer.schema import Demonstration, Preference, ScoredTurns, Split, Text, UserError

_VALIDATION_FRACTION = 0.05
_LISTED = 10
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Why a row gives no record: the name of its count, and what was wrong with it where that is known."""

    count: str
    said: str = ""


_FINISHED = ("chosen_finished", "rejected_finished")
Record = Preference | Demonstration
_Parse = Callable[[dict[str, Any], str], Record | Dropped]


@dataclasses.dataclass
class _Rows(Source):
    """What sources over one file (or hub dataset) share: columns, splits, duplicates, counts.

    Args:
        path: .jsonl, .json, .csv or .parquet file, or `owner/name` of a hub dataset.
        split: of the hub dataset to train on (default `train`).
        validation_path: another file or dataset to validate on; without it and `validation_split`, a part of
            `path`. Rows of `path` whose prompt is in it, too, are dropped and counted.
        validation_split: split of the hub dataset to validate on.
        validation_fraction: share of the prompts kept for validation (default 0.05) where none is named; of those
            that are not kept for the test.
        test_fraction: share of the prompts of `path` kept for the split `test`, which is never trained on, nor
            validated on. Without it there is none.
        columns: ours -> the file's, where the file has other names.
        empty: what to do with a row whose completion is empty: stop there, or leave it out and count it.
        broken: the same for a row whose cells do not hold what they should, and for a line of a .jsonl or .csv file
            that cannot be read; those left out are listed, too.
        limit: at most so many records of each split, the first ones.
        revision: branch, tag or commit of the hub dataset.
        offline: refuse the network.
    """

    path: str
    split: str | None = None
    validation_path: str | None = None
    validation_split: str | None = None
    validation_fraction: float | None = None
    test_fraction: float | None = None
    columns: dict[str, str] | None = None
    empty: Literal["refuse", "drop"] = "refuse"
    broken: Literal["refuse", "drop"] = "refuse"
    limit: int | None = None
    revision: str | None = None
    offline: bool = False

    prompt_template = None
    _known: ClassVar[tuple[str, ...]] = ()
    _theirs: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        self._apart = self.validation_path is not None or self.validation_split is not None
        fraction = self.validation_fraction
        if self._apart and fraction is not None:
            raise UserError(
                f"{self.path}: validation_fraction is {fraction}, but the validation data is named; give one"
            )
        for name in ("validation_fraction", "test_fraction"):
            fraction = getattr(self, name)
            if fraction is not None and not 0 <= fraction < 1:
                raise UserError(f"{self.path}: {name} is {fraction}; it should be from 0 up to below 1")
        for name in ("empty", "broken"):
            if getattr(self, name) not in ("refuse", "drop"):
                raise UserError(
                    f"{self.path}: {name} is {getattr(self, name)!r}; it should be refuse or drop"
                )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.path}: limit is {self.limit}; it should be 1 or more")
        mapped = {**self._theirs, **(self.columns or {})}
        if unknown := sorted(set(mapped) - set(self._known)):
            known = ", ".join(self._known)
            raise UserError(f"{self.path}: columns maps {unknown}; only {known} can be mapped")
        self._names = {name: mapped.get(name, name) for name in self._known}

    def load(self, split: Split) -> Loaded:
        """Records of one split, in the file's order."""
        loaded = self.stream(split)
        records = list(loaded.records)
        return Loaded(cast(Any, records), dict(loaded.counts), loaded.hashes)

    def stream(self, split: Split) -> Loaded:
        """As `load`, but records are read when they are asked for; the counts are final when all were."""
        table = self._table(split)
        counts: Counter[str] = Counter(rows=len(table), kept=0, dropped_duplicate=0, other_splits=0)
        records = Streamed(self._records(table, split, counts), self._expected(table, split))
        return Loaded(cast(Any, records), counts, table.hashes)

    def left_out(self, split: Split) -> Iterator[tuple[str, str]]:
        """Every row that no split has, in the file's order: where it stands, and why it was left out."""
        for origin, found in self._found(self._table(split), split):
            if isinstance(found, Dropped) and found.count.startswith("dropped_"):
                yield origin, found.said or found.count.removeprefix("dropped_").replace("_", " ")

    def fingerprint(self, split: Split) -> dict[str, str]:
        """What `load` would read: SHA-256 of each file, commit of each hub dataset."""
        places = [(self.path, self.split)]
        if self._apart:
            named = (self.validation_path or self.path, self.validation_split)
            places = [named] if split == "validation" else [*places, named]
        return {
            name: found
            for path, part in places
            for name, found in fingerprint(path, part, self._revision(path), self.offline).items()
        }

    def _revision(self, path: str) -> str | None:
        return self.revision if path == self.path else None

    def _parser(self, table: Table) -> _Parse:
        """How a row of the table becomes a record."""
        raise AssertionError("each kind of file has its own")

    def _table(self, split: Split) -> Table:
        if split == "test" and not self.test_fraction:
            raise UserError(
                f"{self.path}: has train and validation data only; no test split is set (test_fraction)"
            )
        path, part = self.path, self.split
        if split == "validation" and self._apart:
            path, part = self.validation_path or path, self.validation_split
        # Those that were mapped must be there: a misspelt one is not a missing one.
        named = list((self.columns or {}).values())
        rest = [column for column in self._names.values() if column not in named]
        return read_rows(
            path,
            columns=named,
            optional=rest,
            split=part,
            revision=self._revision(path),
            offline=self.offline,
            tolerant=self.broken == "drop",
        )

    @functools.cached_property
    def _prompts_held_out(self) -> Digests:
        """The prompts of the validation data that is named."""
        table = self._table("validation")
        parse = self._parser(table)
        found = Digests()
        for origin, row in table.with_broken():
            record = self._record(row, origin, parse)
            if not isinstance(record, Dropped):
                found.add(_said_of(record))
        return found

    def _require(self, table: Table, *names: str) -> None:
        missing = [repr(self._names[name]) for name in names if self._names[name] not in table.columns]
        if missing:
            has = ", ".join(table.available)
            raise UserError(f"{table.name}: no column {', '.join(missing)}; its columns are: {has}")

    def _record(self, row: dict[str, Any] | BrokenLine, origin: str, parse: _Parse) -> Record | Dropped:
        if isinstance(row, BrokenLine):
            return Dropped("dropped_broken", str(row))
        try:
            return parse({name: row.get(column) for name, column in self._names.items()}, origin)
        except EmptyCompletion as error:
            if self.empty == "refuse":
                raise
            return Dropped("dropped_empty", str(error))
        except BrokenRow as error:
            if self.broken == "refuse":
                raise
            return Dropped("dropped_broken", str(error))

    def _records(self, table: Table, split: Split, counts: Counter[str]) -> Iterator[Record]:
        broken: list[str] = []
        for _, found in self._found(table, split):
            if isinstance(found, Dropped):
                counts[found.count] += 1
                if found.count == "dropped_broken" and len(broken) < _LISTED:
                    broken.append(found.said)
            else:
                counts["kept"] += 1
                yield found
        self._tell(broken, counts)

    def _tell(self, broken: list[str], counts: Counter[str]) -> None:
        """List the broken rows; where all are, it is the settings that are wrong."""
        if not broken:
            return
        if (number := counts["dropped_broken"]) == counts["rows"]:
            raise UserError(f"{self.path}: all {number} rows are broken; the first: {broken[0]}")
        more = f"\nand {number - len(broken)} more" if number > len(broken) else ""
        log.warning("%d broken rows are left out:\n%s%s", number, "\n".join(broken), more)

    def _found(self, table: Table, split: Split) -> Iterator[tuple[str, Record | Dropped]]:
        """Where each row stands, and its record in this split, or why there is none."""
        parse = self._parser(table)
        held_out = self._prompts_held_out if self._apart and split == "train" else Digests()
        seen, kept = Digests(), 0
        for origin, row in table.with_broken():
            record = self._record(row, origin, parse)
            if isinstance(record, Dropped):
                yield origin, record
            elif not self._holds(record, split):
                yield origin, Dropped("other_splits")
            elif len(held_out) and _said_of(record) in held_out:
                yield origin, Dropped("dropped_in_validation")
            elif record.id in seen:
                yield origin, Dropped("dropped_duplicate")
            elif self.limit is not None and kept == self.limit:
                yield origin, Dropped("dropped_over_limit")
            else:
                seen.add(record.id)
                kept += 1
                yield origin, record

    def _expected(self, table: Table, split: Split) -> int:
        """About how many records a split will have: how long its tokenising takes is told by it."""
        tests = self.test_fraction or 0.0
        rest = 1.0 if self._apart else self._fraction if split == "validation" else 1 - self._fraction
        share = tests if split == "test" else (1 - tests) * rest
        return min(round(len(table) * share), self.limit or len(table))

    @property
    def _fraction(self) -> float:
        return _VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction

    def _holds(self, record: Record, split: Split) -> bool:
        """Whether a record is of the split: by its prompt, so that no prompt both trains and validates."""
        said = _said_of(record)
        tests = split_share(said, "rows/test") < (self.test_fraction or 0.0)
        if tests or split == "test":
            return tests and split == "test"
        if self._apart:
            return True
        validates = split_share(said, "rows/validation") < self._fraction
        return validates == (split == "validation")


def _said_of(record: Record) -> str:
    """What a record's split follows from: its prompt, and where that is empty (all have the same) its own id."""
    return digest(record.prompt) if record.prompt else digest(record.id)


@dataclasses.dataclass
class PreferenceFile(_Rows):
    """Preference pairs of a file or hub dataset with columns `prompt`, `chosen`, `rejected`.

    Each is plain text or a list of messages (`role`, `content`). Without a `prompt`, the turns that chosen
    and rejected share are the prompt; rows that share none, or whose answers are not one turn, are dropped
    and counted. Earlier answers of a chat are not scored: chosen and rejected share them, so that nothing would change
    in what tells the two apart. For whole dialogues in plain text, `prompt_ends` says how a prompt ends. Rows with the
    same chosen and rejected are dropped and counted, and so are repeated rows. Columns `chosen_finished` and
    `rejected_finished`, where there are any, say whether a completion came to its end (true) or was cut (false).

    Args:
        prompt_ends: the mark after whose last occurrence the answer begins (for plain dialogues without
            `prompt` column, such as "\\n\\nAssistant:"); rows whose prompts then differ are dropped and
            counted.
    """

    prompt_ends: str | None = None

    _known = ("prompt", "chosen", "rejected", "chosen_finished", "rejected_finished")

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

    def _parse(self, row: dict[str, Any], origin: str) -> Preference | Dropped:
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
            raise BrokenRow(
                f"{origin}: one of chosen and rejected is text, the other messages; both should be the same"
            )
        else:
            parted = part_turns(prompt, chosen, rejected, origin, self._names["prompt"])
        if parted is None:
            return Dropped("dropped_prompts_differ")
        if parted[1] == parted[2]:
            return Dropped("dropped_identical")
        prompt, better, worse = parted
        ends = [yes_or_no(row[name], origin, self._names[name]) for name in _FINISHED]
        cut = [name for name, end in zip(_FINISHED, ends, strict=True) if not end]
        return Preference(prompt, better, worse, digest(prompt, better, worse, *cut)[:24], origin, *ends)

    def _part_plain(self, chosen: str, rejected: str, origin: str) -> tuple[str, str, str] | None:
        if self.prompt_ends is None:
            name = self._names["prompt"]
            raise BrokenRow(f"{origin}: no prompt in column {name!r}; give one, messages, or set prompt_ends")
        columns = (self._names["chosen"], self._names["rejected"])
        return part_plain(chosen, rejected, self.prompt_ends, origin, columns)


@dataclasses.dataclass
class DemonstrationFile(_Rows):
    """Demonstrations of a file or hub dataset: columns `prompt` and `completion`, or `messages`.

    Of `messages`, the last turn, which should be the assistant's, is the completion and those before it the
    prompt. A column `finished`, where there is one, says whether a completion came to its end (true) or was cut
    (false).

    Args:
        scored_turns: which answers of a chat are learned: `last`, or `all`, which scores every turn of the assistant
            that answers something, each up to the token that ends it, and nothing of the user's or the template's.
    """

    scored_turns: ScoredTurns = "last"

    _known = ("prompt", "completion", "messages", "finished")

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
        return self._made(prompt, completion, row, origin)

    def _parse_messages(self, row: dict[str, Any], origin: str) -> Demonstration:
        column = self._names["messages"]
        turns = messages(row["messages"], origin, column)
        check_answer(turns, origin, column)
        if len(turns) < 2:
            raise BrokenRow(
                f"{origin}: column {column!r} has one turn; it should hold a prompt, then the answer"
            )
        return self._made(turns[:-1], turns[-1:], row, origin)

    def _made(self, prompt: Text, completion: Text, row: dict[str, Any], origin: str) -> Demonstration:
        finished = yes_or_no(row["finished"], origin, self._names["finished"])
        cut = [] if finished else ["finished"]
        key = digest(prompt, completion, *cut)[:24]
        if not isinstance(prompt, str) and not isinstance(completion, str):
            prompt, completion = [*prompt, *completion[:-1]], completion[-1:]
        if self.scored_turns == "all":
            check_earlier_answers(prompt, origin)
        return Demonstration(prompt, completion, key, origin, finished, self.scored_turns)
