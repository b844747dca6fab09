"""Instructions to answer: the first turns of OpenAssistant's dialogues in one language, or any list."""

from __future__ import annotations

import dataclasses
import types
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from trainer.data.files import Table
from trainer.pairs.prompts import FilePrompts, Part, text_of
from trainer.schema import UserError

Wanted = str | bool | list[str] | None
OASST: Mapping[str, Wanted] = types.MappingProxyType(
    {"role": "prompter", "parent_id": None, "lang": "ru", "deleted": False, "review_result": True}
)
"""First turns of people, in Russian, that reviewers took and nobody deleted."""


@dataclasses.dataclass
class InstructionPrompts(FilePrompts):
    """Whole texts of a column, each once, of the rows whose other columns say what is wanted.

    Args:
        path: hub dataset, or .txt (one instruction a line), .jsonl, .json, .csv or .parquet file.
        column: the instructions.
        where: column -> what it must say: a text or one of a list, true or false, or null for nothing. Rows that say
            otherwise are counted by the first such column (`dropped_lang`). Default: Russian first turns of
            OpenAssistant/oasst1; {} takes every row, as of a plain list.
        part: `train`, `held_out` or `all`.
        held_out_fraction: share of the instructions that are held out (default 0.1); give the same everywhere.
        limit: at most so many.
        split: of the hub dataset (default `train`).
        revision: branch, tag or commit of the hub dataset.
        offline: refuse the network.
    """

    path: str = "OpenAssistant/oasst1"
    column: str = "text"
    where: dict[str, Wanted] = dataclasses.field(default_factory=lambda: dict(OASST))
    part: Part = "train"
    held_out_fraction: float | None = None
    limit: int | None = None
    split: str | None = None
    revision: str | None = None
    offline: bool = False

    @override
    def _columns(self) -> list[str]:
        return list(dict.fromkeys([self.column, *self.where]))

    @override
    def _table(self) -> Table:
        try:
            return super()._table()
        except UserError as error:
            if self.where and ": no column" in str(error):
                raise UserError(
                    f"{error}; `where` looks at {', '.join(self.where)}: name columns that are there, or set where to"
                    " {} for a plain list"
                ) from error
            raise

    @override
    def _found(
        self, table: Table, tokenizer: PreTrainedTokenizerBase | None, counts: Counter[str]
    ) -> Iterator[str]:
        for origin, row in table:
            other = next((name for name, wanted in self.where.items() if not _says(row[name], wanted)), None)
            if other is not None:
                counts[f"dropped_{other}"] += 1
            elif text := text_of(row, self.column, origin).strip():
                yield text
            else:
                counts["dropped_blank"] += 1


def _says(value: Any, wanted: Wanted) -> bool:
    """Whether a cell says what is wanted; a CSV has words only, and a missing cell says nothing."""
    if wanted is None:
        return value is None or value == ""
    if isinstance(wanted, bool):
        return value is wanted or (isinstance(value, str) and value.strip().lower() == str(wanted).lower())
    return value in wanted if isinstance(wanted, list) else value == wanted
