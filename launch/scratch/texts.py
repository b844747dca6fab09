"""The texts that a small model learns from: files in parts that share no text, and windows of their tokens."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.files import read_rows
from trainer.data.sources import content_key, split_share
from trainer.provenance import sha256_file, write_json, write_text
from trainer.schema import UserError


@dataclasses.dataclass(frozen=True)
class Texts:
    """Rows of a file (or hub dataset) with a column of texts.

    Args:
        path: .jsonl, .json, .csv, .txt (also as .gz) or .parquet file, or `owner/name` of a hub dataset.
        column: the texts.
        label: what a classifier learns of each text, a number or a word; a generator leaves it alone.
        split: of the hub dataset (default `train`).
        limit: the first so many rows.
        validation_fraction: share of the texts that the model is measured on and does not learn from.
        offline: refuse the network.
    """

    path: str
    column: str = "text"
    label: str = "label"
    split: str | None = None
    limit: int | None = None
    validation_fraction: float = 0.1
    offline: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"texts.validation_fraction: {self.validation_fraction}; it should be above 0 and below 1"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"texts.limit: {self.limit}; it should be 1 or more")


class Read(list[tuple[str, Any]]):
    """(text, label) as they stood in the file, each text once; `hashes` says which file it was."""

    hashes: dict[str, str]


def read(texts: Texts, labelled: bool) -> Read:
    """The texts, without blank and repeated ones. Raises `UserError`: no such file or column, or no text in it."""
    columns = [texts.column, texts.label] if labelled else [texts.column]
    table = read_rows(texts.path, columns=columns, split=texts.split, offline=texts.offline)
    found, seen = Read(), set()
    for origin, row in itertools.islice(table, texts.limit):
        text = row[texts.column]
        if not isinstance(text, str):
            raise UserError(f"{origin}: column {texts.column!r} is {text!r}; it should be text")
        if text.strip() and (key := content_key(text)) not in seen:
            seen.add(key)
            found.append((text, row[texts.label] if labelled else None))
    if not found:
        raise UserError(f"{texts.path}: no text in column {texts.column!r}")
    found.hashes = table.hashes
    return found


def read_lines(paths: Sequence[str]) -> Read:
    """The texts of files, one a line, and of the YAML files of text sources; each once, in their order."""
    from launch.sources import text_source
    from trainer.evaluation.letters import read_texts

    found, seen = Read(), set()
    found.hashes = {}
    for path in paths:
        if Path(path).suffix in (".yaml", ".yml"):
            loaded = text_source(path).load()
            texts = [text for row in loaded.rows for text in row.texts.values()]
            found.hashes |= loaded.hashes
        elif Path(path).suffix not in (".txt", ""):
            raise UserError(f"{path}: should be a .txt file, one text a line, or the .yaml of a text source")
        else:
            texts = read_texts(path, None)
            found.hashes[path] = sha256_file(path)
        for text in texts:
            if text.strip() and (key := content_key(text)) not in seen:
                seen.add(key)
                found.append((text, None))
    return found


def validates(text: str, fraction: float) -> bool:
    """Whether a text is one of those to measure on: by its content alone."""
    return split_share(content_key(text), "scratch/validation") < fraction


def write_parts(
    texts: Texts,
    shares: Mapping[str, float],
    folder: Path,
    labelled: bool = True,
    joined: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, int]:
    """Deal the texts to files `NAME.jsonl`, one for each share, by their content alone; returns how many each has.

    The same text is always in the same part, whatever else the file holds. `joined` names further files, each with the
    parts that it holds together. Raises `UserError`: shares that do not sum to 1, a part that would be empty.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(f"--shares {json.dumps(dict(shares))}: should be numbers above 0 that sum to 1")
    joined = joined or {}
    for name in (*shares, *joined):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"part {name!r}: is to name a file; give letters, digits, '_', '.' and '-'")
    for name, members in joined.items():
        if name in shares or not members or not set(members) <= set(shares):
            raise UserError(f"--join {name}: should have a new name, and parts out of {', '.join(shares)}")
    parts: dict[str, list[str]] = {name: [] for name in shares}
    rows = read(texts, labelled)
    for text, label in rows:
        row = {texts.column: text} | ({texts.label: label} if labelled else {})
        parts[_part_of(content_key(text), shares)].append(json.dumps(row, ensure_ascii=False) + "\n")
    if empty := [name for name, lines in parts.items() if not lines]:
        raise UserError(
            f"{texts.path}: {len(rows)} texts leave part {empty[0]!r} empty; give more texts or share"
        )
    files = parts | {
        name: [line for part in members for line in parts[part]] for name, members in joined.items()
    }
    # What says that the parts are there comes last, and does not stay over others.
    (folder / "parts.json").unlink(missing_ok=True)
    for name, lines in files.items():
        write_text(folder / f"{name}.jsonl", "".join(lines))
    counts = {name: len(lines) for name, lines in files.items()}
    hashes = {f"{name}.jsonl": sha256_file(folder / f"{name}.jsonl") for name in files}
    write_json(
        folder / "parts.json",
        {"texts": rows.hashes, "shares": dict(shares), "counts": counts, "files": hashes},
    )
    return counts


