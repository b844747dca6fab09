"""What DeepSpeed's ZeRO-3 keeps on a rank, and what it gathers in which order.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 5. The rules are those of DeepSpeed 0.19.8,
`runtime/zero/partition_parameters.py` (shares) and `partitioned_param_coordinator.py` (gathering), read and restated
here: neither can be asked without ranks that run.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed's settings that move bytes, with the defaults of `trainer.strategy.Zero3`; sizes are elements."""

    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    reduce_bucket_size: int = 20_000_000
    contiguous_gradients: bool = True
    hpz_partition_size: int = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"

    @classmethod
    def of(cls, given: dict[str, Any]) -> ZeroSettings:
        """From the settings of `trainer.strategy.Zero3`: its own, and DeepSpeed's in its `config`."""
        known = {field.name for field in dataclasses.fields(cls)}
        extra = {
            key.removeprefix("stage3_").removeprefix("zero_"): value
            for key, value in (given.get("config") or {}).items()
        }
        found: dict[str, Any] = {key: value for key, value in {**given, **extra}.items() if key in known}
        return cls(**{key: _whole_number(value) for key, value in found.items()})


def _whole_number(value: Any) -> Any:
    """YAML reads 1e8 as a float or a text, and DeepSpeed takes both."""
    return int(float(value)) if isinstance(value, float) or str(value)[:1].isdigit() else value


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: elements and bytes of each."""

    numel: int
    itemsize: int
    trained: bool

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize


def shard_numel(numel: int, ranks: int) -> int:
    """Elements of one rank's share of a parameter: DeepSpeed pads each to a multiple of the ranks."""
    return -(-numel // ranks)


def shard_bytes(numel: int, ranks: int, itemsize: int) -> int:
    """Bytes of one rank's share of a parameter."""
    return shard_numel(numel, ranks) * itemsize


def persistent(weights: Sequence[Weight], settings: ZeroSettings) -> list[bool]:
    """For each parameter, in the module's order, whether it stays whole on every rank, beside the shares."""
    total, kept = 0, []
    for weight in weights:
        keep = (
            weight.numel <= settings.param_persistence_threshold
            and total + weight.numel <= settings.model_persistence_threshold
        )
        total += weight.numel if keep else 0
        kept.append(keep)
    return kept


def sharded_bytes(weights: Sequence[Weight], ranks: int, settings: ZeroSettings) -> int:
    """Bytes of these parameters on one rank: shares, and what persists whole (on one rank the share is the whole)."""
    shares = sum(shard_bytes(weight.numel, ranks, weight.itemsize) for weight in weights)
    return shares + (persistent_bytes(weights, settings) if ranks > 1 else 0)


def persistent_bytes(weights: Sequence[Weight], settings: ZeroSettings) -> int:
    """Bytes of the parameters that stay whole on every rank."""
    kept = persistent(weights, settings)
    return sum(weight.bytes for weight, keep in zip(weights, kept, strict=True) if keep)


@dataclasses.dataclass(frozen=True)
class Gathering:
    """What one micro-batch gathers.

    Args:
        peak: bytes of whole parameters at once, at most.
        buffer: bytes of the flat buffer that several parameters of one collective arrive in.
        first: bytes gathered from all ranks.
        again: of parameters that were gathered before in this micro-batch.
    """

    peak: int
    buffer: int
    first: int
    again: int

    @property
    def bytes(self) -> int:
        return self.first + self.again


class Use(NamedTuple):
    """A module's forward or backward: its parameters, perhaps none, and whether it is computed again in a backward."""

    parameters: Sequence[int]
    again: bool = False


def gathering(uses: Sequence[Use], weights: Sequence[Weight], settings: ZeroSettings) -> Gathering:
    """Follow DeepSpeed's coordinator through a micro-batch in its steady state (from the second one on).

    Args:
        uses: each module's forward or backward, in order, with its parameters as indices into `weights`.
    """
    return _Coordinator(uses, weights, settings).run()


class _Coordinator:
    """fetch, prefetch and release of `PartitionedParameterCoordinator`, on sizes alone."""

    def __init__(self, uses: Sequence[Use], weights: Sequence[Weight], settings: ZeroSettings) -> None:
        self.weights, self.settings = weights, settings
        kept = persistent(weights, settings)
        # Modules without parameters count too: with each of them the prefetcher goes on.
        self.whole_uses = [use.parameters for use in uses]
        self.uses = [[index for index in use if not kept[index]] for use in self.whole_uses]
        self.computed_again = [use.again for use in uses] + [False]
        self.queue = collections.deque((i, step) for step, use in enumerate(self.uses) for i in sorted(use))
        self.fetched_for: dict[int, int] = {}
        self.live: dict[int, int] = {}
        self.seen: set[int] = set()
        self.peak = self.buffer = self.first = self.again = 0

    def run(self) -> Gathering:
        held: set[int] = set()
        for step, use in enumerate(self.uses):
            self._gather([index for index in use if index not in self.live])
            self._forget_queued(use, step)
            self._prefetch()
            if self.computed_again[step] or self.computed_again[step + 1]:
                # DeepSpeed gives what is frozen to the module whose backward asked for the forward to be computed
                # again, and lets all of it go when that backward is done.
                held.update(index for index in use if not self.weights[index].trained)
                gone = self._released([index for index in use if self.weights[index].trained], step + 1)
            else:
                gone = self._released(use, step + 1)
            if not self.computed_again[step + 1]:
                gone, held = gone | held, set()
            for index in gone:
                self.live.pop(index, None)
        return Gathering(self.peak, self.buffer, self.first, self.again)

    def _gather(self, indices: Iterable[int]) -> None:
        indices = list(indices)
        size = sum(self.weights[index].bytes for index in indices)
        again = sum(self.weights[index].bytes for index in indices if index in self.seen)
        self.first, self.again = self.first + size - again, self.again + again
        self.seen.update(indices)
        self.live.update((index, self.weights[index].bytes) for index in indices)
        self.peak = max(self.peak, sum(self.live.values()))
        if len(indices) > 1:
            self.buffer = max(self.buffer, size)

    def _forget_queued(self, use: Sequence[int], step: int) -> None:
        """What is needed now is fetched by now, so the queue of the prefetcher loses it."""
        expected = sum(self.fetched_for.get(index, -1) < step for index in use)
        for _ in range(expected):
            index, last = self.queue.popleft()
            self.fetched_for[index] = last

    def _prefetch(self) -> None:
        live = sum(self.weights[index].numel for index in self.live)
        room = min(self.settings.max_live_parameters - live, self.settings.prefetch_bucket_size)
        ahead: list[int] = []
        numel = 0
        while self.queue and numel < room:
            index, last = self.queue.popleft()
            self.fetched_for[index] = max(self.fetched_for.get(index, -1), last)
            if index not in self.live and index not in ahead:
                ahead.append(index)
                numel += self.weights[index].numel
        self._gather(ahead)

    def _released(self, use: Sequence[int], step: int) -> set[int]:
        """What is not used again soon: neither by what was prefetched nor within the reuse distance."""
        gone = {index for index in use if self.fetched_for.get(index, -1) <= step}
        traversed = 0
        for place in range(step, len(self.uses)):
            if traversed >= self.settings.max_reuse_distance or not gone:
                break
            for index in self.whole_uses[place]:
                gone.discard(index)
                traversed += self.weights[index].numel
        return gone
