"""A run's folder: which one, whether it is free, and where a resume goes on from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.checkpoint import newest_valid, resolve
from trainer.provenance import read_json
from trainer.schema import UserError

CONFIG = "config.yaml"
_ASIDE, _DROPPED = ".replaced", ".dropped"
_MADE_BY_RUNS = (
    CONFIG,
    "manifest.json",
    "samples.jsonl",
    "metrics.csv",
    "reference_cache",
    "hparams.yaml",
    "evaluation.json",
    "reward.json",
    "win_rate.json",
    "win_rate",
    "reward_evaluations.jsonl",
    "report.*",
    "events.out.tfevents.*",
    "lightning_logs/version_*",
    "checkpoints",
)


class Replaced:
    """The run that `--overwrite` replaces: put aside as training starts, gone with its first batch.

    Until then `put_back` leaves the folder as it was, so that a mistake which shows while model and data are
    loaded costs nothing. `paths` is what the old run left; without any all of this does nothing.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] = ()) -> None:
        self.folder, self.paths, self.gone = folder, paths, not paths
        self.aside = folder / _ASIDE

    def holds(self, place: Path) -> bool:
        """Whether `place` is the old run's folder or part of what it left."""
        place, parts = place.resolve(), [path.resolve() for path in self.paths]
        whole = bool(parts) and place == self.folder.resolve()
        return whole or any(place.is_relative_to(part) for part in parts)

    def put_aside(self) -> None:
        """Make room for the new run's files."""
        if self.gone:
            return
        _remove([self.aside])
        for path in self.paths:
            _move(path, self.aside / path.relative_to(self.folder))

    def drop(self) -> None:
        """The new run is under way: remove the old one."""
        if not self.gone:
            self.gone = True
            # Renamed first: what is half removed must not be taken for a run to bring back.
            dropped = self.aside.with_name(_DROPPED)
            _remove([dropped])
            if self.aside.is_dir():
                self.aside.rename(dropped)
            _remove([dropped])

    def put_back(self) -> None:
        """Unless the old run is gone, remove what the new one wrote and bring the old one back."""
        if self.gone:
            return
        moved = self.aside.is_dir()
        _remove(path for path in made(self.folder) if moved or path not in self.paths)
        for path in self.paths if moved else ():
            _move(self.aside / path.relative_to(self.folder), path)
        _remove([self.aside])


def recover(folder: Path) -> None:
    """Bring back the old run that an attempt put aside, if that attempt was killed before its first batch."""
    aside = folder / _ASIDE
    if aside.is_dir():
        _remove(made(folder))
        for path in made(aside):
            _move(path, folder / path.relative_to(aside))
        _remove([aside])
    _remove([folder / _DROPPED])


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: from this checkpoint, or anew (None), in place of the run that is replaced."""

    checkpoint: str | None
    replaced: Replaced


def default_folder(files: Sequence[str]) -> Path:
    """`runs/<recipe>/<stage>` of the first config `<recipe>/<stage>.yaml`."""
    if not files:
        raise UserError("no --run FOLDER and no --config to name it after; give one of them")
    first = Path(files[0]).resolve()
    return Path("runs") / first.parent.name / first.stem


def refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--run {folder}: is a file, where a folder is needed")


def open_run(folder: Path, resume: str | None, overwrite: bool, first: bool) -> Start:
    """Check that a run may use `folder`, and find what it replaces or resumes from.

    Changes nothing, but for what a killed `--overwrite` left behind, which is put in order first.

    `first`: this is rank zero; other ranks come after the folder was claimed. Raises `UserError` for a folder
    that holds a run, while neither `resume` nor `overwrite` was asked for, for a missing checkpoint, and for
    `resume` auto where every checkpoint is damaged.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one of them")
    refuse_file(folder)
    if first and folder.is_dir():
        recover(folder)
    if resume == "auto":
        return Start(_newest_here(folder), Replaced(folder))
    if resume:
        checkpoint = _newest(Path(resume))
        if first and not checkpoint.is_relative_to(folder.resolve()):
            _refuse_if_used(folder)
        return Start(str(checkpoint), Replaced(folder))
    if first and not overwrite:
        _refuse_if_used(folder)
    return Start(None, Replaced(folder, made(folder) if overwrite and first else ()))


def _newest_here(folder: Path) -> str | None:
    """The newest sound checkpoint of a run's folder; None if it has none at all, sound or damaged."""
    folder = folder / "checkpoints"
    there = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir() and not path.is_symlink())
    found = newest_valid(folder) if there else None
    if there and found is None:
        raise UserError(
            f"--resume auto: every checkpoint in {folder} is damaged ({', '.join(there)}); bring one back, or"
            f" start anew with --overwrite (`tandem run`: --force)"
        )
    return None if found is None else str(found)


def _newest(path: Path) -> Path:
    """The checkpoint to go on from: of a run's folder its newest, not its best."""
    if (path / "checkpoints").is_dir() or path.name == "checkpoints":
        found = newest_valid(path)
        if found is None:
            raise UserError(f"--resume {path}: holds no sound checkpoint")
        return found.resolve()
    return resolve(path).resolve()


def made(folder: Path) -> tuple[Path, ...]:
    """What runs wrote into their folder, and nothing else that lies there."""
    return tuple(path for pattern in _MADE_BY_RUNS for path in folder.glob(pattern))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _move(path: Path, target: Path) -> None:
    # A logger may have removed its old file by itself.
    if path.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


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
    if before == "failed" and not (folder / "checkpoints").exists():
        return  # there is nothing to go on with, and nothing to lose
    if before is not None or (folder / "checkpoints").exists():
        raise UserError(
            f"{folder}: holds a run that is not finished ({before or 'no manifest'}); --resume auto"
            f" goes on with it, --overwrite starts anew, another --run FOLDER leaves it alone"
        )
