"""Jobs of the shipped scripts, and where their runs stand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.launch.helpers import ROOT
from tests.slurm.cluster import Cluster, wait_until

STEPS = 12
FIT, SHARDS = ROOT / "launch" / "slurm" / "fit.sbatch", ROOT / "launch" / "slurm" / "shards.sbatch"


def adapter(run: Path) -> bytes:
    """The newest checkpoint's adapter, after checking that the run reached its end."""
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["step"]) == ("finished", STEPS)
    return (run / "checkpoints" / "last" / "adapter_model.safetensors").read_bytes()


class Jobs:
    """Submits fit.sbatch as it is shipped, with a run's folder in `folder`."""

    def __init__(self, cluster: Cluster, config: Path, folder: Path) -> None:
        self.cluster, self.config, self.folder = cluster, config, folder
        self.run, self.log = folder / "run", folder / "job.out"

    def fit(self, *words: str, options: tuple[str, ...] = (), jitter: float = 0, **settings: str) -> str:
        """Submit; two tasks on one node, if `options` do not say otherwise."""
        python = {
            "PATH": f"{Path(sys.executable).parent}:{self.cluster.env['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        own = ("--ntasks-per-node=2", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={self.log}")
        return self.cluster.submit(
            *(FIT, "--config", str(self.config), "--run", str(self.run), "--threads", "1", *words),
            options=(*own, *options),
            JITTER=str(jitter),
            **python,
            **settings,
        )

    def step(self, run: Path | None = None) -> int:
        """The step of the newest checkpoint; 0 without one."""
        last = (run or self.run) / "checkpoints" / "last"
        return int(last.resolve().name.partition("-")[2]) if last.exists() else 0

    def reach(self, step: int, run: Path | None = None, seconds: float = 90) -> None:
        """Wait until the run has saved this step."""
        wait_until(lambda: self.step(run) >= step, seconds, f"step {step}; the job said: {self.said()}")

    def said(self) -> str:
        """The jobs' log so far."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def finished(self, number: str, **expected: Any) -> None:
        """Wait for the end, which must be COMPLETED."""
        job = self.cluster.ended(number)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.said()
        for key, value in expected.items():
            assert job[key] == str(value), self.said()
