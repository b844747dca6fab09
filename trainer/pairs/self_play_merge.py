"""Pairs of all shards that one opponent has answered: real against generated, mixed with the last iteration's.

The folder of pairs holds `train.jsonl`, `test.jsonl` (rows of SPIN's format, each with its opponent) and
`manifest.json`; `trainer.data.self_play.SpinPairs` reads it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rapidfuzz.distance import Levenshtein

from trainer.data.files import read_rows
from trainer.data.self_play import (
    CONVERTED,
    DIGITS,
    GENERATED,
    MANIFEST,
    SPLITS,
    SpinRow,
    spin_line,
    spin_row,
)
from trainer.pairs.self_play import Part, write_manifest
from trainer.provenance import read_json, sha256_file, sha256_text, write_text
from trainer.schema import UserError

_SHARED = ("template", "sampling", "max_prompt", "data", "totals")
"""What all shards have in common, beside the opponent."""


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A folder that `generate` has finished, and what it says of itself."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def part(self) -> Part:
        return Part(**self.manifest["part"])


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A row with the answer of an opponent (the first digits of its digest)."""

    row: SpinRow
    generated: str
    finished: bool
    opponent: str

    @property
    def line(self) -> str:
        ends = {"real_finished": self.row.finished, "generated_finished": self.finished}
        return spin_line(self.row, self.generated, **ends, opponent=self.opponent)

    @property
    def identical(self) -> bool:
        return self.generated.strip() == self.row.real.strip()

    @property
    def similarity(self) -> float:
        return float(Levenshtein.normalized_similarity(self.row.real, self.generated))


def convert(
    input_dir: str | Path,
    output_dir: str | Path,
    num_fracs: int | None = None,
    previous: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Make pairs of an opponent's shards; returns the manifest. The same shards give the same files.

    Pairs whose answers are the same are dropped and counted. `similarity` is the mean of 1 - edit distance over length,
    those included: how near the opponent comes to the real answers.

    Args:
        num_fracs: how many shards there are; by default what they say themselves.
        previous: folders of pairs of earlier iterations, whose own opponent's training pairs are mixed in (SPIN mixes
            those of the last iteration). What validates is the new opponent's alone.

    Raises:
        UserError: a shard is missing, there twice, damaged, or of another opponent, template, sampling or data; no pair
            is left.
    """
    output = Path(output_dir)
    shards = _whole(Path(input_dir), _shards(Path(input_dir)), num_fracs)
    first = shards[0].manifest
    known = first["opponent"]["digest"][:DIGITS]
    counts: dict[str, dict[str, int]] = {}
    likeness: dict[str, float] = {}
    mixed: list[_Pair] = []
    told = []
    for folder in map(Path, previous):
        own, about = _earlier(folder, first)
        mixed += own
        told.append({**about, "kept": len(own)})
    if _differs(output, shards, told):
        (output / MANIFEST).unlink()
    for split in SPLITS:
        pairs = sorted(_pairs(shards, split, known), key=lambda pair: pair.row.key)
        kept = [pair for pair in pairs if not pair.identical]
        earlier = mixed if split == "train" else []
        if split == "train" and not kept:
            raise UserError(
                f"{input_dir}: no pair is left to train on: {len(pairs):,} answers, all of them the real ones"
            )
        if not kept:
            (output / f"{split}.jsonl").unlink(missing_ok=True)
            continue
        write_text(output / f"{split}.jsonl", (pair.line for pair in [*kept, *earlier]))
        counts[split] = {
            "rows": sum(shard.manifest["counts"].get(split, {}).get("rows", 0) for shard in shards),
            "answers": len(pairs),
            "dropped_identical": len(pairs) - len(kept),
            "kept": len(kept),
            "previous": len(earlier),
        }
        likeness[split] = statistics.fmean(pair.similarity for pair in pairs)
    manifest = {
        "kind": CONVERTED,
        "opponent": first["opponent"],
        **{name: first[name] for name in _SHARED},
        "shards": _told(shards),
        "previous": told,
        "counts": counts,
        "similarity": likeness,
    }
    return write_manifest(output, manifest, [f"{split}.jsonl" for split in counts])


def _told(shards: Sequence[_Shard]) -> list[dict[str, Any]]:
    return [
        {"folder": shard.folder.name, "part": shard.manifest["part"], "files": shard.manifest["files"]}
        for shard in shards
    ]


def _differs(output: Path, shards: Sequence[_Shard], previous: list[dict[str, Any]]) -> bool:
    """Whether what lies there was made of other shards: its manifest goes before its files change."""
    if not (output / MANIFEST).is_file():
        return False
    there = read_json(output / MANIFEST)
    if there.get("kind") != CONVERTED:
        raise UserError(f"{output}: holds a manifest of {there.get('kind') or 'a run'}; give another folder")
    return bool(there["shards"] != _told(shards) or there["previous"] != previous)


# --- shards: all there, once, of one opponent ---------------------------------------------------------------


def _shards(folder: Path) -> list[_Shard]:
    """The finished shards of a folder, or the folder's own."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `tandem spin generate` writes it")
    places = [folder] if (folder / "settings.json").is_file() else sorted(folder.iterdir())
    found = []
    for place in places:
        if (place / MANIFEST).is_file() and (said := read_json(place / MANIFEST)).get("kind") == GENERATED:
            found.append(_Shard(place, said))
        elif (place / "settings.json").is_file():
            raise UserError(f"{place}: is not finished; run `tandem spin generate` for it again")
    if not found:
        raise UserError(f"{folder}: holds no shard of `tandem spin generate`")
    return found


