"""LightningDataModules: records of a source, tokenised once, handed out in weighted micro-batches."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from trainer.data.layout import concatenated, supervised
from trainer.data.sampler import MicroBatch, StepSampler
from trainer.data.sources import Source
from trainer.data.tokenize import (
    Limits,
    TokenCounts,
    Tokenizer,
    tokenize_demonstrations,
    tokenize_preferences,
)
from trainer.provenance import sha256_text
from trainer.schema import (
    Demonstration,
    Preference,
    PreferenceBatch,
    Split,
    SupervisedBatch,
    TokenizedDemonstration,
    TokenizedPreference,
    UserError,
)


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
        super().__init__(dataset, **_loading(sampler), **kwargs)
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
            "trainer.accumulate_grad_batches": self.steps.accumulate,
            "the number of training examples": len(self.steps.lengths),
            "the SHA-256 of the training examples": self.content,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


def _loading(sampler: StepSampler) -> dict[str, Any]:
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


class _AlignmentData(L.LightningDataModule):
    """What the two datamodules share.

    Args:
        source: where the records come from.
        batch_size: examples for each optimizer step, over all ranks and micro-batches.
        validation_batch_size: examples for each validation forward, over all ranks; null takes batch_size.
        max_length: longest prompt + completion in tokens; null for no limit.
        overlong: what to do with longer ones: `refuse`, `truncate` (the prompt's oldest tokens, then the completion's
            end) or `drop`; both are counted in the manifest.
        seed: of the order of the examples.
        workers: processes that lay rows ahead; 0 lays them in the training process.
    """

    record: ClassVar[type]
    # Plain functions, held as static methods by the subclasses.
    tokenize: Callable[..., list[Any]]
    lay: Callable[..., PreferenceBatch | SupervisedBatch]
    scored: Callable[[Any], int]

    def __init__(
        self,
        source: Source,
        batch_size: int = 16,
        validation_batch_size: int | None = None,
        max_length: int | None = 1024,
        overlong: Literal["refuse", "truncate", "drop"] = "refuse",
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("validation_batch_size", validation_batch_size or 1),
        ):
            if value < 1:
                raise UserError(f"data.{name}: {value} is below 1")
        self.source = source
        self.limits = Limits(max_length, overlong)
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size or batch_size
        self.seed, self.workers = seed, workers
        self.tokenizer: Tokenizer | None = None
        self.examples: dict[Split, list[Any]] = {}
        self.counts: dict[Split, dict[str, int]] = {}
        self.hashes: dict[str, str] = {}

    @property
    def prompt_template(self) -> str | None:
        """How the source wraps a text into a prompt; checkpoints carry it, so that `generate` asks alike."""
        return self.source.prompt_template

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, as far as the Trainer's limit allows; known after `setup`."""
        steps = -(-len(self.examples["train"]) // self.batch_size)
        return steps if self.trainer is None else min(steps, self._step_limit(steps))

    def _step_limit(self, steps: int) -> int:
        """What `trainer.limit_train_batches`, which counts micro-batches, leaves of an epoch's steps."""
        assert self.trainer is not None
        limit, accumulate = self.trainer.limit_train_batches, self.trainer.accumulate_grad_batches
        if getattr(self.trainer, "fast_dev_run", False) or limit in (None, 1.0):
            return steps
        batches = int(steps * accumulate * limit) if isinstance(limit, float) else int(limit)
        if batches % accumulate:
            raise UserError(
                f"trainer.limit_train_batches: {limit} cuts an optimizer step of {accumulate} micro-batches;"
                f" give a multiple of trainer.accumulate_grad_batches"
            )
        return batches // accumulate

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions; known after `setup`."""
        return max(
            (example.longest for examples in self.examples.values() for example in examples), default=0
        )

    @override
    def setup(self, stage: str) -> None:
        splits: tuple[Split, ...] = ("train", "validation") if stage == "fit" else ("validation",)
        for split in splits:
            if split not in self.examples:
                self._load(split)
        if stage == "fit" and not self.examples["train"]:
            raise UserError(f"data.source: no training examples are left of {self.counts['train']}")

    def _load(self, split: Split) -> None:
        loaded = self.source.load(split)
        wrong = next((record for record in loaded.records if not isinstance(record, self.record)), None)
        if wrong is not None:
            raise UserError(
                f"data.source: gives {type(wrong).__name__} records where {self.record.__name__} is needed"
                f" by {type(self).__name__}"
            )
        counts = TokenCounts()
        self.examples[split] = self.tokenize(loaded.records, self._ready_tokenizer(), self.limits, counts)
        self.counts[split] = {**loaded.counts, **counts.as_dict()}
        self.hashes.update(loaded.hashes)

    def _ready_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            assert self.trainer is not None, "attach the datamodule to a Trainer, or set its tokenizer"
            self.tokenizer = cast(Tokenizer, self.trainer.lightning_module.tokenizer)
        return self.tokenizer

    def _laid(self, split: Split) -> Laid:
        pad_token_id = self._ready_tokenizer().pad_token_id
        return Laid(self.examples[split], functools.partial(self.lay, pad_token_id=pad_token_id))

    def _sampler(self, split: Split, batch_size: int, accumulate: int, shuffle: bool) -> StepSampler:
        examples = self.examples[split]
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return StepSampler(
            lengths=[example.longest for example in examples],
            scored=[self.scored(example) for example in examples],
            batch_size=batch_size,
            accumulate=accumulate,
            ranks=ranks,
            rank=rank,
            shuffle=shuffle,
            seed=self.seed,
        )

    def _consumed(self) -> int:
        """Optimizer steps consumed in this epoch: what training has taken, whatever was fetched ahead of it."""
        assert self.trainer is not None
        taken = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return taken // self.trainer.accumulate_grad_batches

    @override
    def train_dataloader(self) -> TRAIN_DATALOADERS:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler = self._sampler("train", self.batch_size, accumulate, shuffle=True)
        content = sha256_text(*(example.id for example in self.examples["train"]))
        return ResumableLoader(
            self._laid("train"), sampler, content, self._consumed, num_workers=self.workers
        )

    @override
    def val_dataloader(self) -> Any:
        if not self.examples.get("validation"):
            return []
        sampler = self._sampler("validation", self.validation_batch_size, 1, shuffle=False)
        return DataLoader(self._laid("validation"), num_workers=self.workers, **_loading(sampler))

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of its data: counts (kept, dropped and why, truncated), hashes, settings."""
        return {
            "source": self.source.describe(),
            "prompt_template": self.prompt_template,
            "batch_size": self.batch_size,
            "max_length": self.limits.max_length,
            "overlong": self.limits.overlong,
            "seed": self.seed,
            "counts": self.counts,
            "hashes": self.hashes,
        }


def _chosen_tokens(example: TokenizedPreference) -> int:
    return len(example.chosen)


def _completion_tokens(example: TokenizedDemonstration) -> int:
    return len(example.completion)


class PreferenceData(_AlignmentData):
    """Pairs of a preference source, for `PreferenceModule`."""

    record = Preference
    tokenize = staticmethod(tokenize_preferences)
    lay = staticmethod(concatenated)
    scored = staticmethod(_chosen_tokens)


class SupervisedData(_AlignmentData):
    """Demonstrations of a source, for `SupervisedModule`."""

    record = Demonstration
    tokenize = staticmethod(tokenize_demonstrations)
    lay = staticmethod(supervised)
    scored = staticmethod(_completion_tokens)