def write_halves(lines: Read, folder: Path, test_fraction: float = 0.2, shortest: int = 4) -> dict[str, int]:
    """Cut lines in two by their words: `prompt` is the first half, `completion` the rest with the blank before it.

    `train.jsonl` and `test.jsonl` share no line; `texts.jsonl` are the whole lines of train. Lines of fewer than
    `shortest` words are left out. Returns how many each file has, and how many were left out.
    """
    if not 0 < test_fraction < 1 or shortest < 2:
        raise UserError(
            f"--test_fraction {test_fraction}, --shortest {shortest}: should be between 0 and 1, and 2 words or more"
        )
    files: dict[str, list[str]] = {"train": [], "test": [], "texts": []}
    short = 0
    for line, _ in lines:
        words = line.split()
        if len(words) < shortest:
            short += 1
            continue
        tests = split_share(content_key(line), "scratch/halves") < test_fraction
        half = len(words) // 2
        row = {"prompt": " ".join(words[:half]), "completion": " " + " ".join(words[half:])}
        files["test" if tests else "train"].append(json.dumps(row, ensure_ascii=False) + "\n")
        if not tests:
            files["texts"].append(json.dumps({"text": " ".join(words)}, ensure_ascii=False) + "\n")
    if empty := [name for name, rows in files.items() if not rows]:
        raise UserError(
            f"{len(lines)} lines leave {empty[0]}.jsonl empty; give more, or another --test_fraction"
        )
    # What says that the halves are there comes last, and does not stay over others.
    (folder / "halves.json").unlink(missing_ok=True)
    for name, rows in files.items():
        write_text(folder / f"{name}.jsonl", "".join(rows))
    counts = {name: len(rows) for name, rows in files.items()}
    write_json(folder / "halves.json", {"texts": lines.hashes, "counts": counts, "short": short})
    return counts | {"left out": short}


def _part_of(key: str, shares: Mapping[str, float]) -> str:
    point, edge = split_share(key, "scratch/part"), 0.0
    for name, share in shares.items():
        edge += share
        if point < edge:
            return name
    return name


class Windows:
    """Windows of token rows, `count` of them, each drawn anew: a dataset for transformers' Trainer.

    Item i follows from (seed, i) alone; in every len(rows) items each row comes once. A window begins at its row's
    start as often as elsewhere in it, and BOS stands before either.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        labels: Sequence[int] | None,
        lengths: tuple[int, int],
        bos: int,
        count: int,
        seed: int,
    ) -> None:
        self.rows, self.labels, self.lengths = rows, labels, lengths
        self.bos, self.count, self.seed = bos, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, place = divmod(index, len(self.rows))
        chosen = int(np.random.default_rng([self.seed, 0, turn]).permutation(len(self.rows))[place])
        row, rng = self.rows[chosen], np.random.default_rng([self.seed, 1, index])
        length = int(rng.integers(self.lengths[0], self.lengths[1] + 1)) - 1
        start = 0 if rng.random() < 0.5 else int(rng.integers(0, max(1, len(row) - length + 1)))
        ids = [self.bos, *row[start : start + length]]
        return {"input_ids": ids, "labels": ids if self.labels is None else self.labels[chosen]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.count))