def _whole(folder: Path, shards: list[_Shard], num_fracs: int | None) -> list[_Shard]:
    """The shards in order; a `UserError` names one that is missing, there twice, or not like the first."""
    for shard in shards[1:]:
        _alike(shards[0], shard)
    first = shards[0].part
    most = max(shards[0].manifest["totals"].values())
    if first.size is None:
        assert first.of is not None
        numbers, known = range(1, first.of + 1), first.of
        if num_fracs not in (None, known):
            raise UserError(
                f"--num_fracs {num_fracs}: {folder} has shards of {known}; give {known}, or nothing"
            )
    else:
        known = math.ceil(most / first.size) if num_fracs is None else num_fracs
        numbers = range(known)
    found: dict[int, _Shard] = {}
    for shard in shards:
        if (other := found.setdefault(shard.part.number, shard)) is not shard:
            raise UserError(
                f"{shard.folder}: is {shard.part.shown}, and so is {other.folder}; remove one of them"
            )
    if absent := [number for number in numbers if number not in found]:
        shown = dataclasses.replace(first, number=absent[0]).shown
        raise UserError(
            f"{folder}: {len(absent)} of {known} shards missing; run `tandem spin generate` with {shown}"
        )
    chosen = [found[number] for number in numbers]
    for shard in chosen:
        _check_files(shard.folder, shard.manifest)
    return chosen


def _alike(first: _Shard, other: _Shard) -> None:
    one, two = (shard.manifest["opponent"] for shard in (first, other))
    if one["digest"] != two["digest"]:
        part = "base" if one["base"] != two["base"] else "adapter"
        shown = [str(each[part] or "none")[:12] for each in (two, one)]
        raise UserError(
            f"{other.folder}: is of another opponent ({part} {shown[0]}) than {first.folder.name} ({shown[1]});"
            " generate it anew, or remove it"
        )
    differing = [
        name for name in ("opponent", *_SHARED) if first.manifest.get(name) != other.manifest.get(name)
    ]
    if (first.part.of, first.part.size) != (other.part.of, other.part.size):
        differing.append("part")
    if differing:
        name = differing[0]
        raise UserError(
            f"{other.folder}: its {name} ({_short(other.manifest[name])}) is not that of {first.folder.name}"
            f" ({_short(first.manifest[name])}); generate it anew, or remove it"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    for name, known in manifest["files"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != known:
            raise UserError(f"{folder / name}: is not what its {MANIFEST} says; generate it anew")


# --- pairs --------------------------------------------------------------------------------------------------


def _pairs(shards: Sequence[_Shard], split: str, opponent: str) -> Iterator[_Pair]:
    for shard in shards:
        yield from (pair for pair in _read(shard.folder / f"{split}.jsonl", opponent))


def _read(file: Path, opponent: str | None) -> Iterator[_Pair]:
    """The pairs of a file, of `opponent` or of whom each row says."""
    if not file.is_file() or not file.stat().st_size:
        return
    table = read_rows(
        str(file), columns=["real", "generated", "generated_finished"], optional=["real_finished", "opponent"]
    )
    for origin, row in table:
        generated = row["generated"][-1]["content"]
        yield _Pair(
            spin_row(row, origin),
            generated,
            row["generated_finished"] is not False,
            opponent or row["opponent"],
        )


def _earlier(folder: Path, now: dict[str, Any]) -> tuple[list[_Pair], dict[str, Any]]:
    """The training pairs of an earlier iteration's own opponent, and which it was."""
    path = folder / MANIFEST
    said: dict[str, Any] = read_json(path) if path.is_file() else {}
    if said.get("kind") != CONVERTED:
        raise UserError(
            f"--previous {folder}: no pairs of `tandem spin convert`; give the folder that it wrote"
        )
    if said["opponent"]["digest"] == now["opponent"]["digest"]:
        raise UserError(
            f"--previous {folder}: is of the same opponent ({now['opponent']['digest'][:12]}): it holds this very"
            " iteration's pairs, or training changed no weight since; give those of an earlier one, or leave it out"
        )
    if said["template"] != now["template"]:
        raise UserError(
            f"--previous {folder}: was generated with another chat template ({said['template'][:12]}, now"
            f" {now['template'][:12]}); leave it out"
        )
    _check_files(folder, said)
    opponent = said["opponent"]["digest"][:DIGITS]
    own = [pair for pair in _read(folder / "train.jsonl", None) if pair.opponent == opponent]
    about = {"opponent": said["opponent"], "files": sha256_text(*sorted(said["files"].values()))}
    return own, about
