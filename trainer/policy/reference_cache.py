"""Reference log-probs that were computed once: a table by the content of the pairs, the same on every rank.

What a rank computes waits until the ranks `share` it, all at the same moments; rank zero writes it to the folder, if
there is one. So ranks always know the same, and decide alike whether a pass over the pairs needs the reference at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data.layout import content_key
from trainer.policy.base import PolicyConfig
from trainer.policy.folders import ADAPTER_CONFIG, is_adapter, resolve
from trainer.policy.reference_files import (
    RECORD,
    CacheFolder,
    cannot_write,
    difference,
    finite,
    identity_key,
    merged,
)
from trainer.provenance import read_json, sha256_file, sha256_text
from trainer.schema import PairLogps, PreferenceBatch, TokenizedPreference, UserError

_NUMBERS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
_AT_ONCE = 4096
"""Keys that are looked up together; and batches that stay on the device before they come to the CPU."""

log = logging.getLogger(__name__)


def identity(made_of: PolicyConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """What decides a reference's numbers, wherever its files lie: hashes of weights and configs, adapter, dtype.

    And the version of transformers, whose code makes numbers of them.
    """
    folder = Path(made_of.base).expanduser()
    out: dict[str, Any] = {
        "base": weights["base"]["digest"],
        "config": sha256_file(folder / "config.json") if folder.is_dir() else None,
        "dtype": made_of.dtype,
        "transformers": metadata.version("transformers"),
        "start": None,
        "adapter": None,
    }
    if made_of.start is None:
        return out
    out["start"] = weights["start"]["files"]
    path = resolve(made_of.start)
    if path.is_dir() and not is_adapter(path):
        out["config"] = sha256_file(path / "config.json")
    if made_of.adapter is not None:
        out["adapter"] = {
            **({} if made_of.adapter.unset and path.is_dir() else dataclasses.asdict(made_of.adapter)),
            **(_shape_of(path) if path.is_dir() else {}),
        }
    return out


def _shape_of(folder: Path) -> dict[str, str]:
    """What a PEFT config says of the numbers: not where the base lay, and what was drawn at the start."""
    said = read_json(folder / ADAPTER_CONFIG)
    passing = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout")
    kept = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in said.items()
        if key not in passing and not key.startswith("init_")
    }
    return {"peft_config": sha256_text(json.dumps(kept, sort_keys=True))}


class ReferenceCache:
    """Log-probs of one reference, in memory; with `attach`, in a folder too.

    Args:
        identity: which weights the reference is made of, as plain JSON: another one's log-probs are refused.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity, self.key = identity, identity_key(identity)
        self.folder: CacheFolder | None = None
        self.full = False  # the folder took no more
        self.must_write = False  # a folder that takes no more is an error
        self._set(np.empty(0, RECORD))
        self._pending: list[tuple[list[bytes], PairLogps]] = []
        self._drained: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._table)

    def _set(self, table: np.ndarray) -> None:
        self._table, self._keys = table, np.ascontiguousarray(table["key"])

    # What is known

    def attach(self, folder: CacheFolder, strict: bool = False, new: bool = False) -> None:
        """Take in what the folder holds, and from now on write to it what is shared. Every rank must call it.

        Args:
            strict: refuse damage, and a folder that is not there, instead of computing anew.
            new: the folder belongs to a run that begins: what an earlier one left is removed.

        Raises:
            UserError: the folder holds another reference's log-probs, is no cache, or is damaged.
        """

        def read() -> np.ndarray:
            if new:
                folder.clear()
            return folder.read(strict)

        there = from_first(read)
        self.folder = folder
        self._set(merged(there, self._table))

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Which of the keys (their indices) are not known."""
        wanted = np.array(keys, "S16")
        return np.flatnonzero(self._find(wanted)[1])

    def get(self, keys: Sequence[bytes]) -> PairLogps:
        """The pairs' log-probs, as they were recorded; every key must be known."""
        at, unknown = self._find(np.array(keys, "S16"))
        assert not unknown.any(), "a pair's log-probs are not known"
        found = self._table[at]
        return PairLogps(
            *(torch.from_numpy(found[name].copy()) for name in _NUMBERS[:2]),
            *(torch.from_numpy(found[name].astype(np.int64)) for name in _NUMBERS[2:]),
        )

    def _find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each key stands, and whether it does not."""
        if not len(self._keys):
            return np.zeros(len(wanted), int), np.ones(len(wanted), bool)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return at, self._keys[at] != wanted

    def first_missing(self, examples: Sequence[TokenizedPreference]) -> str | None:
        """The id of an example that is not known; None if all are. The same on every rank; each looks up its part.

        Every rank must call it.
        """
        if not len(self):
            return examples[0].id if len(examples) else None
        rank, ranks = _rank(), _ranks()
        own = range(rank, len(examples), ranks)
        mine = next(self._unknown(examples[i] for i in own), None)
        return next((found for found in _gathered(mine) if found is not None), None)

    def count_missing(self, examples: Sequence[TokenizedPreference]) -> int:
        """How many examples are not known. Every rank must call it."""
        own = range(_rank(), len(examples), _ranks())
        return sum(_gathered(sum(1 for _ in self._unknown(examples[i] for i in own))))

    def all_missing(self, examples: Sequence[TokenizedPreference]) -> list[int]:
        """Which examples are not known: their indices, each content once for each rank. Every rank must call it."""
        own, found = range(_rank(), len(examples), _ranks()), dict[bytes, int]()
        for start in range(0, len(own), _AT_ONCE):
            part = own[start : start + _AT_ONCE]
            keys = [content_key(examples[i]) for i in part]
            for at in self.missing(keys):
                found.setdefault(keys[at], part[at])
        return sorted(index for indices in _gathered(list(found.values())) for index in indices)

    def _unknown(self, examples: Iterable[TokenizedPreference]) -> Iterator[str]:
        part: list[TokenizedPreference] = []
        for example in examples:
            part.append(example)
            if len(part) == _AT_ONCE:
                yield from self._unknown_of(part)
                part = []
        yield from self._unknown_of(part)

    def _unknown_of(self, part: list[TokenizedPreference]) -> list[str]:
        return [part[i].id for i in self.missing([content_key(each) for each in part])] if part else []

    # What is new

    def record(self, batch: PreferenceBatch, logps: PairLogps) -> None:
        """Keep a batch's log-probs until the ranks share them. Nothing waits for the device."""
        self._pending.append((batch.keys, logps))
        if len(self._pending) >= _AT_ONCE:
            self._drain()

    def share(self) -> None:
        """Make what each rank has recorded known to all, and write it. Every rank must call it, after equally
        many records.

        A folder that cannot be written to costs a line in the log, no more: memory holds the same.

        Raises:
            UserError: it cannot be written to, and `must_write` is set. What it holds already stays.
        """
        self._drain()
        if not self._drained:
            return
        found, self._drained = merged(*self._drained), []
        found = merged(*_gathered(found))
        new = found[self._find(np.ascontiguousarray(found["key"]))[1]]
        self._set(merged(self._table, new))
        if self.folder is None or not len(new):
            return
        if self.must_write:
            from_first(functools.partial(self._must_write, self.folder, new))
        elif not self.full and _rank() == 0:
            self._write(self.folder, new)

    def _drain(self) -> None:
        """Bring what waits on the device to the CPU. What is not finite is dropped, so that it is computed again."""
        if not self._pending:
            return
        keys = [key for keys, _ in self._pending for key in keys]
        table = np.empty(len(keys), RECORD)
        table["key"] = keys
        for name in _NUMBERS:
            table[name] = torch.cat([getattr(logps, name) for _, logps in self._pending]).cpu().numpy()
        self._pending = []
        self._drained.append(table[finite(table)])

    def _write(self, folder: CacheFolder, new: np.ndarray) -> None:
        try:
            folder.append(new)
        except (OSError, UserError) as error:
            self.full = True
            why = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            log.warning("reference log-probs stay in memory, %s takes no more: %s", folder.path, why)

    @staticmethod
    def _must_write(folder: CacheFolder, new: np.ndarray) -> None:
        try:
            folder.append(new)
        except OSError as error:
            raise cannot_write(folder.path, error) from error

    def tidy(self) -> None:
        """Put what the folder holds into one sound file. Where that fails it stays as it is, which is as good."""
        if self.folder is not None and _rank() == 0:
            with contextlib.suppress(OSError):
                self.folder.tidy(self._table)

    def close(self) -> None:
        """Let go of the folder."""
        if self.folder is not None:
            self.tidy()
            self.folder.close()

    # In a checkpoint, where there is no folder

    def state(self) -> dict[str, Any]:
        """The table as bytes, and of which reference it is."""
        return {"reference": self.identity, "table": torch.from_numpy(self._table.view(np.uint8).copy())}

    def load_state(self, state: Any) -> None:
        """Take in what `state` gave.

        Raises:
            UserError: those are another reference's log-probs.
        """
        if not isinstance(state, dict):
            log.warning(
                "the checkpoint does not say whose reference log-probs it holds; they are computed anew"
            )
            return
        if (differs := difference(state["reference"], self.identity)) is not None:
            raise UserError(
                f"reference.cache: the checkpoint's log-probs are those of another reference: {differs}; resume with"
                " the reference that it was trained with, or set reference.cache: null"
            )
        table = state["table"].cpu().numpy().view(RECORD)
        self._set(merged(self._table, table[finite(table)]))


def from_first(read: Callable[[], Any]) -> Any:
    """What rank zero reads, on every rank; what stops it stops them all."""
    if _ranks() == 1:
        return read()
    box: list[Any] = [None]
    if _rank() == 0:
        try:
            box = [(read(), None)]
        except (UserError, OSError) as error:
            box = [(None, error)]
    torch.distributed.broadcast_object_list(box)
    found, refused = box[0]
    if refused is not None:
        raise refused
    return found


def _gathered(mine: Any) -> list[Any]:
    if _ranks() == 1:
        return [mine]
    found: list[Any] = [None] * _ranks()
    torch.distributed.all_gather_object(found, mine)
    return found


def _ranks() -> int:
    return torch.distributed.get_world_size() if _distributed() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
