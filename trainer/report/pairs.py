"""What lies in preference pairs, before anything is trained on them: scores, margins, lengths, examples from both ends.

Of a folder that `tandem pairs` made, or of any file of preferences that `PreferenceFile` reads. Pairs are read in two
passes and never held: the first takes numbers, the second the texts of the examples that the numbers chose.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.files import read_rows
from trainer.data.preferences import PreferenceFile
from trainer.provenance import read_json
from trainer.report.texts import kept
from trainer.schema import Preference, Text, UserError

Summary = dict[str, Any]
Numbers = np.ndarray[Any, np.dtype[np.float64]]

PAIRS, CANDIDATES, MANIFEST, RESCORED = "pairs.jsonl", "candidates.jsonl", "manifest.json", "rescored"
EXAMPLES, BINS = 6, 40
_SCORES, _FINISHED = ("chosen_score", "rejected_score"), ("chosen_finished", "rejected_finished")
_PARTS = ("chosen_scores", "rejected_scores")
"""Scores by criterion, of self-judged pairs."""
# From so many values on a picture leaves out half a percent at each end: a few texts would press the others together.
_MANY = 200


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pair as it is shown; of both sides, where known: `scores`, `finished`, and scores by criterion (`parts`)."""

    prompt: Text
    chosen: Text
    rejected: Text
    scores: tuple[float, float] | None
    finished: tuple[bool, bool] | None
    parts: tuple[Any, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A file (or hub dataset) of pairs, with what its columns are called and where its prompts end."""

    path: str
    columns: dict[str, str] | None = None
    prompt_ends: str | None = None
    limit: int | None = None
    offline: bool = False

    def read(self, counts: dict[str, int]) -> Iterator[Pair]:
        """The pairs that training would read, in the file's order; the source's counts are added at the end."""
        beside_it = (*_SCORES, *_FINISHED, *_PARTS)
        source = PreferenceFile(
            self.path,
            columns={name: column for name, column in (self.columns or {}).items() if name not in beside_it},
            prompt_ends=self.prompt_ends,
            validation_fraction=0.0,
            empty="drop",
            limit=self.limit,
            offline=self.offline,
        )
        loaded, beside = source.stream("train"), self._beside()
        for record in loaded.records:
            assert isinstance(record, Preference)
            # Both come in the file's order, and the source leaves rows out.
            found = next((each[1:] for each in beside if each[0] == record.origin), (None, None, None))
            yield Pair(record.prompt, record.chosen, record.rejected, *found)
        counts |= {name: int(count) for name, count in loaded.counts.items()}

    def _beside(self) -> Iterator[tuple[str, Any, Any, Any]]:
        """Each row's origin, scores, whether the texts ended, scores by criterion; nothing without such columns."""
        names = {name: (self.columns or {}).get(name, name) for name in (*_SCORES, *_FINISHED, *_PARTS)}
        mapped = [names[name] for name in names if name in (self.columns or {})]
        rest = [column for column in names.values() if column not in mapped]
        table = read_rows(self.path, columns=mapped, optional=rest, offline=self.offline)
        for origin, row in table if table.columns else ():
            named = {name: row.get(column) for name, column in names.items()}
            yield origin, _two_scores(named, origin), _two(named, _FINISHED), _two(named, _PARTS)


def _two(row: Mapping[str, Any], names: tuple[str, str]) -> tuple[Any, Any] | None:
    values = row.get(names[0]), row.get(names[1])
    return None if None in values else values


def _two_scores(row: Mapping[str, Any], origin: str) -> tuple[float, float] | None:
    values = _two(row, _SCORES)
    if values is None:
        return None
    try:
        scores = float(values[0]), float(values[1])
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: holds the scores {values!r}; they should be numbers, or null") from error
    return scores if all(map(math.isfinite, scores)) else None


def pairs_of_folder(folder: str | Path) -> Summary:
    """The summary of a folder that `tandem pairs` made; also where no pair was kept.

    Raises `UserError` where it holds neither pairs nor a manifest, or one of them is broken.
    """
    folder = Path(folder)
    pairs, manifest = folder / PAIRS, folder / MANIFEST
    if not pairs.is_file() and not manifest.is_file():
        raise UserError(
            f"{folder}: holds no {PAIRS}; give a folder that `tandem pairs` merged, or a file of preferences"
        )
    made = read_json(manifest) if manifest.is_file() else {}
    if not isinstance(made, dict):
        raise UserError(f"{manifest}: is no manifest; run `tandem pairs merge`")
    there = pairs.is_file() and pairs.stat().st_size > 0
    found = _summary(folder.resolve().name, Pairs(str(pairs), offline=True) if there else None)
    counts = found["counts"] if there else {"kept": 0}
    return found | {
        "counts": made.get("counts") or counts,
        "candidates": _candidates(folder / CANDIDATES, found["histograms"]),
        **{key: made[key] for key in ("builder", "judging", "versions", "git", "seconds") if key in made},
        **({"rescored": rescored} if (rescored := _rescored(folder / RESCORED, made.get("files"))) else {}),
    }


def _rescored(folder: Path, files: Any) -> list[dict[str, Any]]:
    """What other judges said of the same answers (`tandem pairs rescore`); not what they said of others before."""
    found = [read_json(path) for path in sorted(folder.glob("*.json")) if path.is_file()]
    return [each for each in found if isinstance(each, dict) and each.get("files") == files]


def pairs_of_file(pairs: Pairs) -> Summary:
    """The summary of any file, or hub dataset, of preferences."""
    return _summary(Path(pairs.path).name, pairs)


def _summary(title: str, pairs: Pairs | None) -> Summary:
    """What the pairs' numbers say: keys pairs, counts, scores, margin, lengths, finished, histograms, examples.

    Scores and margins are of the pairs whose two scores are known, and None without any. Lengths are characters.
    """
    counts: dict[str, int] = {}
    table = _table(map(_numbers, pairs.read(counts)) if pairs else [], 6)
    scored = table[~np.isnan(table[:, 0])]
    margins, lengths, ended = scored[:, 0] - scored[:, 1], table[:, 2:4], table[~np.isnan(table[:, 4]), 4:]
    return {
        "kind": "pairs",
        "title": title,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "pairs": len(table),
        "counts": counts,
        "scores": {"chosen": _told(scored[:, 0]), "rejected": _told(scored[:, 1])} if len(scored) else None,
        "margin": _told(margins),
        "lengths": _lengths(lengths) if len(table) else None,
        "finished": dict(zip(("chosen", "rejected"), ended.mean(0).tolist(), strict=True))
        if len(ended)
        else None,
        "histograms": {
            "scores": histogram({"chosen": scored[:, 0], "rejected": scored[:, 1]}),
            "margins": histogram({"margin": margins}),
            "lengths": histogram({"chosen": lengths[:, 0], "rejected": lengths[:, 1]}),
        },
        "examples": _examples(pairs, table) if pairs else {},
    }


def _table(rows: Iterable[tuple[float, ...]], columns: int) -> Numbers:
    return np.fromiter(itertools.chain.from_iterable(rows), dtype=np.float64).reshape(-1, columns)


def _numbers(pair: Pair) -> tuple[float, ...]:
    """Scores, lengths and ends of the chosen and the rejected; NaN where they are not known."""
    unknown = (math.nan, math.nan)
    return (
        *(pair.scores or unknown),
        *map(_length, (pair.chosen, pair.rejected)),
        *(map(_yes, pair.finished) if pair.finished else unknown),
    )


def _yes(value: Any) -> float:
    """1 for yes, 0 for no; a CSV has words."""
    return float(value.strip().lower() in ("true", "1", "yes")) if isinstance(value, str) else float(value)


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)


