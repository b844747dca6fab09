"""Tokens and examples a second, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from callbacks.logging import log_metrics
from callbacks.monitor import StepEnds
from trainer.schema import UserError

_GB = 1e9


class Throughput(Callback):
    """Logs tokens and examples (pairs or demonstrations) a second every `every_n_steps` optimizer steps.

    Over all ranks. `train/tokens_per_second` counts what went through the policy (`batch.rows.tokens`). Its
    clock stops during validation; data loading, samples and checkpoints are in it. Each validation has its
    own: `val/tokens_per_second`, from its start to its end. Memory is the peak of
    the worst rank so far, in GB (1e9 bytes): `memory/peak_rss_gb`, and `memory/peak_cuda_gb` on a GPU.

    Raises:
        UserError: for `every_n_steps` below 1.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        self.every_n_steps = every_n_steps
        self.tokens_total, self.examples_total, self.seconds_total = 0, 0, 0.0
        self._tokens, self._examples, self._since = 0, 0, 0.0
        self._validation_tokens, self._paused_at = 0, 0.0
        self._unit = "examples"
        self.steps = StepEnds()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.every_n_steps < 1:
            raise UserError(f"Throughput.every_n_steps: {self.every_n_steps} is not possible; give 1 or more")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)
        self._tokens, self._examples, self._since = 0, 0, time.perf_counter()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_tokens, self._paused_at = 0, time.perf_counter()

    @override
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self._validation_tokens += _tokens(batch)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.perf_counter() - self._paused_at
        if not trainer.sanity_checking:
            count = torch.tensor(float(self._validation_tokens), device=trainer.strategy.root_device)
            tokens = float(trainer.strategy.reduce(count, reduce_op="sum"))
            log_metrics(trainer, {"val/tokens_per_second": tokens / seconds})
        self._since += time.perf_counter() - self._paused_at

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count(batch)
        if self.steps.ended(trainer) and trainer.global_step % self.every_n_steps == 0:
            log_metrics(trainer, self._close(trainer))

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = self._close(trainer)
        if trainer.global_step % self.every_n_steps:
            log_metrics(trainer, values)

    def _count(self, batch: Any) -> None:
        if _is_filler(batch):
            return
        self._tokens += _tokens(batch)
        pairs = getattr(batch, "pairs", None)
        self._unit = "examples" if pairs is None else "pairs"
        self._examples += int(pairs) if pairs is not None else len(getattr(batch, "ids", ()))

    def _close(self, trainer: L.Trainer) -> dict[str, float]:
        """The rates since the last call, over all ranks, and the totals moved on."""
        seconds = time.perf_counter() - self._since
        device = trainer.strategy.root_device
        counts = torch.tensor([self._tokens, self._examples], dtype=torch.float32, device=device)
        tokens, examples = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        memory = trainer.strategy.reduce(
            torch.tensor(_peak_gb(device), device=device), reduce_op="max"
        ).tolist()
        self.tokens_total += round(tokens)
        self.examples_total += round(examples)
        self.seconds_total += seconds
        self._tokens, self._examples, self._since = 0, 0, time.perf_counter()
        rates = {
            "train/tokens_per_second": tokens / seconds,
            f"train/{self._unit}_per_second": examples / seconds,
        }
        return rates | dict(zip(("memory/peak_rss_gb", "memory/peak_cuda_gb"), memory, strict=False))

    def summary(self) -> dict[str, Any]:
        """For the run's manifest: totals over all ranks and resumes, without validation time."""
        return {
            "tokens": self.tokens_total,
            self._unit: self.examples_total,
            "train_seconds": round(self.seconds_total, 3),
            "tokens_per_second": round(self.tokens_total / self.seconds_total, 3)
            if self.seconds_total
            else None,
            "peak_rss_gb": round(_peak_gb(torch.device("cpu"))[0], 3),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens_total, "examples": self.examples_total, "seconds": self.seconds_total}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens_total, self.examples_total = int(state_dict["tokens"]), int(state_dict["examples"])
        self.seconds_total = float(state_dict["seconds"])


def _is_filler(batch: Any) -> bool:
    """Whether the batch is there only so that every rank makes equally many forwards."""
    share = getattr(batch, "share", None)
    return share is not None and not share.example_weight and not share.token_weight


def _tokens(batch: Any) -> int:
    rows = getattr(batch, "rows", None)
    return 0 if rows is None or _is_filler(batch) else int(rows.tokens)


def _peak_gb(device: torch.device) -> list[float]:
    """This process's peak resident memory, and on a GPU the peak that torch allocated there, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB]
    if device.type == "cuda":
        peaks.append(torch.cuda.max_memory_allocated(device) / _GB)
    return peaks
