"""Short fits, one after the other, on ranks that torchrun starts: a start costs more than many small fits."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.alarms import Alarms
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.sample_generation import SampleGeneration
from launch.ending import leave_together
from trainer.generation import Sampling
from trainer.policy.logprobs import pair_logps
from trainer.policy.sharded import read_whole, write_whole
from trainer.schema import UserError

ROOT = Path(__file__).resolve().parents[2]


def run_on_ranks(
    folder: Path, ranks: int, runs: dict[str, dict[str, Any]], seconds: int = 900
) -> dict[str, Any]:
    """Make each of the named runs on `ranks` gloo ranks; returns what rank zero saw of each (`seen`)."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"runs": runs, "folder": str(folder), "ranks": ranks}))
    on_ranks("tests.distributed.ranks", plan, ranks, seconds)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in runs}


def on_ranks(module: str, plan: Path, ranks: int, seconds: int = 900) -> None:
    """Start `python -m module plan` on so many gloo ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [*torchrun, "-m", module, str(plan)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-6000:]


def main(plan: dict[str, Any]) -> None:
    for name, settings in plan["runs"].items():
        folder = Path(plan["folder"])
        seen = made(settings, plan["ranks"], folder)
        if seen is not None:
            (folder / f"{name}.json").write_text(json.dumps(seen))
    leave_together()


def made(settings: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any] | None:
    """Make one run; on rank zero, what was seen of it."""
    from tests.module.records import fit
    from trainer.checkpoint import PortableCheckpointIO
    from trainer.strategy import Zero3

    strategy = settings.get("strategy", "auto")
    if strategy == "zero3":
        # At the default every tensor of a tiny model would stay whole on each rank.
        strategy = Zero3(**{"param_persistence_threshold": 0, "timeout": 60, **settings.get("zero3", {})})
    L.seed_everything(7, verbose=False)
    module, data = parts(settings)
    if "nan" in settings:
        poison(module, **settings["nan"])
    shares, errors = Shares(), Errors()
    watchers = [SaveAt(folder, settings["save"])] if "save" in settings else []
    counted = ReferenceForwards()
    if "counted" in settings:
        watchers.append(counted)
    if "scale" in settings:
        watchers.append(MovedScale(settings["scale"]))
    if "prompts" in settings:
        samples = SampleGeneration(
            settings["prompts"], sampling=Sampling(max_new_tokens=8), every_n_steps=100
        )
        watchers.append(samples)
    if "patience" in settings:
        watchers += [Alarms(max_not_finite=settings["patience"]), ImprovedLossCheckpoint(save_steps=100)]
        return ended(
            lambda: fit(
                module,
                data,
                folder / "ended",
                max_steps=9,
                devices=ranks,
                strategy=strategy,
                callbacks=watchers,
                plugins=[PortableCheckpointIO()],
                enable_checkpointing=True,
            )
        )
    history = fit(
        module,
        data,
        folder,
        resume=settings.get("resume"),
        max_steps=settings.get("steps", -1),
        max_epochs=settings.get("epochs", 2),
        devices=ranks,
        strategy=strategy,
        accumulate_grad_batches=settings.get("accumulate", 1),
        gradient_clip_val=settings.get("clip"),
        callbacks=[shares, *watchers],
        plugins=[PortableCheckpointIO()],
    )
    said = errors.of_all_ranks()
    if not module.trainer.is_global_zero:
        return None
    validation = {k: float(v) for k, v in module.trainer.callback_metrics.items() if k.startswith("val/")}
    return {
        "losses": history.losses,
        "steps": history.steps,
        "gradients": [{n: g.flatten().tolist() for n, g in step.items()} for step in history.gradients],
        "validation": validation,
        "trained": history.trained,
        "shares": shares.seen,
        "skipped": module.skipped_steps,
        "forwards": counted.seen,
        "log_probs": module.reference.describe()["log_probs"] if settings["task"] != "sft" else None,
        "errors": said,
        "seen": {type(watcher).__name__: getattr(watcher, "seen", None) for watcher in watchers},
        "samples": samples_of(folder) if "prompts" in settings else [],
    }


def ended(run: Callable[[], Any]) -> dict[str, Any] | None:
    """On rank zero, what each rank was refused with."""
    try:
        run()
        said = "finished"
    except UserError as error:
        said = str(error)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, said)
    return {"ended": gathered} if torch.distributed.get_rank() == 0 else None


def samples_of(folder: Path) -> list[str]:
    """The policy's and the reference's answers, and the file gone."""
    path = folder / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return [line[who] for line in lines for who in ("policy", "reference")]


def poison(module: Any, step: int | list[int], rank: int, where: str) -> None:
    """Make one rank's loss, or its gradient alone, not finite in one optimizer step, or in several."""
    losses = module.losses

    def poisoned(batch: Any) -> Any:
        loss, sums = losses(batch)
        trainer = module.trainer
        now = trainer.global_step in (step if isinstance(step, list) else [step])
        if trainer.training and now and trainer.global_rank == rank:
            if where == "loss":
                return loss * math.nan, {
                    name: (total * math.nan, count) for name, (total, count) in sums.items()
                }
            # The root's value at 0 is 0, its derivative infinite, and that of what stands in it 0.
            loss = loss + (0 * loss).sqrt()
        return loss, sums

    module.losses = poisoned