def _told(values: Numbers) -> dict[str, float] | None:
    if not len(values):
        return None
    told = {"mean": values.mean(), "sd": values.std(), "median": np.median(values)}
    return {name: float(value) for name, value in told.items()}


def _lengths(lengths: Numbers) -> dict[str, Any]:
    chosen, rejected = lengths[:, 0], lengths[:, 1]
    longer, equal = float((chosen > rejected).mean()), float((chosen == rejected).mean())
    return {
        "chosen": _told(chosen),
        "rejected": _told(rejected),
        "chosen_longer": longer,
        "equally_long": equal,
    }


def histogram(series: Mapping[str, Numbers]) -> dict[str, Any] | None:
    """`edges`, and of each series the `counts` between them and its `total`; None without values.

    Of many values the outermost half percent at each end lies outside the edges; `outside` counts it.
    """
    values = np.concatenate(list(series.values()))
    if not len(values):
        return None
    ends = np.percentile(values, (0.5, 99.5)) if len(values) >= _MANY else (values.min(), values.max())
    low, high = (float(end) for end in ends)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, min(BINS, max(8, round(math.sqrt(len(values))))) + 1)
    counts = {name: np.histogram(each, edges)[0].tolist() for name, each in series.items()}
    return {
        "edges": edges.tolist(),
        "counts": counts,
        "total": {name: len(each) for name, each in series.items()},
        "outside": len(values) - sum(map(sum, counts.values())),
    }


