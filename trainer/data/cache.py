"""Stores of tokenised examples that outlive a run: found by what made them, built once, by one process.

`<folder>/<key>` is a store; the key is a SHA-256 over everything that decides it: the records' files, the source's
settings and code, tokenizer, limits, versions. Damaged entries are built anew. The folder may be deleted at any time
when no run uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.store import FORMAT, CannotWrite, Damaged, Kind, TokenStore, sync_folder
from trainer.provenance import FULL_DISK, cache_folder, sha256_file, sha256_text
from trainer.schema import Split, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.sources import Source

Build = Callable[[Path], None]
_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets")
_BUILDING, _KEPT = ".building-", ".kept-"


def token_store(folder: str | None, key: dict[str, Any] | None, build: Build) -> TokenStore:
    """The store that `key` stands for, built if it is not there.

    Args:
        folder: of the cache; null for `tokens` in `cache_folder()`.
        key: what the store follows from, as JSON; None for a store that nobody else may use, gone with its process.
        build: writes the store's folder, which does not exist.

    Raises:
        UserError: the disk is full, or what `build` raises.
    """
    where = Path(folder).expanduser() if folder is not None else cache_folder() / "tokens"
    entry = None if key is None else where / sha256_text(json.dumps(key, sort_keys=True, default=repr))[:32]
    if entry is not None and entry.is_dir():
        with contextlib.suppress(Damaged):  # told below, under the lock
            return TokenStore(entry)
    problem = _cannot_hold(where)
    if problem is not None:
        _tell_once(f"{where}: {problem}; tokens go to a temporary folder, for this run alone")
        where, entry = Path(tempfile.gettempdir()), None
    if entry is None:
        return _kept(where, build)
    with _alone(where / f".{entry.name}.lock"):
        store = _opened(entry)
        return _built(entry, build) if store is None else store


def token_key(
    source: Source, split: Split, kind: Kind, tokenizer: PreTrainedTokenizerBase, limits: dict[str, Any]
) -> dict[str, Any] | None:
    """All that tokenised examples follow from; None where the source or the tokenizer cannot say."""
    says: Callable[[Split], dict[str, str] | None] | None = getattr(source, "fingerprint", None)
    read, words = says and says(split), _identity(tokenizer)
    code = _code(source) if _answers_for_itself(source) else None
    if read is None or words is None or code is None:
        return None
    return {
        "format": FORMAT,
        "kind": kind,
        "split": split,
        "source": source.describe(),
        "prompt_template": source.prompt_template,
        "read": read,
        "tokenizer": words,
        "limits": limits,
        "code": code,
        "versions": [f"{name} {metadata.version(name)}" for name in _PACKAGES],
    }


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """What a tokenizer does, as hashes and ids; None for one that is not of the tokenizers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return None
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    special = json.dumps([tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.special_tokens_map])
    return [type(tokenizer).__qualname__, sha256_text(backend.to_str(), template), special]


def _answers_for_itself(source: Source) -> bool:
    """Whether a source's class, if it is not one of tandem's, says by itself what its records follow from.

    One that inherits the answer may make other records of the same files, by settings that nobody hashes.
    """
    kind = type(source)
    return kind.__module__.startswith("trainer.") or "fingerprint" in vars(kind)


def _code(source: Source) -> str | None:
    """SHA-256 over the code that makes records and tokens: this folder, and the classes of the source and its parts."""
    parts = [source, *(part for part in vars(source).values() if hasattr(part, "describe"))]
    kinds = {kind for part in parts for kind in type(part).__mro__ if kind.__module__ != "builtins"}
    try:
        files = {inspect.getfile(kind) for kind in kinds}
        files |= {str(path) for path in Path(__file__).parent.glob("*.py")}
        return sha256_text(*(sha256_file(path) for path in sorted(files)))
    except (OSError, TypeError):  # a class made in a notebook
        return None


def _opened(entry: Path) -> TokenStore | None:
    """The entry, if it is there and whole; a damaged one is told and removed."""
    if not entry.is_dir():
        return None
    try:
        return TokenStore(entry)
    except Damaged as error:
        _tell(f"{error}; tokenising again")
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _built(entry: Path, build: Build) -> TokenStore:
    made = _written(entry.parent, _BUILDING, build)
    try:
        os.rename(made, entry)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        try:  # another process was first, where the file system has no locks
            return TokenStore(entry)
        except Damaged:
            raise UserError(f"{entry}: cannot be replaced ({error.strerror}); delete the folder") from error
    sync_folder(entry.parent)
    return TokenStore(entry, verify=False)


def _kept(where: Path, build: Build) -> TokenStore:
    """A store that goes with this object, or at the latest with this process."""
    store = TokenStore(_written(where, _KEPT, build), verify=False)
    weakref.finalize(store, _remove, store.folder, os.getpid())
    return store


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a data loader's worker
        shutil.rmtree(folder, ignore_errors=True)


def _written(where: Path, prefix: str, build: Build) -> Path:
    """A new folder that `build` has written, or none at all."""
    _sweep(where)
    folder = where / f"{prefix}{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        build(folder)
    except CannotWrite as error:
        shutil.rmtree(folder, ignore_errors=True)
        what = "no room for the tokens" if error.errno in FULL_DISK else "the tokens cannot be stored"
        raise UserError(
            f"{where}: {what} ({error.strerror}); make room, or set data.cache to a folder on another disk"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _sweep(where: Path) -> None:
    """Remove what processes of this host that are no more left behind."""
    for prefix in (_BUILDING, _KEPT):
        for left in where.glob(f"{prefix}{_host()}-*"):
            owner = left.name.split("-")[-2]
            if owner.isdecimal() and not _alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    """Where a process's number means something: containers have numbers of their own, and often one name."""
    space = Path("/proc/self/ns/pid")
    number = os.stat(space).st_ino if space.exists() else 0
    return f"{platform.node()}-{number}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _cannot_hold(where: Path) -> str | None:
    """Why nothing can be written there; None if it can. A full disk is found in writing, and told then."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            return None
    except OSError as error:
        return None if error.errno in FULL_DISK else f"cannot be written ({error.strerror})"


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; where the file system has no locks, several may do the same work.

    The kernel lets go of a lock when its holder dies.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # a full disk: building says so
        yield
        return
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # The other ranks wait for this one, or with it.
                if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
                    _tell(f"{lock.parent}: waiting for another process, which tokenises the same data")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Who waits for it holds the file, not its name.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _tell(line: str) -> None:
    print(f"tandem: {line}", file=sys.stderr)


_tell_once = functools.cache(_tell)
