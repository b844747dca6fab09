"""Tokenised examples on disk, read in place: a million take no more of a process's memory than a thousand.

A store is a folder of plain arrays and a `manifest.json` that is written last, with the SHA-256 of each:
`tokens.bin` (ids, uint16 or uint32), `lengths.bin` (int32, a row for each example: of its parts, then tokens scored),
`offsets.bin` (int64, an example's first token), `ids.bin` (the records' ids, UTF-8) and `id_offsets.bin`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from typing_extensions import override

from trainer.provenance import read_json, sha256_file, sha256_text, write_json
from trainer.schema import TokenizedDemonstration, TokenizedPreference, UserError

FORMAT = 2
MANIFEST = "manifest.json"
Kind = Literal["preference", "demonstration"]
_PARTS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "demonstration": ("prompt", "completion", "marks"),
}
_IN_ROWS = {"preference": 3, "demonstration": 2}
"""How many of the parts, from the first, are tokens of a row: prompt, then each completion."""
_RECORDS = {"preference": TokenizedPreference, "demonstration": TokenizedDemonstration}
_FILES = ("tokens.bin", "lengths.bin", "offsets.bin", "ids.bin", "id_offsets.bin")
_TOGETHER = 256


class Damaged(ValueError):
    """A store's files are not what its manifest says."""


class CannotWrite(OSError):
    """A store's file cannot be written; the message names it."""


class TokenStore(Sequence[Any]):
    """The examples of a folder that `write_store` made, in their order.

    Asking for one reads it from the file; pickled, a store is its folder's path. Tokens are read, not mapped: pages of
    a mapped file count as the process's memory once they were touched, and end it if the file is cut.

    Args:
        folder: of the store.
        verify: read all of it once, and compare each file's SHA-256.

    Raises:
        Damaged: a file is missing, has another size, or another SHA-256.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
            self._check(verify)
        except (UserError, OSError, KeyError, TypeError) as error:
            raise Damaged(f"{self.folder}: {error}") from error
        self.kind: Kind = self.manifest["kind"]
        self._record, self._count = _RECORDS[self.kind], int(self.manifest["examples"])
        self._dtype = np.dtype(self.manifest["token_type"])
        sizes = self._mapped("lengths.bin", np.int32).reshape(self._count, len(_PARTS[self.kind]) + 1)
        self._parts, self.scored = sizes[:, :-1], sizes[:, -1]
        self.lengths = sizes[:, : _IN_ROWS[self.kind]]
        self._offsets = self._mapped("offsets.bin", np.int64)
        self._id_offsets = self._mapped("id_offsets.bin", np.int64)
        self._tokens, self._ids = (self._opened(name) for name in ("tokens.bin", "ids.bin"))

    def _check(self, verify: bool) -> None:
        if self.manifest["format"] != FORMAT:
            raise Damaged(f"{self.folder}: has format {self.manifest['format']!r}, not {FORMAT}")
        if self.manifest["sha256"] != _sealed(self.manifest):
            raise Damaged(f"{self.folder / MANIFEST}: its content is not what was written")
        for name in _FILES:
            path, said = self.folder / name, self.manifest["files"][name]
            if (size := path.stat().st_size) != said["bytes"]:
                raise Damaged(f"{path}: has {size} bytes, not {said['bytes']}")
            if verify and sha256_file(path) != said["sha256"]:
                raise Damaged(f"{path}: its SHA-256 is not the manifest's")

    def _mapped(self, name: str, dtype: Any) -> np.ndarray:
        path = self.folder / name
        return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)

    def _opened(self, name: str) -> int:
        descriptor = os.open(self.folder / name, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder, False)

    @override
    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    @override
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        i = int(index) + (self._count if index < 0 else 0)
        if not 0 <= i < self._count:
            raise IndexError(f"{index} of {self._count} examples")
        sizes = self._parts[i].tolist()
        width = self._dtype.itemsize
        raw = self._read(self._tokens, sum(sizes) * width, int(self._offsets[i]) * width)
        tokens = np.frombuffer(raw, self._dtype).tolist()
        ends = list(itertools.accumulate(sizes, initial=0))
        parts = [tokens[start:end] for start, end in itertools.pairwise(ends)]
        within = _IN_ROWS[self.kind]
        return self._record(*parts[:within], self._id(i), *parts[within:])

    def _id(self, i: int) -> str:
        start, end = self._id_offsets[i : i + 2].tolist()
        return self._read(self._ids, end - start, start).decode("utf-8", "surrogatepass")

    def _read(self, descriptor: int, count: int, start: int) -> bytes:
        raw = os.pread(descriptor, count, start)
        if len(raw) != count:
            raise UserError(f"{self.folder}: was cut while it was in use; delete the folder and start again")
        return raw


def lengths(examples: Sequence[Any]) -> np.ndarray:
    """Tokens of each example's parts, int32 [examples, 1 + completions]: the prompt's, then each completion's.

    At once for a `TokenStore`; for others every example is looked at.
    """
    if isinstance(examples, TokenStore):
        return examples.lengths
    if not len(examples):
        return np.zeros((0, 2), np.int32)
    kind = "preference" if isinstance(examples[0], TokenizedPreference) else "demonstration"
    parts = _PARTS[kind][: _IN_ROWS[kind]]
    return np.array([[len(getattr(example, part)) for part in parts] for example in examples], np.int32)


def scored(examples: Sequence[Any]) -> np.ndarray:
    """Tokens of each example that are scored (of a pair those of the chosen), int32 [examples]."""
    if isinstance(examples, TokenStore):
        return examples.scored
    return np.array([example.scored for example in examples], np.int32)


def longest(examples: Sequence[Any]) -> int:
    """Tokens of the longest prompt with one of its completions; 0 where there is no example."""
    sizes = lengths(examples)
    return int((sizes[:, 0] + sizes[:, 1:].max(1)).max()) if len(sizes) else 0


def content(examples: Sequence[Any]) -> str:
    """SHA-256 over the examples' ids in their order (`sha256_text` of them); at once for a `TokenStore`."""
    if isinstance(examples, TokenStore):
        return examples.manifest["content"]
    digest = _Content()
    for example in examples:
        digest.add(example.id)
    return digest.hexdigest()


