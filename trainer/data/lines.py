"""JSON lines, read one by one: the file is checked as a whole first, and is never in memory as a whole."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.schema import UserError

_BOM = b"\xef\xbb\xbf"


class BrokenLine(UserError):
    """A line that is no JSON object in UTF-8."""


class JsonLines:
    """Rows of a .jsonl file (or .jsonl.gz): one JSON object a line, blank lines left out.

    `column_names` are those of all rows, as first met. Iterating reads the file anew. With `tolerant` a broken line is
    a row, too: it counts, and comes as the `BrokenLine` that it would raise.

    Raises:
        BrokenLine: a line is no JSON object, or holds half a surrogate pair; the file and line are named.
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


def open_binary(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]
