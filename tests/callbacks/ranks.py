"""Two ranks of a tiny run whose disk is full at the third save: `python -m tests.callbacks.ranks FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from callbacks.alarms import Alarms
from callbacks.early_stopping import EarlyStopping
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.run_manifest import RunManifest
from callbacks.throughput import Throughput
from tests.callbacks.tiny import FolderIO, TinyModule, fit, trainer
from trainer.schema import UserError


def main(root: Path) -> None:
    torch.set_num_threads(1)
    callbacks = (
        RunManifest(),
        Throughput(every_n_steps=1),
        Alarms(every_n_steps=1),
        EarlyStopping("train/loss", every_n_steps=1, patience=50),
        ImprovedLossCheckpoint(save_steps=2),
    )
    runner = trainer(
        root, *callbacks, io=FolderIO(full=2), devices=2, strategy="ddp", use_distributed_sampler=False
    )
    # The ranks see different losses; rank zero's decide.
    worse = 0.5 * runner.global_rank
    try:
        fit(runner, TinyModule(), [3.0, 3.0, 2.0, 2.0 + 9 * worse, 1.0, 1.0, 0.0, 0.0])
    except UserError as error:
        (root / f"rank-{runner.global_rank}.txt").write_text(str(error))
        # Lightning's launcher would kill the other rank as soon as this one leaves: both are to have said it.
        runner.strategy.barrier()
        os._exit(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
