"""A folder of reference log-probs: records that only ever grow in number, each with its own checksum.

`manifest.json` says of which reference they are. `*.records` hold 36 bytes for each pair: its 16-byte content key, the
two sums, the two token counts, and a CRC-32 that starts from the reference's key, so that a record of another
reference is damage, too. What a kill leaves of a last record is passed over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from trainer.provenance import FULL_DISK, read_json, sha256_text, write_json
from trainer.schema import UserError

FORMAT = "tandem reference cache 1"
MANIFEST = "manifest.json"
LOCK = ".lock"
RECORD = np.dtype(
    [
        ("key", "S16"),
        ("chosen", "<f4"),
        ("rejected", "<f4"),
        ("chosen_tokens", "<i4"),
        ("rejected_tokens", "<i4"),
        ("crc", "<u4"),
    ]
)
_CHECKED = RECORD.itemsize - 4
_SUFFIX = ".records"

_holders: dict[str, CacheFolder] = {}
"""Which folders this process writes to: a run that an error ended does not let go of its own."""

log = logging.getLogger(__name__)


def identity_key(identity: dict[str, Any]) -> str:
    """SHA-256 that stands for a reference: which weights it is made of, and in which dtype."""
    return sha256_text(FORMAT, json.dumps(identity, sort_keys=True, ensure_ascii=False))


def merged(*tables: np.ndarray) -> np.ndarray:
    """The records of all tables, sorted by key, each key once: the first that came."""
    table = np.concatenate(tables)
    # Keys are 16 bytes all, so that it does not matter that NumPy compares them without their zeros at the end.
    _, first = np.unique(table["key"], return_index=True)
    return table[first]


def finite(table: np.ndarray) -> np.ndarray:
    """Which records hold numbers: what is not finite is never kept."""
    return np.isfinite(table["chosen"]) & np.isfinite(table["rejected"])


def difference(there: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first field in which two references differ, as words; None if they are the same."""
    theirs, ours = _flat(there), _flat(here)
    for field in {**ours, **theirs}:
        if theirs.get(field) != ours.get(field):
            return f"{field} was {_short(theirs.get(field))} and is {_short(ours.get(field))}"
    return None


def cannot_write(path: Path, error: OSError) -> UserError:
    """The line for a folder that takes nothing."""
    why = os.strerror(error.errno or 0)
    if error.errno in FULL_DISK:
        return UserError(
            f"reference.cache: {path}: no room ({why}); what was recorded is kept, and after making room the same"
            " command goes on"
        )
    return UserError(f"reference.cache: {path}: cannot be written to ({why}); give another folder")


