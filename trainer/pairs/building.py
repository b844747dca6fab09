"""How pairs are built, whoever builds them: rows kept as they come, in shards and ranks, and merged when all are there.

A folder of pairs holds `prompts.jsonl` and `about.json` (what is to be done), the ledger (`settings.json`, `parts/`),
and, when no prompt is missing any more, `candidates.jsonl`, `pairs.jsonl` (for `PreferenceFile`) and `manifest.json`.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.ledger import Ledger, Row
from trainer.pairs.prompts import Prompt, Prompts
from trainer.pairs.ranks import agreed, gathered, rank, ranks
from trainer.pairs.users import check_pair, is_users, naming, plain, rows_of
from trainer.provenance import (
    git_revision,
    read_json,
    sha256_file,
    sha256_text,
    versions,
    write_json,
    write_text,
)
from trainer.schema import UserError, failure

PAIRS, CANDIDATES, PROMPTS = "pairs.jsonl", "candidates.jsonl", "prompts.jsonl"
ABOUT, MANIFEST = "about.json", "manifest.json"
_PART = re.compile(r"(\d+)-of-(\d+)(\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `of`: every `of`-th prompt."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16`. Raises `UserError` for anything else."""
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard {text}: should be such as 3/16: the third of sixteen, counted from 1")
        return cls(int(found[1]), int(found[2]))

    def deal(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return list(prompts[self.number - 1 :: self.of])


@dataclasses.dataclass(frozen=True)
class Pair:
    """The better and the worse of a row's candidates."""

    chosen: Mapping[str, Any]
    rejected: Mapping[str, Any]

    @property
    def margin(self) -> float:
        return self.chosen["score"] - self.rejected["score"]


class PairBuilder(abc.ABC):
    """Makes a row of candidates for each prompt, and at most one pair of each row."""

    @abc.abstractmethod
    def prompts(self) -> Prompts:
        """All prompts, the same in the same order each time."""

    @abc.abstractmethod
    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        """The prompts' rows, a batch at a time as they come: key, prompt, candidates (text, tokens, finished, score).

        Where a process group is up, each rank is given all prompts and gives the rows of its own share.
        """

    @abc.abstractmethod
    def pair(self, row: Row, counts: Counter[str]) -> Pair | None:
        """The pair of a row; None where there is none, with the reason counted as `dropped_<why>`."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that rows follow from beside the prompts, as plain JSON: rows of other settings are refused."""

    @abc.abstractmethod
    def selection(self) -> dict[str, Any]:
        """What pairs follow from beside the rows, as plain JSON. It may change without a row being made anew."""

    def pair_row(self, row: Row, pair: Pair) -> dict[str, Any]:
        """A row of `pairs.jsonl`: what `PreferenceFile` reads, with the scores."""
        named = {"chosen": pair.chosen, "rejected": pair.rejected}
        return {
            "id": row["key"],
            "prompt": row["prompt"],
            **{name: each["text"] for name, each in named.items()},
            **{f"{name}_score": each["score"] for name, each in named.items()},
            **{f"{name}_finished": each["finished"] for name, each in named.items()},
        }

    def beside(self) -> dict[str, str]:
        """Files that are put beside the rows when these are begun: name -> text."""
        return {}

    def findings(self, rows: Sequence[Row], pairs: Sequence[tuple[Row, Pair]]) -> dict[str, Any]:
        """What else the manifest says of all rows and of the pairs that are kept, as plain JSON."""
        return {}


@dataclasses.dataclass(frozen=True)
class Built:
    """What `build` did: rows made now, prompts that have no row yet (of other shards), and the counts when merged."""

    new: int
    missing: int
    manifest: dict[str, Any] | None


def build(
    builder: PairBuilder,
    output: str | Path,
    shard: Shard = Shard(),
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Built:
    """Make the rows of a shard that are missing, and merge if then none is missing of any shard.

    Where a process group is up, every rank calls this; the ranks share the work. A kill costs each at most one batch.
    `settings`: what the builder was made of, for the manifest.

    Raises:
        UserError: what the builder raises; or rows of other settings lie in `output`.
    """
    output, begun = Path(output), time.monotonic()
    with naming(builder, "prompts"):
        found = builder.prompts()
        told = "".join(_line({"key": prompt.key, "prompt": prompt.text}) for prompt in found.prompts)
    follows = {**plain(builder, "describe"), "prompts": sha256_text(told)}
    speaks = rank() == 0
    with Ledger(output, follows, f"{shard.number}-of-{shard.of}.{rank()}") as ledger:
        if speaks:
            about = {"settings": settings, "prompts": found.counts, "read": found.hashes}
            _write_once(output / PROMPTS, told)
            _write_once(output / ABOUT, json.dumps(about, ensure_ascii=False, indent=2) + "\n")
            for name, text in plain(builder, "beside").items():
                _write_once(output / name, text)
        mine = shard.deal(found.prompts)
        missing = set(agreed(ledger.missing(prompt.key for prompt in mine)))
        left = [prompt for prompt in mine if prompt.key in missing]
        new = sum(gathered(_make(builder, ledger, left, len(mine), progress and speaks)))
    # All parts are read again: other shards may have ended meanwhile.
    absent = Ledger(output, follows).missing(prompt.key for prompt in found.prompts) if speaks else []
    manifest = merge(builder, output, begun) if speaks and not absent else None
    return Built(new, len(absent), manifest)


def merge(builder: PairBuilder, output: str | Path, begun: float | None = None) -> dict[str, Any]:
    """Write candidates, pairs and manifest of a folder whose rows are all there; returns the manifest.

    The same rows give the same files, and a manifest that says the same is left as it is. One that does not is gone
    before its files change.

    Raises:
        UserError: no such folder, rows are missing (their shards are named), or no pair is left.
    """
    output = Path(output)
    about, follows = read_about(output), read_json(output / "settings.json")
    prompts = _prompts_of(output / PROMPTS)
    ledger = Ledger(output, follows)
    if absent := set(ledger.missing(prompt.key for prompt in prompts)):
        raise UserError(f"{output}: {_absent(output, prompts, absent)}; run them again")
    rows = [ledger.rows[prompt.key] for prompt in prompts]
    counts: Counter[str] = Counter(prompts=len(rows), candidates=0, kept=0)
    pairs = [(row, _paired(builder, row, counts)) for row in rows]
    kept = [(row, pair) for row, pair in pairs if pair is not None]
    counts.update(kept=len(kept), candidates=sum(len(row["candidates"]) for row in rows))
    texts = {
        CANDIDATES: "".join(map(_line, rows)),
        PAIRS: "".join(_line(each) for each in _pair_rows(builder, kept)),
    }
    if not kept or not all(_says(output / name, text) for name, text in texts.items()):
        (output / MANIFEST).unlink(missing_ok=True)
    _write_once(output / CANDIDATES, texts[CANDIDATES])
    if not kept:
        (output / PAIRS).unlink(missing_ok=True)
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        invalid = ((row, each) for row in rows for each in row["candidates"] if each.get("invalid"))
        why = "".join(
            f"; the first invalid text, to {row['prompt'][:40]!r}: {each['invalid']}"
            for row, each in itertools.islice(invalid, 1)
        )
        raise UserError(f"{output}: no pair is left ({told}{why}); ask for more texts, or less of each")
    _write_once(output / PAIRS, texts[PAIRS])
    manifest = {
        "kind": "pairs",
        "builder": {**follows, **plain(builder, "selection")},
        "counts": dict(counts),
        "scores": _scores(rows, [pair for _, pair in kept]),
        **plain(builder, "findings", rows, kept),
        "files": {name: sha256_file(output / name) for name in (PAIRS, CANDIDATES)},
    }
    return _write_manifest(output / MANIFEST, manifest, about, begun)


def read_about(output: Path) -> dict[str, Any]:
    """What `build` wrote down when it began: `settings` of the builder, counts of the prompts, hashes of what was read.

    Raises `UserError` where nothing was begun.
    """
    if not (output / ABOUT).is_file():
        raise UserError(f"{output}: holds no pairs that were begun (no {ABOUT}); run `tandem pairs` first")
    about: dict[str, Any] = read_json(output / ABOUT)
    if not isinstance(about, dict) or "settings" not in about:
        raise UserError(f"{output / ABOUT}: says nothing of the builder; run the same `tandem pairs` again")
    return about


def _make(builder: PairBuilder, ledger: Ledger, left: list[Prompt], whole: int, progress: bool) -> int:
    """Have the rows made and kept; returns how many this rank has made."""
    new, sharing = 0, ranks()
    share, done = -(-len(left) // sharing), -(-(whole - len(left)) // sharing)
    bar = tqdm(
        total=done + share,
        initial=done,
        desc="making pairs",
        unit="prompt",
        disable=not progress or not left,
        # In a log file every refresh is a line.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
    with bar:
        for rows in rows_of(builder, left) if left else ():
            ledger.add(rows)
            new += len(rows)
            bar.update(len(rows))
    return new


def _absent(output: Path, prompts: Sequence[Prompt], absent: set[str]) -> str:
    """How many rows are missing, and of which shards, where all parts are of equally many shards."""
    told = f"{len(absent):,} of {len(prompts):,} prompts have no row yet"
    parts = [_PART.fullmatch(part.stem) for part in (output / "parts").glob("*.jsonl")]
    of = {int(part[2]) for part in parts if part}
    if len(of) != 1:
        return told
    (number,) = of
    shards = sorted({i % number + 1 for i, prompt in enumerate(prompts) if prompt.key in absent})
    return f"{told}, of shard {', '.join(f'{shard}/{number}' for shard in shards)}"


def _scores(rows: Sequence[Row], pairs: Sequence[Pair]) -> dict[str, float]:
    """Over all candidates that have a score, and over the pairs that are kept."""
    scores = [each["score"] for row in rows for each in row["candidates"] if each.get("score") is not None]
    return {
        "mean": statistics.fmean(scores),
        "sd": statistics.pstdev(scores),
        "chosen_mean": statistics.fmean(pair.chosen["score"] for pair in pairs),
        "rejected_mean": statistics.fmean(pair.rejected["score"] for pair in pairs),
        "margin_mean": statistics.fmean(pair.margin for pair in pairs),
    }


def _write_manifest(
    path: Path, manifest: dict[str, Any], about: Mapping[str, Any], begun: float | None
) -> dict[str, Any]:
    """The manifest, as it is or as it was where it says the same: which process ended last makes no other."""
    before = read_json(path) if path.is_file() else {}
    if all(before.get(name) == value for name, value in json.loads(json.dumps(manifest)).items()):
        return dict(before)
    seconds = None if begun is None else round(time.monotonic() - begun, 1)
    manifest = {**manifest, **about, "versions": versions(), "git": git_revision(), "seconds": seconds}
    write_json(path, manifest)
    return manifest


def _write_once(path: Path, text: str) -> None:
    if not _says(path, text):
        write_text(path, text)


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode("utf-8")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _prompts_of(path: Path) -> list[Prompt]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [Prompt(row["key"], row["prompt"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no prompts; run the same `tandem pairs` again") from error


def _pair_rows(builder: PairBuilder, kept: Sequence[tuple[Row, Pair]]) -> list[dict[str, Any]]:
    return [plain(builder, "pair_row", row, pair) for row, pair in kept]


def _paired(builder: PairBuilder, row: Row, counts: Counter[str]) -> Pair | None:
    try:
        pair = builder.pair(row, counts)
        if pair is not None:
            check_pair(builder, pair)
        return pair
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, LookupError | TypeError | AttributeError) and not is_users(builder):
            raise
        raise UserError(
            f"{type(builder).__qualname__}: makes nothing of the row {row['key']!r}"
            f" ({failure(error)}); if someone changed it, remove its line in parts/"
        ) from error
