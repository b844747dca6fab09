"""Short fits, one after the other, on ranks that torchrun starts: a start costs more than many small fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L

ROOT = Path(__file__).resolve().parents[2]


def run_on_ranks(
    folder: Path, ranks: int, runs: dict[str, dict[str, Any]], seconds: int = 280
) -> dict[str, Any]:
    """Make each of the named runs on `ranks` gloo ranks; returns what rank zero saw of each (`seen`)."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"runs": runs, "folder": str(folder), "ranks": ranks}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "-m", "tests.distributed.ranks", str(plan)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-6000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in runs}


def main(plan: dict[str, Any]) -> None:
    for name, settings in plan["runs"].items():
        folder = Path(plan["folder"])
        seen = made(settings, plan["ranks"], folder)
        if seen is not None:
            (folder / f"{name}.json").write_text(json.dumps(seen))


def made(settings: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any] | None:
    """Make one run; on rank zero, what was seen of it."""
    import lightning as L

    from tests.module.records import fit
    from trainer.checkpoint import PortableCheckpointIO
    from trainer.strategy import Zero3

    strategy = settings.get("strategy", "auto")
    if strategy == "zero3":
        # At the default every tensor of a tiny model would stay whole on each rank.
        strategy = Zero3(**{"param_persistence_threshold": 0, "timeout": 60, **settings.get("zero3", {})})
    L.seed_everything(7, verbose=False)
    module, data = parts(settings)
    shares = Shares()
    saver = [SaveAt(folder, settings["save"])] if "save" in settings else []
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
        callbacks=[shares, *saver],
        plugins=[PortableCheckpointIO()],
    )
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
    }


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
        return module, SupervisedData(Records(demonstrations(20), demonstrations(7, seed=1)), batch_size=8)
    objective = ObjectiveConfig(nll_weight=1.0 if settings["task"] == "dpo+nll" else 0.0)
    reference = ReferenceConfig(kind=settings.get("reference", "shared"))
    module = PreferenceModule(policy, objective, reference, optimizer, schedule)
    return module, PreferenceData(Records(preferences(20), preferences(7, seed=1)), batch_size=8)


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
