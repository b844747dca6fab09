"""LightningDataModules: records of a source, tokenised once, handed out in weighted micro-batches."""

from __future__ import annotations

import functools
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

    `position` returns (epoch, optimizer steps consumed in it); the state is read at step boundaries only.
    """

    def __init__(
        self, dataset: Laid, sampler: StepSampler, position: Callable[[], tuple[int, int]], **kwargs: Any
    ) -> None:
        super().__init__(dataset, **_loading(sampler), **kwargs)
        self.steps, self.position = sampler, position

    def state_dict(self) -> dict[str, int]:
        epoch, step = self.position()
        return {"epoch": epoch, "step": step, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, now in self._identity().items():
            if state[name] != now:
                raise UserError(
                    f"data: cannot resume: {name} was {state[name]} and is {now}; resume with the same data"
                )
        self.steps.seek(state["epoch"], state["step"])

    def _identity(self) -> dict[str, int]:
        return {
            "batch_size": self.steps.batch_size,
            "examples": len(self.steps.tokens),
            "seed": self.steps.seed,
        }


def _as_it_is(batch: Any) -> Any:
    return batch


def _loading(sampler: StepSampler) -> dict[str, Any]:
    # A generator of its own: a DataLoader that starts an epoch would draw from torch's, and a resumed run would differ.
    return {"sampler": sampler, "batch_size": None, "collate_fn": _as_it_is, "generator": torch.Generator()}


class _AlignmentData(L.LightningDataModule):
    """What the two datamodules share.

    Args:
        source: where the records come from.
        tokenizer: folder or hub id; null takes the policy's own.
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
        tokenizer: str | None = None,
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
        self.source, self.tokenizer_name = source, tokenizer
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
        """Optimizer steps in an epoch; known after `setup`."""
        return -(-len(self.examples["train"]) // self.batch_size)

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
            if self.tokenizer_name is not None:
                from transformers import AutoTokenizer

                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name)
            else:
                assert self.trainer is not None, "attach the datamodule to a Trainer, or name a tokenizer"
                self.tokenizer = cast(Tokenizer, self.trainer.lightning_module.tokenizer)
        assert self.tokenizer is not None
        return self.tokenizer

    def _laid(self, split: Split) -> Laid:
        pad_token_id = self._ready_tokenizer().pad_token_id
        return Laid(self.examples[split], functools.partial(self.lay, pad_token_id=pad_token_id))

    def _sampler(self, split: Split, batch_size: int, accumulate: int, shuffle: bool) -> StepSampler:
        examples = self.examples[split]
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return StepSampler(
            tokens=[example.tokens for example in examples],
            scored=[self.scored(example) for example in examples],
            batch_size=batch_size,
            accumulate=accumulate,
            ranks=ranks,
            rank=rank,
            shuffle=shuffle,
            seed=self.seed,
        )

    def _position(self) -> tuple[int, int]:
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        # `ready` counts the micro-batches that training has taken, whatever was fetched ahead of them.
        return loop.epoch_progress.current.ready - 1, (
            loop.epoch_loop.batch_progress.current.ready // self.trainer.accumulate_grad_batches
        )

    @override
    def train_dataloader(self) -> TRAIN_DATALOADERS:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler = self._sampler("train", self.batch_size, accumulate, shuffle=True)
        return ResumableLoader(self._laid("train"), sampler, self._position, num_workers=self.workers)

    @override
    def val_dataloader(self) -> Any:
        if not self.examples.get("validation"):
            return []
        sampler = self._sampler("validation", self.validation_batch_size, 1, shuffle=False)
        return DataLoader(self._laid("validation"), num_workers=self.workers, **_loading(sampler))

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of its data: counts (kept, dropped and why, truncated), hashes, settings."""
        return {
            "source": repr(self.source),
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
