"""A run's folder: which one, whether it is free, and where a resume goes on from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint import newest_valid, resolve
from trainer.provenance import read_json
from trainer.schema import UserError

CONFIG = "config.yaml"
_MADE_BY_RUNS = (
    CONFIG,
    "manifest.json",
    "samples.jsonl",
    "metrics.csv",
    "hparams.yaml",
    "evaluation.json",
    "report.*",
    "events.out.tfevents.*",
    "checkpoints",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: from this checkpoint, or anew (None)."""

    checkpoint: str | None


def default_folder(files: Sequence[str]) -> Path:
    """`runs/<recipe>/<stage>` of the first config `<recipe>/<stage>.yaml`."""
    if not files:
        raise UserError("no --run FOLDER and no --config to name it after; give one of them")
    first = Path(files[0]).resolve()
    return Path("runs") / first.parent.name / first.stem


def open_run(folder: Path, resume: str | None, overwrite: bool, first: bool) -> Start:
    """Check that a run may use `folder`, clear it if `overwrite`, and find what to resume from.

    `first`: this is rank zero; other ranks come after the folder was claimed. Raises `UserError` for a folder
    that holds a run, while neither `resume` nor `overwrite` was asked for, and for a missing checkpoint.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run {folder}: is a file, where a folder is needed")
    if resume == "auto":
        found = newest_valid(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
        return Start(None if found is None else str(found))
    if resume:
        checkpoint = _newest(Path(resume))
        if first and not checkpoint.is_relative_to(folder.resolve()):
            _refuse_if_used(folder)
        return Start(str(checkpoint))
    if first and overwrite:
        clear(folder)
    elif first:
        _refuse_if_used(folder)
    return Start(None)


def _newest(path: Path) -> Path:
    """The checkpoint to go on from: of a run's folder its newest, not its best."""
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        found = newest_valid(path)
        if found is None:
            raise UserError(f"--resume {path}: holds no sound checkpoint")
        return found.resolve()
    return resolve(path).resolve()


def clear(folder: Path) -> None:
    """Remove what runs write into their folder, and nothing else that lies there."""
    for pattern in _MADE_BY_RUNS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def status(folder: Path) -> str | None:
    """What the run's manifest says: running, finished, interrupted or failed; None without a manifest."""
    path = folder / "manifest.json"
    return str(read_json(path).get("status")) if path.is_file() else None


def _refuse_if_used(folder: Path) -> None:
    before = status(folder)
    if before == "finished":
        raise UserError(
            f"{folder}: holds a finished run; give another --run FOLDER, or --overwrite to start anew,"
            f" or --resume auto to train it further"
        )
    if before is not None or (folder / "checkpoints").exists():
        raise UserError(
            f"{folder}: holds a run that is not finished ({before or 'no manifest'}); --resume auto"
            f" goes on with it, --overwrite starts anew, another --run FOLDER leaves it alone"
        )
