"""Rows from local files and hub datasets, with every mistake told in one line."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.data.lines import BrokenLine, CsvLines, JsonLines, Lines, open_binary
from trainer.provenance import sha256_file
from trainer.schema import UserError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIBLE = (".txt", ".jsonl", ".csv")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BLOCK = 1 << 20
_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one file or hub split: iterating gives (origin, {column: value}), and copies.

    An origin is `file, row N`. Rows count from 1; a CSV header and a JSONL file's blank lines are none.

    `columns` were selected, of those `available`; `hashes` maps the file to its SHA-256, or the hub split to
    its commit.
    """

    name: str
    rows: Dataset | Lines
    columns: tuple[str, ...]
    available: tuple[str, ...]
    hashes: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for origin, row in self.with_broken():
            if isinstance(row, BrokenLine):
                raise row
            yield origin, row

    def with_broken(self) -> Iterator[tuple[str, dict[str, Any] | BrokenLine]]:
        """As iterating; where it was read with `tolerant`, a broken line comes as its error."""
        for number, row in enumerate(self._read(), start=1):
            yield f"{self.name}, row {number}", row

    def _read(self) -> Iterator[dict[str, Any] | BrokenLine]:
        if isinstance(self.rows, Lines):
            for row in self.rows:
                if isinstance(row, BrokenLine):
                    yield row
                else:
                    yield {column: row.get(column) for column in self.columns}
            return
        for batch in self.rows.iter(batch_size=_BATCH):
            for values in zip(*(batch[column] for column in self.columns), strict=True):
                yield dict(zip(self.columns, values, strict=True))


def read_rows(
    path: str,
    *,
    columns: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    split: str | None = None,
    revision: str | None = None,
    offline: bool = False,
    tolerant: bool = False,
) -> Table:
    """Read a local .txt, .jsonl, .json, .csv or .parquet file (.txt, .jsonl, .csv also as .gz), or a hub
    dataset.

    Args:
        path: an existing file, or `owner/name` of a hub dataset, which needs the network.
        columns: what each row must have; None takes every column. Text files have the one column `text`.
        optional: columns taken where the file has them.
        split: of a hub dataset (default `train`); a local file has none.
        revision: of a hub dataset: branch, tag or commit.
        offline: refuse hub datasets.
        tolerant: keep the broken lines of a .jsonl or .csv file as errors: `Table.with_broken` gives them.

    Raises:
        UserError: no such file, a folder, an unknown kind, not UTF-8, empty, broken, or without a column.
    """
    local = Path(path).expanduser()
    if local.exists() or not _looks_like_hub_id(path):
        if split is not None or revision is not None:
            raise UserError(f"{path}: split and revision belong to hub datasets; a local file has neither")
        dataset, hashes = _load_local(local, tolerant), {str(path): sha256_file(local)}
    else:
        dataset, hashes = _load_hub(path, split or "train", revision, offline)
    return _select(str(path), dataset, columns, optional, hashes)


def _looks_like_hub_id(path: str) -> bool:
    names_file = any(suffix in READERS for suffix in Path(path).suffixes)
    return bool(_HUB_ID.fullmatch(path)) and not names_file and not path.startswith((".", "/", "~"))


def fingerprint(
    path: str, split: str | None = None, revision: str | None = None, offline: bool = False
) -> dict[str, str]:
    """The `hashes` that `read_rows` would give, without reading rows: SHA-256 of the file, commit of the hub dataset.

    Raises:
        UserError: no such file, or a hub dataset that is not to be had.
    """
    local = Path(path).expanduser()
    if local.exists() or not _looks_like_hub_id(path):
        _kind(local)
        return {str(path): sha256_file(local)}
    return {f"{path}/{split or 'train'}": _commit(path, revision, offline)}


