"""LightningDataModules: records of a source, tokenised once, handed out in weighted micro-batches."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch.utils.data import DataLoader
from typing_extensions import override

from trainer.data.cache import token_key, token_store
from trainer.data.layout import concatenated, packed, prefix_shared, supervised
from trainer.data.loader import Laid, ResumableLoader, loading
from trainer.data.sampler import AUTO_BUDGET, StepSampler, forwards_needed, unlimited
from trainer.data.sources import Source, Streamed, streamed
from trainer.data.store import Kind, content, lengths, longest, scored, write_store
from trainer.data.tokenize import (
    Limits,
    TokenCounts,
    Tokenizer,
    stream_demonstrations,
    stream_preferences,
    vocabulary,
)
from trainer.schema import (
    Demonstration,
    Preference,
    PreferenceBatch,
    Split,
    SupervisedBatch,
    UserError,
)

Layout = Literal["prefix_shared", "concatenated"]
log = logging.getLogger(__name__)


class _AlignmentData(L.LightningDataModule):
    """What the two datamodules share.

    Args:
        source: where the records come from.
        batch_size: examples for each optimizer step, over all ranks and micro-batches.
        validation_batch_size: examples for each validation forward, over all ranks; null takes batch_size.
        max_length: longest prompt + completion in tokens; null for no limit.
        overlong: what to do with longer ones: `refuse`, `truncate` (the prompt's oldest tokens, then the completion's
            end) or `drop`; both are counted in the manifest.
        layout: `prefix_shared`: prompt | chosen | rejected in one row, pairs back to back, nothing padded.
            `concatenated`: one padded row for each completion. Demonstrations are laid accordingly.
        token_budget: tokens of one forward pass on one rank; a step is spread over as many as that takes, at least
            `trainer.accumulate_grad_batches`. Which examples make a step, and its result, do not depend on it. An
            example that is longer goes alone; null sets no limit, `auto` takes 1024 on a CPU and 8192 elsewhere.
        seed: of the order of the examples.
        workers: processes that lay rows ahead; 0 lays them in the training process.
        cache: folder where tokens are kept for later runs on the same data; null for `tokens` in `TANDEM_CACHE`
            (~/.cache/tandem).
    """

    record: ClassVar[type]
    # Plain functions, held as static methods by the subclasses.
    tokenize: Callable[..., Iterator[Any]]
    lays: ClassVar[dict[str, Callable[..., PreferenceBatch | SupervisedBatch]]]

    def __init__(
        self,
        source: Source,
        batch_size: int = 16,
        validation_batch_size: int | None = None,
        max_length: int | None = 1024,
        overlong: Literal["refuse", "truncate", "drop"] = "refuse",
        layout: Layout = "prefix_shared",
        token_budget: int | Literal["auto"] | None = "auto",
        seed: int = 0,
        workers: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        if layout not in self.lays:
            raise UserError(f"data.layout: '{layout}' is not known; give {' or '.join(self.lays)}")
        for name, value in (
            ("batch_size", batch_size),
            ("validation_batch_size", validation_batch_size or 1),
            ("token_budget", token_budget if isinstance(token_budget, int) else 1),
        ):
            if value < 1:
                raise UserError(f"data.{name}: {value} is below 1")
        self.source = source
        self.limits = Limits(max_length, overlong)
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size or batch_size
        self.layout: Layout = layout
        self.token_budget, self.seed, self.workers = token_budget, seed, workers
        self.cache = cache
        self._settled: dict[str, Any] = {}
        self._forwards: int | None = None
        self._validation_forwards = 1
        self.tokenizer: Tokenizer | None = None
        self.examples: dict[Split, Sequence[Any]] = {}
        self.counts: dict[Split, dict[str, int]] = {}
        self.hashes: dict[str, str] = {}

    @property
    def prompt_template(self) -> str | None:
        """How the source wraps a text into a prompt; checkpoints carry it, so that `generate` asks alike."""
        return self.source.prompt_template

    @property
    def budget(self) -> int | None:
        """`token_budget` in tokens, for the device that the Trainer uses, or that there is."""
        if self.token_budget != "auto":
            return self.token_budget
        cpu = (
            self.trainer.strategy.root_device.type == "cpu" if self.trainer else not torch.cuda.is_available()
        )
        return AUTO_BUDGET["cpu" if cpu else "accelerator"]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, as far as the Trainer's limit allows; known after `setup`."""
        steps = -(-len(self.examples["train"]) // self.batch_size)
        return steps if self.trainer is None else self._limited(steps, self.trainer.accumulate_grad_batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions; known after `setup`."""
        return max((longest(examples) for examples in self.examples.values()), default=0)

    @override
    def setup(self, stage: str) -> None:
        splits: tuple[Split, ...] = ("train", "validation") if stage == "fit" else ("validation",)
        self._check_tokenizer()
        for split in splits:
            if split not in self.examples:
                self._load(split)
        if stage == "fit" and not self.examples["train"]:
            raise UserError(f"data.source: no training examples are left of {self.counts['train']}")
        if self.trainer is not None:
            self._once("validation", self._settle_validation)
            if stage == "fit":
                self._once("training", self._settle_forwards)

    def _once(self, what: str, settle: Callable[[], None]) -> None:
        """Change a Trainer's counts once, however often it calls."""
        if self._settled.get(what) is not self.trainer:
            settle()
            self._settled[what] = self.trainer

    def _load(self, split: Split) -> None:
        """Find the split's tokens, or read and tokenise its records, one after the other, into a new store."""
        tokenizer, kind = self._ready_tokenizer(), cast(Kind, self.record.__name__.lower())

        def build(folder: Path) -> None:
            counts = TokenCounts()
            loaded = streamed(self.source, split)
            records = Streamed(self._right(loaded.records), length_hint(loaded.records))
            examples = self.tokenize(records, tokenizer, self.limits, counts)
            about = lambda: {"counts": {**loaded.counts, **counts.as_dict()}, "hashes": loaded.hashes}  # noqa: E731
            write_store(folder, examples, kind, vocabulary(tokenizer), about)
            if key is not None and key["read"] != (made_of() or {}).get("read"):
                raise UserError("data.source: its files changed while they were read; start again")

        made_of = functools.partial(
            token_key, self.source, split, kind, tokenizer, dataclasses.asdict(self.limits)
        )
        key = made_of()
        store = token_store(self.cache, key, build)
        self.examples[split] = store
        self.counts[split] = store.manifest["about"]["counts"]
        self.hashes.update(store.manifest["about"]["hashes"])

    def _right(self, records: Iterable[Any]) -> Iterator[Any]:
        """The records, each of them of the kind that is needed."""
        for record in records:
            if not isinstance(record, self.record):
                raise UserError(
                    f"data.source: gives {type(record).__name__} records where {self.record.__name__} is needed"
                    f" by {type(self).__name__}"
                )
            yield record

    def _ready_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            assert self.trainer is not None, "attach the datamodule to a Trainer, or set its tokenizer"
            self.tokenizer = cast(Tokenizer, self.trainer.lightning_module.tokenizer)
        return self.tokenizer

    def _check_tokenizer(self) -> None:
        """Have the source refuse a tokenizer that its records were not made for."""
        if (check := getattr(self.source, "check_tokenizer", None)) is not None:
            check(self._ready_tokenizer())

    def laid(self, split: Split) -> Laid:
        """A split's examples, laid into rows as they are asked for."""
        pad_token_id = self._ready_tokenizer().pad_token_id
        return Laid(
            self.examples[split], functools.partial(self.lays[self.layout], pad_token_id=pad_token_id)
        )

    def sampler(self, split: Split, batch_size: int, accumulate: int, shuffle: bool) -> StepSampler:
        """How a split's examples fall into this rank's micro-batches, `accumulate` for each `batch_size` of them."""
        parts = lengths(self.examples[split])
        is_packed = self.layout == "prefix_shared"
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return StepSampler(
            lengths=parts.sum(1) if is_packed else (parts.shape[1] - 1) * (parts[:, 0] + parts[:, 1:].max(1)),
            scored=scored(self.examples[split]),
            batch_size=batch_size,
            accumulate=accumulate,
            ranks=ranks,
            rank=rank,
            shuffle=shuffle,
            seed=self.seed,
            packed=is_packed,
        )

    def _settle_forwards(self) -> None:
        """Set the Trainer's accumulation to the forwards that the token budget asks for.

        What the Trainer counts in micro-batches (`val_check_interval`, `limit_train_batches`) keeps its meaning in
        steps, and becomes a number of whole ones: nothing is validated, saved or ended in the middle of a step.
        """
        trainer: Any = self.trainer
        asked, needed = trainer.accumulate_grad_batches, trainer.accumulate_grad_batches
        steps = -(-len(self.examples["train"]) // self.batch_size)
        limited = self._limited(steps, asked)
        if (budget := self.budget) is not None:
            sampler = self.sampler("train", self.batch_size, 1, shuffle=True)
            needed = max(asked, forwards_needed(sampler, budget, self._epochs(limited)))
            if (most := int(np.max(sampler.lengths))) > budget and self.token_budget != "auto":
                log.warning(
                    "data.token_budget: %d, but the longest example has %d tokens; those that are longer go alone",
                    budget, most,
                )  # fmt: skip
        every = trainer.val_check_interval
        if isinstance(every, float) and every != 1.0:
            trainer.val_check_interval = max(1, int(limited * every)) * needed
        elif isinstance(every, int) and not isinstance(every, bool):
            trainer.val_check_interval = -(-every // asked) * needed
        if not unlimited(trainer.limit_train_batches):
            trainer.limit_train_batches = limited * needed
        trainer.accumulate_grad_batches = self._forwards = needed

    def _limited(self, steps: int, asked: int) -> int:
        """Optimizer steps of an epoch under `limit_train_batches`, which counts `asked` micro-batches a step."""
        trainer: Any = self.trainer
        limit = trainer.limit_train_batches
        if unlimited(limit):
            return steps
        if getattr(trainer, "fast_dev_run", False) and self._settled.get("training") is not trainer:
            return min(int(limit), steps)
        if isinstance(limit, float):
            return int(steps * limit)
        if limit % asked:
            raise UserError(
                f"trainer.limit_train_batches: {limit} cuts an optimizer step of {asked} micro-batches;"
                f" give a multiple of trainer.accumulate_grad_batches"
            )
        return min(limit // asked, steps)

    def _epochs(self, steps: int) -> int:
        """Epochs that the Trainer may run, as far as it says."""
        most, last = self.trainer.max_epochs, self.trainer.max_steps  # type: ignore[union-attr]
        known = [most, -1 if last < 0 else -(-last // max(steps, 1))]
        return min((epochs for epochs in known if epochs is not None and epochs >= 0), default=1000)

    def _settle_validation(self) -> None:
        """As many forwards for `validation_batch_size` examples as the token budget asks for."""
        if (budget := self.budget) is None or not self.examples.get("validation"):
            return
        sampler = self.sampler("validation", self.validation_batch_size, 1, shuffle=False)
        self._validation_forwards = forwards_needed(sampler, budget, 1)
        limit = getattr(self.trainer, "limit_val_batches", None)
        if isinstance(limit, int):
            self.trainer.limit_val_batches = limit * self._validation_forwards  # type: ignore[union-attr]

    def _consumed(self) -> int:
        """Optimizer steps consumed in this epoch: what training has taken, whatever was fetched ahead of it."""
        assert self.trainer is not None
        taken = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return taken // self.trainer.accumulate_grad_batches

    @override
    def train_dataloader(self) -> TRAIN_DATALOADERS:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        sampler = self.sampler("train", self.batch_size, accumulate, shuffle=True)
        names = content(self.examples["train"])
        return ResumableLoader(self.laid("train"), sampler, names, self._consumed, num_workers=self.workers)

    @override
    def val_dataloader(self) -> Any:
        if not self.examples.get("validation"):
            return []
        forwards = self._validation_forwards
        sampler = self.sampler("validation", self.validation_batch_size, forwards, shuffle=False)
        return DataLoader(self.laid("validation"), num_workers=self.workers, **loading(sampler))

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of its data: counts (kept, dropped and why, truncated), hashes, settings."""
        return {
            "source": self.source.describe(),
            "prompt_template": self.prompt_template,
            "batch_size": self.batch_size,
            "max_length": self.limits.max_length,
            "overlong": self.limits.overlong,
            "layout": self.layout,
            "token_budget": self.budget,
            "forwards_each_step": self._forwards,
            "seed": self.seed,
            "counts": self.counts,
            "tokens": {split: int(lengths(examples).sum()) for split, examples in self.examples.items()},
            "hashes": self.hashes,
        }


class PreferenceData(_AlignmentData):
    """Pairs of a preference source, for `PreferenceModule`."""

    record = Preference
    tokenize = staticmethod(stream_preferences)
    lays: ClassVar = {"prefix_shared": prefix_shared, "concatenated": concatenated}


class SupervisedData(_AlignmentData):
    """Demonstrations of a source, for `SupervisedModule`."""

    record = Demonstration
    tokenize = staticmethod(stream_demonstrations)
    lays: ClassVar = {"prefix_shared": packed, "concatenated": supervised}
