"""Which examples make an optimizer step, and how they fall into micro-batches.

The examples of step s in epoch e depend on (seed, e, s) alone: not on ranks, accumulation or layout. A step's
examples are split into `accumulate x ranks` micro-batches of nearly equal cost, each with the weights that make the
accumulated and reduced gradient exactly the mean over the step. `forwards_needed` says how many micro-batches keep each
within a budget of tokens.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DistributedSampler

from trainer.schema import StepShare


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples of one forward pass on one rank, and what they are of their step."""

    indices: list[int]
    share: StepShare


def balance(indices: Sequence[int], lengths: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Split examples into at most `parts` lists whose padded rows cost nearly the same, and as little as can be.

    A list costs its number of examples times its longest. Sorted by length and cut where it fits, so that rows of one
    list are alike; the cost is the least for which `parts` lists suffice. Missing lists are empty.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    low, high = int(lengths[order[0]]), int(lengths[order[0]]) * len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(order, lengths, middle)) <= parts else (middle + 1, high)
    cut = _cut(order, lengths, low)
    return cut + [[] for _ in range(parts - len(cut))]


def _cut(order: Sequence[int], lengths: Sequence[int] | np.ndarray, cost: int) -> list[list[int]]:
    """Lists of at most this cost, filled one after the other from the longest example on."""
    out: list[list[int]] = []
    for index in order:
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= cost:
            out[-1].append(index)
        else:
            out.append([index])
    return out


def pack(indices: Sequence[int], lengths: Sequence[int] | np.ndarray, parts: int) -> list[list[int]]:
    """Split examples into `parts` lists whose lengths add up to nearly the same, the fullest list first.

    The longest example goes to the emptiest list, again and again (Graham 1969, "Bounds on multiprocessing timing
    anomalies": the fullest is at most 4/3 of the best). Every example is in one list; lists may be empty.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    heap: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    out: list[list[int]] = [[] for _ in range(parts)]
    for index in order:
        load, part = heap[0]
        out[part].append(index)
        heapq.heapreplace(heap, (load + int(lengths[index]), part))
    loads = {part: load for load, part in heap}
    return [out[part] for part in sorted(loads, key=lambda part: (-loads[part], part))]


AUTO_BUDGET = {"cpu": 1024, "accelerator": 8192}
"""Tokens of a forward: on 2 cores 1,000 take as long each as 4,000 at half the memory; a GPU wants to be filled."""


def unlimited(limit: float | int | None) -> bool:
    """Whether a limit of the Trainer's is none: 1.0 is all batches, 1 is one."""
    return limit is None or (isinstance(limit, float) and limit == 1.0)


SIMULATED = 20_000_000
"""Examples of a run's epochs that `forwards_needed` looks at, at the most."""


def forwards_needed(sampler: StepSampler, budget: int, epochs: int) -> int:
    """The fewest micro-batches a step on each rank that keep every one within `budget` tokens, in `epochs` epochs.

    An example that is longer than the budget has a micro-batch to itself. Epochs beyond `SIMULATED` examples are not
    looked at.
    """
    count, ranks = len(sampler.lengths), sampler.num_replicas
    lengths = np.asarray(sampler.lengths, np.int64)
    starts = np.arange(0, count, sampler.batch_size)
    needed = 1
    for epoch in range(max(1, min(epochs, SIMULATED // count))):
        order = sampler.order(epoch)
        sums = np.add.reduceat(lengths[order], starts)
        longest = np.maximum.reduceat(lengths[order], starts)
        within = np.minimum(lengths[order], budget)  # a longer one counts for one whole micro-batch
        needed = max(needed, int(np.max(-(-np.add.reduceat(within, starts) // (budget * ranks)))))
        # List scheduling never fills a part beyond the mean and a longest example; only where that does not settle
        # it is the step laid out.
        doubtful = (
            sums / (needed * ranks) + longest > budget if sampler.packed else np.ones(len(starts), bool)
        )
        for step in np.flatnonzero(doubtful):
            indices = sampler.step_indices(epoch, int(step), order)
            while not _fits(sampler, indices, needed * ranks, budget):
                needed += 1
    return needed


def _fits(sampler: StepSampler, indices: list[int], parts: int, budget: int) -> bool:
    """Whether each part is within the budget, or holds one example alone.

    Padded rows are cut so that no part costs more than the longest example, which may be over the budget.
    """
    if parts >= len(indices):
        return True
    if not sampler.packed:
        budget = max(budget, max(int(sampler.lengths[i]) for i in indices))
    split = sampler.split(indices, sampler.lengths, parts)
    return all(len(part) < 2 or sampler.cost(part) <= budget for part in split)


class StepSampler(DistributedSampler):
    """Yields this rank's micro-batches, step by step; `accumulate` of them make one optimizer step.

    Args:
        lengths: what each example costs alone: the tokens of its padded rows, or with `packed` those of its segment.
        scored: how many of them are counted by token-weighted losses (completion tokens, chosen tokens).
        batch_size: examples for each optimizer step, over all ranks. The last step of an epoch may have fewer.
        accumulate: micro-batches of a step on one rank.
        packed: examples stand back to back, so that a micro-batch costs the sum of its lengths, not its padded rows.

    A part with no example carries the step's shortest one at weight 0, so that every rank makes equally many forwards.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        scored: Sequence[int] | np.ndarray,
        batch_size: int,
        accumulate: int = 1,
        ranks: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        packed: bool = False,
    ) -> None:
        super().__init__(lengths, num_replicas=ranks, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.scored = lengths, scored
        self.batch_size, self.accumulate = batch_size, accumulate
        self.packed, self.split = packed, pack if packed else balance
        self.first_step = 0

    def cost(self, part: Sequence[int]) -> int:
        """Tokens of a micro-batch, padding included."""
        own = [int(self.lengths[i]) for i in part]
        return sum(own) if self.packed else len(own) * max(own, default=0)

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch; to its first step unless it is the one already under way."""
        if epoch != self.epoch:
            self.epoch, self.first_step = epoch, 0

    def seek(self, epoch: int, step: int) -> None:
        """Begin the next iteration at this optimizer step of this epoch."""
        self.epoch, self.first_step = (epoch + 1, 0) if step >= self.steps else (epoch, step)

    def step_indices(self, epoch: int, step: int, order: np.ndarray | None = None) -> list[int]:
        """The examples of one optimizer step."""
        order = self.order(epoch) if order is None else order
        return order[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def __iter__(self) -> Iterator[MicroBatch]:
        order = self.order(self.epoch)
        for step in range(self.first_step, self.steps):
            yield from self._micro_batches(self.step_indices(self.epoch, step, order))

    def order(self, epoch: int) -> np.ndarray:
        """All examples in the order of an epoch."""
        count = len(self.lengths)
        return (
            np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        )

    def _micro_batches(self, indices: list[int]) -> Iterator[MicroBatch]:
        parts = self.split(indices, self.lengths, self.accumulate * self.num_replicas)
        forwards = self.accumulate * self.num_replicas
        example_weight = forwards / len(indices)
        token_weight = forwards / sum(int(self.scored[i]) for i in indices)
        filler = min(indices, key=lambda i: (self.lengths[i], i))
        for turn in range(self.accumulate):
            part = parts[turn * self.num_replicas + self.rank]
            last = turn == self.accumulate - 1
            if part:
                yield MicroBatch(part, StepShare(example_weight, token_weight, last))
            else:
                yield MicroBatch([filler], StepShare(0.0, 0.0, last))
