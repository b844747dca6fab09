"""tandem as its README shows it: `PreferenceData`, `PreferenceModule` and a Lightning Trainer, with clocks in them."""

from __future__ import annotations

import contextlib
import inspect
import time
from typing import Any, cast

import lightning as L
from typing_extensions import override

from launch.bench.arm import Clock, Job, memory
from launch.bench.flops import count_of, counted, synchronize
from launch.bench.workloads import digest
from launch.quiet import quiet
from trainer.data.datamodule import PreferenceData
from trainer.data.preferences import PreferenceFile
from trainer.module import PreferenceModule
from trainer.optimization import OptimizerConfig
from trainer.policy.load import PolicyConfig
from trainer.schema import UserError


class _Module(PreferenceModule):
    """The module, with the time that loading takes on a clock."""

    clock: Clock
    device_kind: str
    loaded_bytes = 0

    @override
    def configure_model(self) -> None:
        with self.clock.part("model"):
            super().configure_model()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self.loaded_bytes = memory(self.device_kind)["now"]


class _Data(PreferenceData):
    """The data, with the time that tokenising takes on a clock."""

    clock: Clock

    @override
    def setup(self, stage: str) -> None:
        with self.clock.part("setup"):
            super().setup(stage)


class _Times(L.Callback):
    """When epochs ended, how long optimizer steps took and of how many tokens; counts the last epoch if asked."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.epochs: list[float] = []
        self.steps: list[list[float]] = []
        self.flops = 0
        self.losses: list[float] = []
        self._tokens = 0
        self._lengths: dict[str, int] = {}
        self._counting = contextlib.ExitStack()

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        examples = trainer.datamodule.examples["train"]  # type: ignore[attr-defined]
        self._lengths = {e.id: len(e.prompt) + len(e.chosen) + len(e.rejected) for e in examples}
        synchronize(self.job.device)
        self._began, self._tokens = time.perf_counter(), 0
        if self.job.count and trainer.current_epoch == self.job.epochs - 1:
            self._found = self._counting.enter_context(counted())

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += sum(self._lengths[each] for each in batch.ids)
        if not batch.share.last:
            return
        if self.job.batch_sizes:
            synchronize(self.job.device)
        now = time.perf_counter()
        self.steps.append([trainer.current_epoch, self._tokens, now - self._began])
        self.losses.append(cast(PreferenceModule, pl_module).step_metrics["loss"])
        self._began, self._tokens = now, 0

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        synchronize(self.job.device)
        self.epochs.append(time.perf_counter())
        if self.job.count and trainer.current_epoch == self.job.epochs - 1:
            self._counting.close()
            self.flops = self._found["flops"]


def run(job: Job) -> dict[str, Any]:
    """Train as the job says; times in seconds from the start of the work, loading and imports left out."""
    quiet()
    if not job.batch_sizes:
        return _run(job, job.batch_size)
    steps = []
    for batch_size in job.batch_sizes:
        found = _run(job, batch_size)["steps"]
        steps += [[tokens, seconds] for epoch, tokens, seconds in found if epoch > 0]
    return {"steps": steps}


def _run(job: Job, batch_size: int) -> dict[str, Any]:
    clock, times = Clock(), _Times(job)
    optimizer = OptimizerConfig(lr=job.lr)
    module = _Module(PolicyConfig(job.model, dtype=job.dtype, offline=True), optimizer=optimizer)  # type: ignore[arg-type]
    module.clock, module.device_kind = clock, job.device
    start = time.perf_counter()
    source = PreferenceFile(job.pairs, validation_fraction=0.0)
    data = _Data(source, batch_size=batch_size, **known_settings(job.settings))
    data.clock = clock
    trainer = L.Trainer(
        max_epochs=job.epochs,
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job.work,
        callbacks=[times],
    )
    trainer.fit(module, datamodule=data)
    examples = data.examples["train"]
    lengths = [(len(e.prompt), len(e.chosen), len(e.rejected)) for e in examples]
    began = start + clock.seconds["model"]
    return {
        "epoch_seconds": [end - began for end in times.epochs],
        "setup_seconds": clock.seconds["setup"],
        "reference_seconds": None,
        "model_seconds": clock.seconds["model"],
        "loaded_memory_bytes": module.loaded_bytes,
        "steps": times.steps,
        "losses": times.losses,
        **(count_of(times.flops, job.model, lengths) if job.count else {}),
        "digest": digest((e.prompt, e.chosen, e.rejected) for e in examples),
    }


def known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for `PreferenceData`; one that it does not have is a `UserError`."""
    known = inspect.signature(PreferenceData.__init__).parameters
    for name in settings:
        if name not in known:
            raise UserError(f"data.{name}: PreferenceData has no such setting; it has {', '.join(known)}")
    return settings