class CacheFolder:
    """Log-probs of one reference on disk. One process writes at a time; any number may read.

    Args:
        path: the folder; made with the first record.
        identity: which weights the reference is made of, as plain JSON.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity, self.key = path, identity, identity_key(identity)
        self._seed = int(self.key[:8], 16)
        self._lock: int | None = None
        self._shard: int | None = None
        self._written = 0
        self._damaged: list[str] = []
        self._own: set[Path] = set()  # what was read or written here

    def read(self, strict: bool = False) -> np.ndarray:
        """All sound records, sorted by key. Damage is named in the log; where it is `strict`, refused.

        Raises:
            UserError: a cache of another reference, a folder that is no cache, or damage; where it is `strict`, a
                folder that is not there.
        """
        self._check()
        if strict and not self.path.exists():
            raise UserError(
                f"reference.cache: {self.path}: no such folder; `tandem cache-reference` with this run's arguments"
                f" and --output {self.path} makes it"
            )
        try:
            self._own |= {*(shards := self._shards())}
            tables = [self._sound(shard) for shard in shards]
        except OSError as error:
            raise _unreadable(self.path, error) from error
        for problem in self._damaged:
            if strict:
                raise UserError(f"{problem}; `tandem cache-reference` with --output {self.path} mends it")
            log.warning("%s; computed anew", problem)
        return merged(*tables) if tables else np.empty(0, RECORD)

    def append(self, records: np.ndarray) -> None:
        """Add records, flushed to disk when this returns; their checksums are filled in.

        Raises:
            UserError: another process writes to the folder.
            OSError: the disk is full, or the folder not writable. What was written before stays.
        """
        self._open()
        assert self._shard is not None
        self._seal(records)
        try:
            _write(self._shard, records)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._shard, self._written)
            raise
        self._written += records.nbytes

    def tidy(self, records: np.ndarray) -> None:
        """Put all records into one file in place of many or damaged ones. Only while this process may write."""
        old = [shard for shard in self._shards() if shard in self._own]
        if self._lock is None or (len(old) < 2 and not self._damaged):
            return
        self._seal(records)
        whole, part = self._new_name(), self.path / f".{secrets.token_hex(8)}.part"
        try:
            shard = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                _write(shard, records)
            finally:
                os.close(shard)
            os.replace(part, whole)
        finally:
            part.unlink(missing_ok=True)
        self._close_shard()
        # A kill in between leaves records twice, which does no harm.
        for shard_path in old:
            shard_path.unlink()
        self._own = {whole}
        self._damaged.clear()

    def clear(self) -> None:
        """Remove what a cache, of whichever reference, left in the folder.

        Raises:
            UserError: it is a link, so that what is there may be somebody else's.
        """
        if self.path.is_symlink():
            raise UserError(
                f"reference.cache: {self.path} is a link, and a new run would empty what it leads to; remove the link,"
                f" or set reference.cache to {self.path.resolve()}"
            )
        for path in (*self._shards(), self.path / MANIFEST):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder. May be called twice."""
        self._close_shard()
        if self._lock is not None:
            lock, self._lock = self._lock, None
            os.close(lock)

    # Reading

    def _shards(self) -> list[Path]:
        return sorted(self.path.glob(f"*{_SUFFIX}"))

    def _check(self) -> None:
        """Refuse what is no cache of this reference, and change nothing."""
        try:
            if self.path.is_file():
                raise UserError(f"reference.cache: {self.path} is a file; give a folder")
            self._check_manifest()
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _check_manifest(self) -> None:
        path = self.path / MANIFEST
        if not path.exists():
            if self.path.is_dir() and any(child.name[0] != "." for child in self.path.iterdir()):
                raise UserError(
                    f"reference.cache: {self.path} is no reference cache (it has no {MANIFEST}); give a new folder"
                )
            return
        manifest = read_json(path)
        there = manifest.get("reference") if isinstance(manifest, dict) else None
        if not isinstance(there, dict) or manifest.get("format") != FORMAT:
            raise UserError(
                f"{path}: not the manifest of a reference cache (its format should be '{FORMAT}')"
            )
        if manifest.get("key") != identity_key(there):
            raise UserError(f"{path}: damaged (its key does not fit what it says); remove {self.path}")
        self._refuse_stale(there)

    def _refuse_stale(self, there: dict[str, Any]) -> None:
        if (differs := difference(there, self.identity)) is not None:
            raise UserError(
                f"reference.cache: {self.path} is stale, its log-probs are those of another reference: {differs};"
                " give another folder, remove this one, or give the reference that it was made with"
            )

    def _sound(self, shard: Path) -> np.ndarray:
        raw = np.fromfile(shard, np.uint8)
        table = raw[: len(raw) // RECORD.itemsize * RECORD.itemsize].view(RECORD)
        good = table["crc"] == self._sums(memoryview(raw.data), len(table))
        # After a power failure a file may end in zeros that were never written.
        end, size = len(table), RECORD.itemsize
        while end and not good[end - 1] and not raw[(end - 1) * size : end * size].any():
            end -= 1
        if len(bad := np.flatnonzero(~good[:end])):
            self._damaged.append(
                f"{shard}: damaged, {len(bad)} of {end} records, the first at byte {bad[0] * size}"
            )
        return table[good & finite(table)]

    # Writing

    def _seal(self, records: np.ndarray) -> None:
        records["crc"] = self._sums(memoryview(records.tobytes()), len(records))

    def _sums(self, raw: memoryview, count: int) -> np.ndarray:
        starts = range(0, count * RECORD.itemsize, RECORD.itemsize)
        return np.fromiter(
            (zlib.crc32(raw[at : at + _CHECKED], self._seed) for at in starts), np.uint32, count
        )

    def _open(self) -> None:
        if self._shard is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        self._check_manifest()  # another reference's may have come since it was read
        if not (self.path / MANIFEST).exists():
            content = {"format": FORMAT, "key": self.key, "reference": self.identity}
            write_json(self.path / MANIFEST, content)
        shard = self._new_name()
        self._shard = os.open(shard, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._own.add(shard)
        self._written = 0

    def take(self) -> None:
        """Claim the folder for this process before there is anything to write.

        Raises:
            UserError: another process writes to it, it is no cache of this reference, or it cannot be made.
        """
        self._check()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _take(self) -> None:
        if self._lock is not None:
            return
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            if self._take_over():
                return
            raise UserError(
                f"reference.cache: {self.path} is being written to by another process; wait until it ends, or give"
                " another folder"
            ) from error
        except OSError:
            # A file system without locks: no two processes write one file, and none removes another's.
            os.close(lock)
            return
        self._lock = lock
        self._sweep()
        _holders[str(self.path.resolve())] = self
        # A data loader's worker that outlives this process must not keep the lock.
        os.register_at_fork(after_in_child=self.close)

    def _sweep(self) -> None:
        """Remove what a kill left half written. Only under the lock."""
        for left in (*self.path.glob(".*.part"), *self.path.glob(f".{MANIFEST}.*.tmp")):
            with contextlib.suppress(OSError):
                left.unlink()

    def _take_over(self) -> bool:
        """Take the folder from an earlier run of this process, which an error may have ended."""
        holder = _holders.get(key := str(self.path.resolve()))
        if holder is None or holder._lock is None:
            return False
        self._lock, holder._lock = holder._lock, None
        holder._close_shard()
        _holders[key] = self
        return True

    def _new_name(self) -> Path:
        return self.path / f"{time.time_ns():020d}-{secrets.token_hex(4)}{_SUFFIX}"

    def _close_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            os.close(shard)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"reference.cache: {error.filename or path}: {os.strerror(error.errno or 0)}")


def _write(file: int, records: np.ndarray) -> None:
    rest = memoryview(records.tobytes())
    while rest:
        if not (count := os.write(file, rest)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[count:]
    os.fsync(file)


def _flat(tree: dict[str, Any], under: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{under}{key}.") if isinstance(value, dict) else {under + key: value}
    return out


def _short(value: Any) -> str:
    """A value in a message; of a long hash, its beginning."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) in (40, 64) and all(c in "0123456789abcdef" for c in text) else text