class _Content:
    """`sha256_text` of many ids, one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.hexdigest = self._digest.hexdigest

    def add(self, name: str) -> bytes:
        raw = name.encode("utf-8", "surrogatepass")
        self._digest.update(len(raw).to_bytes(8, "big") + raw)
        return raw


# --- writing ------------------------------------------------------------------------------------------------


def write_store(
    folder: Path,
    examples: Iterable[Any],
    kind: Kind,
    vocabulary: int,
    about: Callable[[], dict[str, Any]],
) -> None:
    """Write a new folder; `examples` are taken one by one, and are in memory no longer than that.

    Args:
        folder: that does not exist yet. It is a store once its manifest is there, which comes last.
        kind: of the examples.
        vocabulary: ids are below this number.
        about: asked when all examples are written: what the manifest is to hold beside (`about`).

    Raises:
        CannotWrite: a full disk, or whatever else the operating system says.
    """
    parts, token_type = _PARTS[kind], np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    count, tokens, id_bytes, ids = 0, 0, 0, _Content()
    examples = iter(examples)
    with _telling(folder), contextlib.ExitStack() as stack:
        folder.mkdir(parents=True)
        files = {name: stack.enter_context(_Hashed(folder / name)) for name in _FILES}
        while batch := _next(examples):
            split = [[getattr(example, part) for part in parts] for example in batch]
            sizes = np.array([[len(part) for part in example] for example in split], np.int32)
            counted = np.array([[example.scored] for example in batch], np.int32)
            flat = [token for example in split for part in example for token in part]
            names = [ids.add(example.id) for example in batch]
            starts = tokens + np.cumsum(sizes.sum(1, dtype=np.int64)) - sizes.sum(1)
            id_starts = id_bytes + np.cumsum([len(name) for name in names]) - [len(name) for name in names]
            files["tokens.bin"].write(np.array(flat, token_type).tobytes())
            files["lengths.bin"].write(np.hstack([sizes, counted]).tobytes())
            files["offsets.bin"].write(starts.astype(np.int64).tobytes())
            files["ids.bin"].write(b"".join(names))
            files["id_offsets.bin"].write(id_starts.astype(np.int64).tobytes())
            count, tokens, id_bytes = count + len(batch), tokens + len(flat), id_bytes + sum(map(len, names))
        files["id_offsets.bin"].write(np.int64(id_bytes).tobytes())
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "examples": count,
            "tokens": tokens,
            "token_type": token_type.name,
            "content": ids.hexdigest(),
            "files": {name: file.finished() for name, file in files.items()},
            "about": about(),
        }
    with _telling(folder):
        write_json(folder / MANIFEST, manifest | {"sha256": _sealed(manifest)})
        sync_folder(folder)


def _sealed(manifest: dict[str, Any]) -> str:
    """SHA-256 over a manifest, but for its own."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return sha256_text(json.dumps(rest, sort_keys=True))


class _Theirs(Exception):
    """Carries an error of the examples' own past `_telling`."""

    def __init__(self, error: OSError) -> None:
        self.error = error


def _next(examples: Iterator[Any]) -> list[Any]:
    try:
        return list(itertools.islice(examples, _TOGETHER))
    except OSError as error:
        raise _Theirs(error) from error


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """What goes wrong in writing is a `CannotWrite`; what goes wrong in reading the examples stays what it is."""
    try:
        yield
    except _Theirs as carried:
        raise carried.error from None
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror, str(error.filename or folder)) from error


class _Hashed:
    """A new file that is hashed as it is written, and on the disk once it is finished."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "xb")  # noqa: SIM115
        self._digest, self._bytes = hashlib.sha256(), 0

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing flushes what is left: on a full disk that fails again, and the first failure is the one to tell.
        with contextlib.suppress(OSError):
            self._stream.close()

    def write(self, raw: bytes) -> None:
        self._stream.write(raw)
        self._digest.update(raw)
        self._bytes += len(raw)

    def finished(self) -> dict[str, Any]:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
