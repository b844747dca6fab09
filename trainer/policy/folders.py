"""Folders with saved weights: written whole or not at all, sealed by a manifest of hashes, found again,
checked.

A saved folder is a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`) or a Hugging Face one
(`config.json`, `model.safetensors`). Those that tandem writes also hold `manifest.json`: SHA-256 and size of
each file.

Checkpoints are found and checked here, below the room `checkpoint` that writes them, because a policy starts
from one and a reference is one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.provenance import read_json, sha256_file, sha256_text, write_json
from trainer.schema import UserError

MANIFEST = "manifest.json"
FORMAT = "tandem checkpoint 1"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"

PARTIAL, ASIDE = ".tandem-partial", ".tandem-old"
_PATIENCE = 600.0  # seconds

log = logging.getLogger(__name__)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_saved(folder: Path) -> bool:
    """Whether the folder itself (not one inside it) holds saved weights, sound or damaged."""
    parts = (ADAPTER_CONFIG, ADAPTER, "config.json", WEIGHTS, "resume/state.json")
    return any((folder / part).is_file() for part in parts)


# Writing


@contextlib.contextmanager
def whole_folder(final: Path, guard: Callable[[], None] | None = None) -> Iterator[Path]:
    """A temporary neighbour to fill; at the end it is flushed to disk and renamed to `final`, or it is gone.

    A kill at any moment leaves what was there before or the new folder, whole: under `final`, or (between
    two renames) under a hidden name that readers know and the next save gives back.
    An `OSError` (a full disk) comes out as one that names `final`. `guard` is called before the renaming; what it
    raises stops it.
    """
    final = Path(os.path.abspath(final))
    temporary = _neighbour(final, PARTIAL)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        tidy(final.parent)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if guard is not None:
            guard()
        _replace(temporary, final)
    except OSError as error:
        why = f"not written, what was there before is untouched: {os.strerror(error.errno or 0)}"
        raise OSError(error.errno, why, str(final)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place. A folder cannot be renamed onto another, so an older one steps aside first."""
    aside = _neighbour(final, ASIDE)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.utime(final)  # a rename leaves the time alone, and savers elsewhere judge by it
        os.rename(final, aside)
    os.rename(temporary, final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _neighbour(final: Path, suffix: str) -> Path:
    """A hidden name beside `final` that says who made it."""
    host = socket.gethostname().replace(".", "-")
    return final.with_name(f".{final.name}.{host}.{os.getpid()}{suffix}")


def tidy(folder: Path) -> None:
    """Clear away what killed savers left: half folders go, a folder that stepped aside comes back.

    For savers only: a reader on another machine cannot tell a killed saver from a slow one.
    """
    for path in folder.glob(f".*{ASIDE}"):
        if _abandoned(path) and _stands_in(path):
            os.rename(path, _final(path))
        elif _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".*{PARTIAL}"):
        if _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path) -> bool:
    """Whether its maker is gone. Of another machine's process only time can tell."""
    host, process = path.name.rsplit(".", 3)[1:3]
    if host != socket.gethostname().replace(".", "-"):
        return time.time() - _last_touched(path) > _PATIENCE
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return int(process) == os.getpid()


def _last_touched(folder: Path) -> float:
    """The newest time inside: a folder's own stands still while a large file in it grows."""
    times = []
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # its maker is alive, and has just renamed or removed it
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


def _final(path: Path) -> Path:
    """Where a hidden neighbour belongs."""
    return path.with_name(path.name[1:].rsplit(".", 3)[0])


def _stands_in(path: Path) -> bool:
    """Whether this is a folder that stepped aside for one that never came."""
    return path.name.endswith(ASIDE) and not _final(path).exists()