def _examples(pairs: Pairs, table: Numbers) -> dict[str, list[dict[str, Any]]]:
    """Pairs from both ends of the margin and from its middle; without scores the first ones."""
    chosen = _chosen_places(table)
    wanted = {place for places in chosen.values() for place in places}
    found = {place: _example(pair) for place, pair in enumerate(pairs.read({})) if place in wanted}
    return {name: [found[place] for place in places] for name, places in chosen.items() if places}


def _chosen_places(table: Numbers) -> dict[str, list[int]]:
    scored = np.flatnonzero(~np.isnan(table[:, 0]))
    if not len(scored):
        return {"first": list(range(min(EXAMPLES, len(table))))}
    order = scored[np.argsort(table[scored, 0] - table[scored, 1], kind="stable")].tolist()
    widest, rest = order[: -EXAMPLES - 1 : -1], order[: max(0, len(order) - EXAMPLES)]
    narrowest, rest = rest[:EXAMPLES], rest[EXAMPLES:]
    middle = max(0, len(rest) // 2 - EXAMPLES // 4)
    return {"widest": widest, "middle": rest[middle : middle + EXAMPLES // 2], "narrowest": narrowest}


def _example(pair: Pair) -> dict[str, Any]:
    texts = {
        "prompt": kept(pair.prompt, tail=True),
        "chosen": kept(pair.chosen),
        "rejected": kept(pair.rejected),
    }
    beside = {_SCORES: pair.scores, _FINISHED: pair.finished}
    if pair.parts and all(isinstance(each, Mapping) for each in pair.parts):
        beside[_PARTS] = pair.parts
    return texts | {
        name: value
        for names, values in beside.items()
        for name, value in zip(names, values or (None, None), strict=True)
    }


def _candidates(path: Path, histograms: dict[str, Any]) -> dict[str, Any] | None:
    """All texts that the pairs were taken from; where they have scores, the scores' histogram shows them too."""
    if not path.is_file():
        return None
    numbers = ("score", "tokens", "finished")
    scores, tokens, ended = _table(
        (tuple(_or_nan(each.get(n)) for n in numbers) for each in _each(path)), 3
    ).T
    if not len(scores):
        return None
    known = ~np.isnan(scores)
    if known.any() and histograms["scores"] is not None:
        edges = np.array(histograms["scores"]["edges"])
        histograms["scores"]["counts"]["candidates"] = np.histogram(scores[known], edges)[0].tolist()
        histograms["scores"]["total"]["candidates"] = int(known.sum())
    ended = ended[~np.isnan(ended)]
    return {
        "texts": len(scores),
        "score": _told(scores[known]),
        "tokens": _told(tokens[~np.isnan(tokens)]),
        "finished": float(ended.mean()) if len(ended) else None,
        "score_with_length": _correlation(scores, tokens),
    }


def _each(path: Path) -> Iterable[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="surrogatepass") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield from json.loads(line)["candidates"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: is no row of candidates; run `tandem pairs merge`"
                ) from error


def _or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _correlation(scores: Numbers, tokens: Numbers) -> float | None:
    """Pearson's, of scores with lengths: far from zero, the best text is often just the longest or the shortest."""
    both = ~(np.isnan(scores) | np.isnan(tokens))
    if both.sum() < 3 or not scores[both].std() or not tokens[both].std():
        return None
    return float(np.corrcoef(scores[both], tokens[both])[0, 1])
