"""Small configs for the command line's tests, on a tiny model and a few generated texts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