def _select(
    name: str,
    dataset: Dataset | Lines,
    columns: Sequence[str] | None,
    optional: Sequence[str],
    hashes: dict[str, str],
) -> Table:
    present = list(dataset.column_names)
    wanted = present if columns is None else [*columns, *(c for c in optional if c in present)]
    missing = [column for column in wanted if column not in present]
    if missing:
        raise UserError(
            f"{name}: no column {', '.join(map(repr, missing))}; its columns are: {', '.join(present)}"
        )
    if not len(dataset):
        raise UserError(f"{name}: has no rows")
    rows = dataset if isinstance(dataset, Lines) else dataset.select_columns(wanted)
    return Table(name, rows, tuple(wanted), tuple(present), hashes)


# --- local files --------------------------------------------------------------------------------------------


def _load_local(path: Path, tolerant: bool = False) -> Dataset | Lines:
    suffix = _kind(path)
    if suffix != ".parquet":
        _check_utf8(path, "replace" if tolerant and suffix in (".jsonl", ".csv") else "strict")
    if suffix == ".jsonl":
        return JsonLines(path, tolerant)
    if suffix == ".csv":
        return CsvLines(path, tolerant)
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        with _quiet_datasets():
            loaded = load_dataset(READERS[suffix], data_files=_literal(path), split="train")
    except (
        DatasetGenerationError,
        ValueError,
        TypeError,
    ) as error:  # arrow's and pandas' errors are ValueErrors
        raise UserError(_diagnose(path, suffix, error)) from error
    return loaded


def _kind(path: Path) -> str:
    """The file's suffix, without .gz; refuses what is not a readable file of a known kind."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file")
    if not path.exists():
        raise UserError(f"{path}: no such file (a hub dataset is named owner/name)")
    suffix = path.suffix.lower()
    packed = suffix == ".gz"
    if packed:
        suffix = Path(path.stem).suffix.lower()
    if suffix not in READERS or (packed and suffix not in _COMPRESSIBLE):
        known = ", ".join([*READERS, *(s + ".gz" for s in _COMPRESSIBLE)])
        raise UserError(
            f"{path}: cannot tell the kind of file from its name; it should end in one of {known}"
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty")
    return suffix


def _literal(path: Path) -> str:
    """The path with glob letters quoted: `datasets` reads data_files as patterns."""
    return re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))


def _check_utf8(path: Path, errors: Literal["strict", "replace"] = "strict") -> None:
    """Refuse a file that is not UTF-8 (if `strict`) or only blank, naming the line; huge lines are no matter."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    line, blank = 1, True
    try:
        with open_binary(path) as stream:
            while True:
                block = stream.read(_BLOCK)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    line += error.object[: error.start].count(b"\n")
                    byte = error.object[error.start]
                    raise UserError(
                        f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8"
                    ) from error
                line += text.count("\n")
                blank = blank and not text.strip()
                if not block:
                    break
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error})") from error
    if blank:
        raise UserError(f"{path}: is empty")


def _diagnose(path: Path, suffix: str, error: Exception) -> str:
    """One line on why `datasets` could not read the file: the guilty line where it can be found."""
    kind = {".json": "JSON: a list of objects"}.get(suffix)
    cause = str(error.__cause__ or error).strip().split("\n")[0]
    return f"{path}: cannot be read as {kind or suffix[1:]} ({cause})"


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and logged errors of `datasets`: the caller says it better, in one line."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


# --- the hub ------------------------------------------------------------------------------------------------


def _load_hub(name: str, split: str, revision: str | None, offline: bool) -> tuple[Dataset, dict[str, str]]:
    # The commit first: it pins what is loaded, and without a network it fails at once.
    commit = _commit(name, revision, offline)
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, split=split, revision=commit)
    except (ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}, split {split!r}: cannot be loaded from the hub ({reason})") from error
    return loaded, {f"{name}/{split}": commit}


def _commit(name: str, revision: str | None, offline: bool) -> str:
    """The commit that a revision of a hub dataset stands for."""
    if offline:
        raise UserError(
            f"{name}: no such file here, and as a hub dataset it needs the network, which offline refuses"
        )
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:  # whatever HTTP library this version of huggingface_hub rides on
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no such file here, and not to be had from the hub ({reason})") from error