class Errors(logging.Handler):
    """What was logged as an error on this rank, and then on all."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []
        logging.getLogger("trainer.module").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def of_all_ranks(self) -> list[str]:
        logging.getLogger("trainer.module").removeHandler(self)
        if not torch.distributed.is_initialized():
            return self.lines
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self.lines)
        return [line for lines in gathered for line in lines]


class ReferenceForwards(L.Callback):
    """Counts how often the reference's model is asked on this rank."""

    def __init__(self) -> None:
        self.seen = 0

    def on_fit_start(self, trainer, pl_module) -> None:
        applied = pl_module.reference.applied

        def counted() -> Any:
            self.seen += 1
            return applied()

        pl_module.reference.applied = counted


class MovedScale(L.Callback):
    """Moves one trained scale and looks at the log-probs before and after, as training starts."""

    def __init__(self, by: float) -> None:
        self.by, self.seen = by, {}

    def on_train_start(self, trainer, pl_module) -> None:
        batch = next(iter(trainer.train_dataloader))
        moved = []
        with torch.no_grad():
            before = pair_logps(pl_module.policy, batch)
            for name, parameter in pl_module.policy.named_parameters():
                if parameter.requires_grad and "down_proj" not in name:
                    whole = read_whole(parameter)
                    changed = whole.clone()
                    changed.view(-1)[0] += self.by
                    write_whole(parameter, changed)
                    moved.append(not torch.equal(pair_logps(pl_module.policy, batch).chosen, before.chosen))
                    write_whole(parameter, whole)
        frozen = {str(p.dtype) for p in pl_module.parameters() if not p.requires_grad}
        self.seen = {"moved": moved, "frozen": sorted(frozen)}


class SaveAt(L.Callback):
    """Saves `step-N` after the given optimizer steps."""

    def __init__(self, folder: Path, steps: dict[str, str]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        name = self.steps.get(str(trainer.global_step))
        if batch.share.last and name:
            trainer.save_checkpoint(self.folder / name)


def parts(settings: dict[str, Any]) -> tuple[Any, Any]:
    """The module and the data that the settings describe."""
    from tests.module.records import Records, demonstrations, preferences
    from trainer.data.datamodule import PreferenceData, SupervisedData
    from trainer.module import PreferenceModule, SupervisedModule
    from trainer.objectives import ObjectiveConfig
    from trainer.optimization import OptimizerConfig, ScheduleConfig
    from trainer.policy.load import AdapterConfig, PolicyConfig
    from trainer.policy.reference import ReferenceConfig

    adapter = settings.get("adapter", {"kind": "ia3"})
    policy = PolicyConfig(
        base=settings["base"],
        adapter=AdapterConfig(**adapter) if adapter else None,
        start=settings.get("start"),
        dtype=settings.get("dtype", "float32"),
        gradient_checkpointing=settings.get("gradient_checkpointing", False),
    )
    optimizer = OptimizerConfig(**settings.get("optimizer", {"name": "sgd", "lr": 0.1}))
    schedule = ScheduleConfig(**settings.get("schedule", {}))
    if settings["task"] == "sft":
        module: Any = SupervisedModule(policy, optimizer, schedule)
        records = Records(demonstrations(20), demonstrations(7, seed=1))
        return module, SupervisedData(records, batch_size=8, **settings.get("data", {}))
    objective = ObjectiveConfig(nll_weight=1.0 if settings["task"] == "dpo+nll" else 0.0)
    reference = ReferenceConfig(settings.get("reference", "shared"), cache=settings.get("cache", "auto"))
    module = PreferenceModule(policy, objective, reference, optimizer, schedule)
    module.run_folder = Path(settings["run"]) if "run" in settings else None
    records = Records(preferences(20), preferences(7, seed=1))
    return module, PreferenceData(records, batch_size=8, **settings.get("data", {}))


class Shares(L.Callback):
    """Weighs policy and reference as training starts: bytes that this rank holds, and of the whole."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        for name in ("policy", "reference"):
            model = getattr(pl_module, name, None)
            if model is None:
                continue
            parameters = list(model.parameters())
            tensors = {id(t): t for p in parameters for t in (p, getattr(p, "ds_tensor", p))}
            held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters)
            self.seen[name] = [held, whole]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
