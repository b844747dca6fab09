"""TRL's DPOTrainer on the same model and pairs, with clocks in it. The only file here that imports trl."""

from __future__ import annotations

import os
import time
from typing import Any

# TRL's own bars over pairs, and datasets', are not what is measured.
os.environ["TQDM_DISABLE"] = "1"

import datasets
import torch
from peft import IA3Config
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from launch.bench.arm import Clock, Job, memory
from launch.bench.flops import count_of, counted, synchronize
from launch.bench.workloads import digest


class _Trainer(DPOTrainer):
    """The trainer, with the time that its two preparations take on a clock."""

    clock: Clock

    # TRL 1.16's own steps of preparation; they have no public name.
    def _prepare_dataset(self, *arguments: Any, **settings: Any) -> Any:
        with self.clock.part("setup"):
            return super()._prepare_dataset(*arguments, **settings)

    def _precompute_ref_logps(self, *arguments: Any, **settings: Any) -> Any:
        with self.clock.part("reference"):
            return super()._precompute_ref_logps(*arguments, **settings)


class _Times(TrainerCallback):
    """When epochs ended, and the losses that were logged."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.epochs: list[float] = []
        self.losses: list[float] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        synchronize(self.device)
        self.epochs.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def run(job: Job) -> dict[str, Any]:
    """Train as the job says; what counts is preparing the pairs, precomputing, and `train()`."""
    datasets.disable_progress_bars()
    clock, times = Clock(), _Times(job.device)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), use_safetensors=True
    )
    with clock.part("setup"):
        pairs = datasets.load_dataset(
            "json", data_files=job.pairs, split="train", cache_dir=os.path.join(job.work, "datasets")
        )
    _Trainer.clock = clock
    trainer = _Trainer(
        model=model,
        args=DPOConfig(**arguments(job)),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=IA3Config(task_type="CAUSAL_LM"),
        callbacks=[times],
    )
    loaded = memory(job.device)["now"]
    start = time.perf_counter()
    flops = 0
    if job.count:
        with counted() as found:
            trainer.train()
        flops = found["flops"]
    else:
        trainer.train()
    before = clock.seconds["setup"] + clock.seconds.get("reference", 0.0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    prepared: Any = trainer.train_dataset
    ids = list(zip(*(prepared[name] for name in columns), strict=True))
    return {
        "epoch_seconds": [before + end - start for end in times.epochs],
        "setup_seconds": clock.seconds["setup"],
        "reference_seconds": clock.seconds.get("reference"),
        "loaded_memory_bytes": loaded,
        "losses": times.losses,
        **(count_of(flops, job.model, [[len(part) for part in pair] for pair in ids]) if job.count else {}),
        "digest": digest(ids),
    }


def arguments(job: Job) -> dict[str, Any]:
    """What `DPOConfig` is told: what both sides share, and the arm's own settings."""
    each = job.settings.get("per_device_train_batch_size", 8)
    return {
        "output_dir": os.path.join(job.work, "trl"),
        "num_train_epochs": job.epochs,
        "gradient_accumulation_steps": max(job.batch_size // each, 1),
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "beta": 0.1,
        "use_cpu": job.device == "cpu",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **job.settings,
    }