def remove(folder: Path) -> None:
    """Remove a saved folder so that no half of it is ever seen under its name."""
    away = _neighbour(folder, PARTIAL)
    os.rename(folder, away)
    shutil.rmtree(away, ignore_errors=True)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `manifest.json`: `content`, SHA-256 and size of each file, and a seal over all of it."""
    files = {
        str(path.relative_to(folder)): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": FORMAT, **content, "files": files}
    write_json(folder / MANIFEST, {**manifest, "seal": _seal(manifest)})


def _seal(manifest: dict[str, Any]) -> str:
    unsealed = {key: value for key, value in manifest.items() if key != "seal"}
    return sha256_text(json.dumps(unsealed, sort_keys=True, ensure_ascii=False))


def point(link: str | Path, target: str | Path) -> None:
    """Make `link` a relative symbolic link to `target`: readers see the old target or the new one."""
    link, target = Path(link), Path(target)
    temporary = link.with_name(f".{link.name}.{os.getpid()}.link")
    temporary.unlink(missing_ok=True)
    os.symlink(os.path.relpath(Path(os.path.abspath(target)), Path(os.path.abspath(link)).parent), temporary)
    os.replace(temporary, link)
    _flush(Path(os.path.abspath(link)).parent)


# Reading


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None where tandem did not write the folder; `UserError` where it is damaged."""
    if not (folder / MANIFEST).exists():
        if (folder / "resume").exists():
            raise UserError(
                f"{folder / MANIFEST}: missing, so this checkpoint cannot be trusted; use another one"
            )
        return None
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder / MANIFEST}: not the manifest of a checkpoint (its format should be '{FORMAT}')"
        )
    if manifest.get("seal") != _seal(manifest):
        raise UserError(
            f"{folder / MANIFEST}: damaged (its seal does not fit what it says); use another checkpoint"
        )
    return manifest


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, which is returned.

    Raises:
        UserError: naming the file that is missing, cut short or changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder / MANIFEST}: missing; this is not a checkpoint that tandem wrote")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint is damaged, use another one")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise UserError(
                f"{path}: damaged, {size} bytes instead of {expected['bytes']}; use another checkpoint"
            )
        if sha256_file(path) != expected["sha256"]:
            raise UserError(f"{path}: damaged, its SHA-256 is not the manifest's; use another checkpoint")
    return manifest


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints of a run's folder or its `checkpoints/`, most optimizer steps first; links left out.

    Nothing is changed: whoever reads may do so while another process saves.
    """
    folder = Path(folder)
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not folder.is_dir():
        return []
    found = [
        path
        for path in folder.iterdir()
        if path.is_dir()
        and not path.is_symlink()
        and (not path.name.startswith(".") or _stands_in(path))
        and is_saved(path)
    ]
    return sorted(found, key=_age, reverse=True)


def _age(folder: Path) -> tuple[int, float]:
    """Steps by the manifest, or by the name where the manifest is damaged; then the time."""
    try:
        step = (read_manifest(folder) or {}).get("step")
    except UserError:
        step = None
    if step is None:
        digits = re.findall(r"\d+", folder.name)
        step = int(digits[-1]) if digits else -1
    return step, folder.stat().st_mtime


def newest_valid(folder: str | Path) -> Path | None:
    """The newest checkpoint whose files are all sound. Damaged ones are named in the log and passed over."""
    for path in checkpoints_of(folder):
        try:
            verify(path)
        except UserError as error:
            log.warning("passed over: %s", error)
            continue
        return path
    return None


def resolve(path: str | Path) -> Path:
    """The saved weights that `path` means: a saved folder or `.pth` file itself; of a run's folder, or of its
    `checkpoints/`, the `best` one, else the `last`, else the newest that is sound.

    Raises:
        UserError: there is nothing of the kind.
    """
    given, path = path, Path(path).expanduser()
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(
            f"{given}: no such file or folder (an adapter, a checkpoint or a run's folder is expected)"
        )
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    elif is_saved(path):
        return path.resolve()
    for name in ("best", "last"):
        if is_saved(path / name):
            return (path / name).resolve()
    if (newest := newest_valid(path)) is None:
        raise UserError(
            f"{given}: holds no sound checkpoint (an adapter, a checkpoint or a run's folder is expected)"
        )
    return newest.resolve()


def check_base(folder: str | Path, base: str, fingerprint: dict[str, Any]) -> None:
    """Refuse a checkpoint that was trained on other base weights than `base`, whose fingerprint is given.

    Where one was a folder and the other comes from the hub, hashes cannot be compared: then the shapes are,
    later.
    """
    saved = (read_manifest(Path(folder)) or {}).get("base")
    if not saved or saved.get("kind") != fingerprint.get("kind"):
        return
    if saved["digest"] != fingerprint["digest"]:
        raise UserError(
            f"{folder}: trained on base model '{saved['name']}' ({saved['digest'][:12]}), "
            f"not on '{base}' ({fingerprint['digest'][:12]}); give policy.base the model it was trained on"
        )
