"""One short fit as a process that can start ranks: `python -m tests.distributed.ranks JSON`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Start the fit that `settings` describe; returns rank zero's `losses`, `gradients` and `validation`."""
    out = folder / f"seen-{len(list(folder.iterdir()))}.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.distributed.ranks", json.dumps({**settings, "out": str(out)})]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def main(settings: dict[str, Any]) -> None:
    from tests.module.records import Records, demonstrations, fit, preferences
    from trainer.data.datamodule import PreferenceData, SupervisedData
    from trainer.module import PreferenceModule, SupervisedModule
    from trainer.objectives import ObjectiveConfig
    from trainer.optimization import OptimizerConfig
    from trainer.policy.load import PolicyConfig
    from trainer.policy.reference import ReferenceConfig

    policy, sgd = PolicyConfig(base=settings["base"]), OptimizerConfig(name="sgd", lr=0.1)
    if settings["task"] == "sft":
        module: Any = SupervisedModule(policy, optimizer=sgd)
        data: Any = SupervisedData(Records(demonstrations(20), demonstrations(7, seed=1)), batch_size=8)
    else:
        objective = ObjectiveConfig(nll_weight=1.0 if settings["task"] == "dpo+nll" else 0.0)
        reference = ReferenceConfig(kind=settings.get("reference", "shared"))
        module = PreferenceModule(policy, objective, reference, optimizer=sgd)
        data = PreferenceData(Records(preferences(20), preferences(7, seed=1)), batch_size=8)
    history = fit(
        module,
        data,
        Path(settings["out"]).parent,
        max_steps=-1,
        max_epochs=2,
        devices=settings["devices"],
        strategy=settings["strategy"],
        accumulate_grad_batches=settings["accumulate"],
    )
    if module.trainer.is_global_zero:
        gradients = [{n: g.flatten().tolist() for n, g in step.items()} for step in history.gradients]
        validation = {k: float(v) for k, v in module.trainer.callback_metrics.items() if k.startswith("val/")}
        seen = {"losses": history.losses, "gradients": gradients, "validation": validation}
        Path(settings["out"]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
