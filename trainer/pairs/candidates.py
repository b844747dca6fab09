"""Texts that are there already, with or without scores: made by `tandem pairs`, or by anyone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from typing_extensions import override

from trainer.data.cells import digest, yes_or_no
from trainer.data.files import Table, read_rows
from trainer.data.sources import described
from trainer.generation import Sampling, of_this_rank
from trainer.pairs.continuations import Continuation, Continued, Generator
from trainer.pairs.prompts import Prompt, Prompts
from trainer.schema import UserError

_NAMES = ("prompt", "completion", "score", "finished", "tokens", "key", "candidates")
_TOGETHER = 1000
Groups = dict[str, tuple[Prompt, list[Continuation]]]


class _File(NamedTuple):
    """What a file holds. `scored`: one of its texts has a score; `unscored`: where the first stands that has none.

    Blank and invalid texts have none in any file, and count for neither.
    """

    groups: Groups
    rows: int
    hashes: dict[str, str]
    scored: bool
    unscored: str | None


@dataclasses.dataclass
class CandidateFile(Generator):
    """The generator of a file of texts; where they have scores, no reward is needed.

    Rows have columns `prompt` and `completion`, one text each, or `prompt` and `candidates`, a list of all texts of a
    prompt (as in a `candidates.jsonl`: text, score, tokens, finished). Texts of one prompt, or of one `key` where there
    are keys, belong together. `score`, `finished` (true) and `tokens` (words are counted) may be missing.

    Args:
        path: .jsonl, .json, .csv or .parquet file, or `owner/name` of a hub dataset.
        columns: ours -> the file's, where the file has other names.
        split: of the hub dataset (default `train`).
        offline: refuse the network.
    """

    path: str
    columns: dict[str, str] | None = None
    split: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        mapped = self.columns or {}
        if unknown := sorted(set(mapped) - set(_NAMES)):
            raise UserError(f"{self.path}: columns maps {unknown}; only {', '.join(_NAMES)} can be mapped")
        self._names = {name: mapped.get(name, name) for name in _NAMES}

    def load(self) -> Prompts:
        """Its prompts, in the file's order."""
        file = self._read
        counts = {"rows": file.rows, "kept": len(file.groups)}
        return Prompts([prompt for prompt, _ in file.groups.values()], counts, file.hashes)

    @override
    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        """The file's texts; `n` and `sampling` were its maker's."""
        groups = self._read.groups
        own = of_this_rank(list(prompts))
        for start in range(0, len(own), _TOGETHER):
            yield [(prompt, groups[prompt.key][1]) for prompt in own[start : start + _TOGETHER]]

    @override
    def describe(self) -> dict[str, Any]:
        return described(self) | {"hashes": self._read.hashes}

    @property
    def scored(self) -> bool:
        """Whether the texts have scores, blank and invalid ones left aside. Raises `UserError` where only some have."""
        file = self._read
        if file.scored and file.unscored is not None:
            raise UserError(
                f"{file.unscored}: has no score, and other texts have one; score all of them, or give a reward"
            )
        return file.scored

    @functools.cached_property
    def _read(self) -> _File:
        named = list((self.columns or {}).values())
        rest = [column for column in self._names.values() if column not in named]
        table = read_rows(self.path, columns=named, optional=rest, split=self.split, offline=self.offline)
        several = self._names["candidates"] in table.columns
        if missing := [
            self._names[name]
            for name in ("prompt", "candidates" if several else "completion")
            if self._names[name] not in table.columns
        ]:
            has = ", ".join(table.available)
            raise UserError(f"{self.path}: no column {', '.join(map(repr, missing))}; its columns are: {has}")
        groups: Groups = {}
        scored, unscored = False, None
        for origin, row in self._rows(table):
            prompt = _text(row["prompt"], origin, self._names["prompt"])
            key = digest(prompt)[:24] if row["key"] is None else str(row["key"])
            found = groups.setdefault(key, (Prompt(key, prompt), []))
            if found[0].text != prompt:
                raise UserError(
                    f"{origin}: key {key!r} has another prompt than before; a key should have one"
                )
            for where, each in self._texts(row, several, origin):
                found[1].append(each)
                if each.text.strip() and each.invalid is None:
                    scored = scored or each.score is not None
                    unscored = where if unscored is None and each.score is None else unscored
        if not any(texts for _, texts in groups.values()):
            raise UserError(f"{self.path}: has no text; give at least two for a prompt")
        return _File(groups, len(table), table.hashes, scored, unscored)

    def _rows(self, table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
        for origin, row in table:
            yield origin, {name: row.get(column) for name, column in self._names.items()}

    def _texts(self, row: dict[str, Any], several: bool, origin: str) -> Iterator[tuple[str, Continuation]]:
        """A row's texts, and where each stands."""
        if not several:
            names = {**self._names, "text": self._names["completion"]}
            yield origin, self._one(row | {"text": row["completion"]}, names, origin)
            return
        column = self._names["candidates"]
        if not isinstance(row["candidates"], Sequence) or isinstance(row["candidates"], str):
            raise UserError(f"{origin}: column {column!r} holds no list; it should hold objects with a text")
        for number, each in enumerate(row["candidates"], start=1):
            where = f"{origin}, candidate {number}"
            if not isinstance(each, Mapping):
                raise UserError(f"{where}: is no object; it should be one with a text")
            yield where, self._one(each, {}, where)

    def _one(self, each: Mapping[str, Any], names: Mapping[str, str], origin: str) -> Continuation:
        text = _text(each.get("text"), origin, names.get("text", "text"))
        score = _number(each.get("score"), origin, names.get("score", "score"))
        tokens = _number(each.get("tokens"), origin, names.get("tokens", "tokens"))
        finished = yes_or_no(each.get("finished"), origin, names.get("finished", "finished"))
        invalid = _text(each.get("invalid") or "", origin, "invalid") or None
        count = len(text.split()) if tokens is None else int(tokens)
        return Continuation(text, count, finished, None if invalid else score, invalid)


def _text(value: Any, origin: str, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{origin}: column {column!r} holds {value!r}; it should be text")
    return value


def _number(value: Any, origin: str, column: str) -> float | None:
    """A finite number, also in a CSV's words; None where there is none."""
    if value is None or value == "":
        return None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{origin}: column {column!r} holds {value!r}; it should be a finite number")
    return number
