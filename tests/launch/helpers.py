"""Small configs for the command line's tests, on a tiny model and a few generated texts; commands, run or killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]


def fit_config(folder: Path, base: Path, *, kind: str = "preference", steps: int = 2, **trainer: Any) -> Path:
    """A config file in `folder`: `steps` optimizer steps of two examples each."""
    preference = kind == "preference"
    source = {
        "texts": "texts.yaml",
        "kind": kind,
        "stage": "dpo" if preference else "sft",
        "max_characters": 60,
    }
    content = {
        "model": {
            "class_path": "trainer.module." + ("PreferenceModule" if preference else "SupervisedModule"),
            "init_args": {"policy": {"base": str(base)}, "optimizer": {"lr": 0.01}},
        },
        "data": {
            "class_path": "trainer.data.datamodule." + ("PreferenceData" if preference else "SupervisedData"),
            "init_args": {
                "source": {"class_path": "trainer.pairs.substitution.Letters", "init_args": source},
                "batch_size": 2,
            },
        },
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            **trainer,
        },
        "checkpoint": {"save_steps": 1},
    }
    texts = {"class_path": "trainer.data.sources.GeneratedTexts", "init_args": {"count": 200, "seed": 3}}
    (folder / "texts.yaml").write_text(yaml.safe_dump(texts))
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def tandem(arguments: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **settings)


def killed_when(
    command: list[str], folder: Path, sign: str, runner_only: bool = False, cwd: Path | None = None
) -> None:
    """Start it, and kill it once something is in `folder`: all its processes, or itself, whom they then follow."""
    process = subprocess.Popen(
        command,
        cwd=cwd or folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while process.poll() is None and not list(folder.glob(sign)):
            time.sleep(0.02)
        assert process.poll() is None, f"it ended before there was {sign}"
        if runner_only:
            started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            assert not psutil.wait_procs(started, 60)[1], "a step goes on without the loop"
    finally:  # also where the test itself runs out of time
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
