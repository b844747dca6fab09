"""JSON lines, read one by one: the file is checked as a whole first, and is never in memory as a whole."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.schema import UserError

_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """Rows of a .jsonl file (or .jsonl.gz): one JSON object a line, blank lines left out.

    `column_names` are those of all rows, as first met. Iterating reads the file anew.

    Raises:
        UserError: a line is no JSON object, or holds half a surrogate pair; the file and line are named.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, 0
        names: dict[str, None] = {}
        for row in self:
            self._rows += 1
            names.update(dict.fromkeys(row))
        self.column_names = list(names)

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with open_binary(self.path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(_BOM) if number == 1 else raw
                if not line.isspace():
                    yield self._parsed(line, number)

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line.decode("utf-8"))
            if b"\\ud" in line.lower():
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.path}:{number}: not valid JSON ({error.msg} at column {error.colno})"
            ) from error
        except UnicodeEncodeError as error:
            raise UserError(f"{self.path}:{number}: holds half a character (a lone surrogate)") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}:{number}: is not UTF-8 (byte {error.start + 1})") from error
        except ValueError as error:  # an integer of thousands of digits
            said = str(error).split(";")[0]
            raise UserError(f"{self.path}:{number}: cannot be read ({said})") from error
        except RecursionError as error:
            raise UserError(f"{self.path}:{number}: is nested too deep") from error
        if not isinstance(value, dict):
            raise UserError(f"{self.path}:{number}: a JSON object is wanted, not {type(value).__name__}")
        return value


def open_binary(path: Path) -> BinaryIO:
    """A file's bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]
