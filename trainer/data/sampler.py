"""Which examples make an optimizer step, and how they fall into micro-batches.

The examples of step s in epoch e depend on (seed, e, s) alone: not on ranks, accumulation or layout. A step's
examples are split into `accumulate x ranks` micro-batches of nearly equal cost, each with the weights that make the
accumulated and reduced gradient exactly the mean over the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DistributedSampler

from trainer.schema import StepShare


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatch:
    """Examples of one forward pass on one rank, and what they are of their step."""

    indices: list[int]
    share: StepShare


def balance(indices: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split examples into at most `parts` lists whose padded rows cost nearly the same, and as little as can be.

    A list costs its number of examples times its longest. Sorted by length and cut where it fits, so that rows of one
    list are alike; the cost is the least for which `parts` lists suffice. Missing lists are empty.
    """
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    low, high = lengths[order[0]], lengths[order[0]] * len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_cut(order, lengths, middle)) <= parts else (middle + 1, high)
    cut = _cut(order, lengths, low)
    return cut + [[] for _ in range(parts - len(cut))]


def _cut(order: Sequence[int], lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Lists of at most this cost, filled one after the other from the longest example on."""
    out: list[list[int]] = []
    for index in order:
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= cost:
            out[-1].append(index)
        else:
            out.append([index])
    return out


class StepSampler(DistributedSampler):
    """Yields this rank's micro-batches, step by step; `accumulate` of them make one optimizer step.

    Args:
        lengths: tokens of each example's longest row.
        scored: how many of them are counted by token-weighted losses (completion tokens, chosen tokens).
        batch_size: examples for each optimizer step, over all ranks. The last step of an epoch may have fewer.
        accumulate: micro-batches of a step on one rank.

    A part with no example carries the step's shortest one at weight 0, so that every rank makes equally many forwards.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        scored: Sequence[int],
        batch_size: int,
        accumulate: int = 1,
        ranks: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas=ranks, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths, self.scored = lengths, scored
        self.batch_size, self.accumulate = batch_size, accumulate
        self.first_step = 0

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
        order = self._order(epoch) if order is None else order
        return order[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def __iter__(self) -> Iterator[MicroBatch]:
        order = self._order(self.epoch)
        for step in range(self.first_step, self.steps):
            yield from self._micro_batches(self.step_indices(self.epoch, step, order))

    def _order(self, epoch: int) -> np.ndarray:
        count = len(self.lengths)
        return (
            np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        )

    def _micro_batches(self, indices: list[int]) -> Iterator[MicroBatch]:
        parts = balance(indices, self.lengths, self.accumulate * self.num_replicas)
        forwards = self.accumulate * self.num_replicas
        example_weight = forwards / len(indices)
        token_weight = forwards / sum(self.scored[i] for i in indices)
        filler = min(indices, key=lambda i: (self.lengths[i], i))
        for turn in range(self.accumulate):
            part = parts[turn * self.num_replicas + self.rank]
            last = turn == self.accumulate - 1
            if part:
                yield MicroBatch(part, StepShare(example_weight, token_weight, last))
            else:
                yield MicroBatch([filler], StepShare(0.0, 0.0, last))
