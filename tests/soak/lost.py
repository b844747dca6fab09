"""Two ranks of which one is lost: `python -m tests.soak.lost FOLDER` prints, for each way, how the job ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from tests.soak.ranks import Ranks, warm_up
from tests.tiny_models import make
from trainer.schema import UserError

TIMEOUT = 5.0


class Fails(L.Callback):
    """Rank one's own error, in the middle of training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            raise UserError("rank one cannot read its part of the data")


def main(folder: Path) -> None:
    from tests.launch.helpers import fit_config

    warm_up()
    jitter = {"class_path": "tests.soak.jitter.Jitter"}
    config = fit_config(
        folder, make("llama", folder / "base"), steps=2000, devices=2, strategy="ddp", callbacks=[jitter]
    )
    fails = folder / "fails.yaml"
    fails.write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": "tests.soak.lost.Fails"}]}}))
    seen = {}
    for way in ("killed-0", "killed-1", "stopped-0", "stopped-1", "error"):
        run, log = folder / way, folder / f"{way}.log"
        words = ["--config", str(config), *(["--config", str(fails)] if way == "error" else [])]
        ranks = Ranks([*words, "--run", str(run), "--rank_timeout", str(TIMEOUT)], log)
        seen[way] = {**lose(way, ranks, run), "log": log.read_text()}
    print(json.dumps(seen))


def lose(way: str, ranks: Ranks, run: Path) -> dict[str, Any]:
    until = time.monotonic() + 60
    while not (run / "checkpoints" / "last").exists() and not ranks.poll() and time.monotonic() < until:
        time.sleep(0.02)
    began = time.monotonic()
    lost = int(way[-1]) if way != "error" else 1
    if way.startswith("killed"):
        ranks.send(signal.SIGKILL, [lost])
    elif way.startswith("stopped"):
        ranks.send(signal.SIGSTOP, [lost])
    other = 1 - lost
    while not ranks.poll() and ranks.codes[other] is None and time.monotonic() - began < 60:
        time.sleep(0.02)
    seconds = time.monotonic() - began
    if way.startswith("stopped"):
        # What a launcher does then: `srun --kill-on-bad-exit`, torchrun.
        os.kill(ranks.pids[lost], signal.SIGKILL)
    ranks.wait(20)
    return {"codes": ranks.codes, "seconds": round(seconds, 2), "lost": lost}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
