"""Answers by key, kept as they come: what a kill leaves is whole, and a rerun asks only for what is missing.

A ledger is a folder: `settings.json` says what its rows follow from, `parts/WRITER.jsonl` holds one row on each line.
Each writer (a shard, a rank) has a part of its own; all read all parts, so that shards and ranks may differ between
reruns.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.provenance import naming_file, read_json, write_json
from trainer.schema import UserError

Row = dict[str, Any]


class Ledger:
    """Rows by their `key`, in the order given; a key has one row, whichever part holds it.

    Args:
        folder: made where it is missing.
        settings: all that rows follow from, as plain JSON; another ledger's are refused.
        writer: the part that this process writes; one process at a time.

    Raises:
        UserError: the folder's rows follow from other settings (they are named), a part is being written by another
            process, or a part holds what is no row, or two rows of one key that differ.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], writer: str = "0") -> None:
        self.folder, self.writer = Path(folder), writer
        self._stream: Any = None
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)
        self._agree(json.loads(json.dumps(settings)))
        self.rows: dict[str, Row] = {}
        for part in sorted((self.folder / "parts").glob("*.jsonl")):
            for row in _whole_rows(part):
                self._take(row, part)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def own(self) -> Path:
        """This writer's part."""
        return self.folder / "parts" / f"{self.writer}.jsonl"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no row yet, in their order."""
        return [key for key in keys if key not in self.rows]

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows to this writer's part, through to the disk; those whose key has a row already are left out."""
        new = {row["key"]: row for row in rows if row["key"] not in self.rows}
        if not new:
            return
        stream = self._stream = self._stream or self._opened()
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in new.values())
        left = memoryview(text.encode("utf-8", "surrogatepass"))
        before = stream.tell()
        try:
            with naming_file(self.own):
                while left:
                    left = left[stream.write(left) :]
                os.fsync(stream.fileno())
        except OSError:
            # A full disk may have taken half of it: the part ends where it ended before.
            with contextlib.suppress(OSError):
                os.ftruncate(stream.fileno(), before)
            raise
        self.rows |= new

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _opened(self) -> Any:
        stream = open(self.own, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.close()
            raise UserError(
                f"{self.own}: another process is writing it; wait for it, or give each process a shard of its own"
            ) from error
        # What follows the last line end is of a writer that was killed.
        whole = self.own.read_bytes().rfind(b"\n") + 1
        os.ftruncate(stream.fileno(), whole)
        stream.seek(whole)
        return stream

    def _agree(self, settings: dict[str, Any]) -> None:
        path = self.folder / "settings.json"
        if not path.is_file():
            write_json(path, settings)
            return
        there = read_json(path)
        if not isinstance(there, dict):
            raise UserError(f"{path}: holds no settings; give another folder, or remove it")
        differing = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
        if differing:
            told = "; ".join(
                f"{name} was {_short(there.get(name))}, is {_short(settings.get(name))}" for name in differing
            )
            raise UserError(
                f"{self.folder}: what lies there was made with other settings ({told}); give another folder, or"
                " remove it"
            )

    def _take(self, row: Row, part: Path) -> None:
        known = self.rows.setdefault(row["key"], row)
        if known != row:
            raise UserError(
                f"{part}: the row of {row['key']!r} differs from another part's; remove one of the parts"
            )


def _whole_rows(part: Path) -> Iterator[Row]:
    lines = part.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{part}, line {number}: not valid JSON ({error}); remove the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise UserError(f"{part}, line {number}: is no row with a key; remove the line")
        yield row


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
