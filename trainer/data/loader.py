"""Loaders: they lay micro-batches as these are asked for, and know how far training has come."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.data.sampler import MicroBatch, StepSampler
from trainer.schema import PreferenceBatch, SupervisedBatch, UserError


class Laid(Dataset):
    """Tokenised examples, indexed by `MicroBatch`: asking for one lays its rows."""

    def __init__(
        self, examples: Sequence[Any], lay: Callable[..., PreferenceBatch | SupervisedBatch]
    ) -> None:
        self.examples, self.lay = examples, lay

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, micro_batch: MicroBatch) -> PreferenceBatch | SupervisedBatch:
        return self.lay([self.examples[i] for i in micro_batch.indices], share=micro_batch.share)


class ResumableLoader(DataLoader):
    """A DataLoader that knows the optimizer steps that were consumed, not those that were fetched ahead.

    `content` stands for the examples and their order; `consumed` returns the optimizer steps consumed in this epoch.
    The state is read at step boundaries only.
    """

    def __init__(
        self,
        dataset: Laid,
        sampler: StepSampler,
        content: str,
        consumed: Callable[[], int],
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **loading(sampler), **kwargs)
        self.steps, self.content, self.consumed = sampler, content, consumed

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.steps.epoch, "step": self.consumed(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, now in self._identity().items():
            if state[name] != now:
                raise UserError(
                    f"cannot resume: {name} was {state[name]} and is {now}; give the same data and settings,"
                    " or begin a new run with policy.start"
                )
        self.steps.seek(state["epoch"], state["step"])

    def _identity(self) -> dict[str, Any]:
        """What the position means something for."""
        return {
            "data.batch_size": self.steps.batch_size,
            "data.seed": self.steps.seed,
            "the number of training examples": len(self.steps.lengths),
            "the SHA-256 of the training examples": self.content,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


def loading(sampler: StepSampler) -> dict[str, Any]:
    # A generator of its own: a DataLoader that starts an epoch would draw from torch's, and a resumed run would differ.
    return {
        "sampler": sampler,
        "batch_size": None,
        "collate_fn": _as_it_is,
        "generator": torch.Generator(),
        "worker_init_fn": _leave_signals_to_training,
    }


def _leave_signals_to_training(worker: int) -> None:
    # SLURM and terminals signal every process. Training saves at its step's end, which may need more batches; then it
    # ends its workers, and workers end by themselves when it is gone.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
