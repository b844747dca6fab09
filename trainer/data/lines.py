"""JSON lines and CSV, read row by row: the file is checked as a whole first, and is never in memory as a whole."""

from __future__ import annotations

import abc
import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from trainer.schema import UserError

_BOM = b"\xef\xbb\xbf"
_LARGEST_CELL = 2**31 - 1


class BrokenLine(UserError):
    """A line that is no JSON object in UTF-8, or no row of a CSV."""


class Lines(abc.ABC):
    """Rows of a file, which each iteration reads anew; blank lines are left out.

    `column_names` are those of all rows, as first met. With `tolerant` a broken line is a row, too: it counts, and
    comes as the `BrokenLine` that it would raise.

    Raises:
        BrokenLine: a line is broken; the file and line are named.
        UserError: with `tolerant`, all lines are broken.
    """

    def __init__(self, path: Path, tolerant: bool = False) -> None:
        self.path, self.tolerant, self._rows = path, tolerant, 0
        names: dict[str, None] = {}
        first: BrokenLine | None = None
        whole = 0
        for row in self:
            self._rows += 1
            if isinstance(row, BrokenLine):
                first = first or row
            else:
                whole += 1
                names.update(dict.fromkeys(row))
        self.column_names = list(names)
        if first is not None and not whole:
            raise UserError(f"{path}: all {self._rows} lines are broken; the first: {first}")

    def __len__(self) -> int:
        return self._rows

    @abc.abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any] | BrokenLine]:
        """Rows from the first one on."""


class JsonLines(Lines):
    """Rows of a .jsonl file (or .jsonl.gz): one JSON object a line. Half a surrogate pair in it is broken, too."""

    @override
    def __iter__(self) -> Iterator[dict[str, Any] | BrokenLine]:
        with open_binary(self.path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if line.isspace():
                    continue
                try:
                    row: dict[str, Any] | BrokenLine = self._parsed(line, number)
                except BrokenLine as error:
                    if not self.tolerant:
                        raise
                    row = error.with_traceback(None)
                yield row

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line.decode("utf-8"))
            if b"\\ud" in line.lower():
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise BrokenLine(
                f"{self.path}:{number}: not valid JSON ({error.msg} at column {error.colno})"
            ) from error
        except UnicodeEncodeError as error:
            raise BrokenLine(f"{self.path}:{number}: holds half a character (a lone surrogate)") from error
        except UnicodeDecodeError as error:
            raise BrokenLine(f"{self.path}:{number}: is not UTF-8 (byte {error.start + 1})") from error
        except ValueError as error:  # an integer of thousands of digits
            said = str(error).split(";")[0]
            raise BrokenLine(f"{self.path}:{number}: cannot be read ({said})") from error
        except RecursionError as error:
            raise BrokenLine(f"{self.path}:{number}: is nested too deep") from error
        if not isinstance(value, dict):
            raise BrokenLine(f"{self.path}:{number}: a JSON object is wanted, not {type(value).__name__}")
        return value


class CsvLines(Lines):
    """Rows of a .csv file (or .csv.gz), every cell as text; the first row names the columns.

    A row with more cells than columns is broken, and so is one that is not UTF-8. Cells that a row lacks at its end are
    missing (None), as spreadsheets leave out empty ones there; whether they may be is the reader's matter. A quote that
    is never closed is refused, `tolerant` or not: where the row that it begins should end cannot be told.
    """

    def __init__(self, path: Path, tolerant: bool = False) -> None:
        super().__init__(path, tolerant)
        self.column_names = self._header

    @override
    def __iter__(self) -> Iterator[dict[str, Any] | BrokenLine]:
        records = self._records()
        number, header = next(records, (1, []))
        self._check_header(number, header)
        self._header = header
        for number, cells in records:
            told = None
            if len(cells) > len(header):
                told = f"{len(cells)} cells for {len(header)} columns; quote a cell that holds commas"
            elif any("\udc80" <= char <= "\udcff" for cell in cells if not cell.isascii() for char in cell):
                told = "is not UTF-8"
            if told is None:
                yield {name: cells[n] if n < len(cells) else None for n, name in enumerate(header)}
            elif self.tolerant:
                yield BrokenLine(f"{self.path}:{number}: {told}")
            else:
                raise BrokenLine(f"{self.path}:{number}: {told}")

    def _check_header(self, number: int, header: list[str]) -> None:
        if repeated := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{self.path}:{number}: the header names {', '.join(map(repr, repeated))} twice")
        if any("\udc80" <= char <= "\udcff" for name in header for char in name):
            raise UserError(f"{self.path}:{number}: the header is not UTF-8; save the file as UTF-8")

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record that is not blank, and the line where it begins."""
        # The limit (131,072 letters in a cell) is the module's, for all readers of the process.
        csv.field_size_limit(_LARGEST_CELL)
        at_end = False

        def lines() -> Iterator[str]:
            nonlocal at_end
            with (
                open_binary(self.path) as stream,
                io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as text,
            ):
                yield from text
            at_end = True

        reader = csv.reader(lines())
        begins = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{self.path}:{begins}: cannot be read as CSV ({error})") from error
            if cells is None:
                return
            if at_end:
                # The reader asked for a line more to end the record.
                raise UserError(
                    f"{self.path}:{begins}: a quote is opened and never closed; close it, or double it"
                )
            if cells and (len(cells) > 1 or not cells[0] or not cells[0].isspace()):
                yield begins, cells
            begins = reader.line_num + 1


def open_binary(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]
