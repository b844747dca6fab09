"""What a list of prompts holds, as numbers: seen before anything is generated for it."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trainer.pairs.judging import LETTERS, script_share
from trainer.pairs.prompts import Prompts, PromptSource
from trainer.provenance import git_revision, versions

_ENDS, _OPENINGS, _BARS = 6, 12, 30
_QUANTILES = (("min", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def tell(source: PromptSource, found: Prompts) -> dict[str, Any]:
    """The prompts' counts, lengths in characters and words, scripts, forms, openings and examples, as plain JSON.

    `scripts`: prompts by the script that most of their letters are of. `alike`: how many are another one but for case,
    punctuation and blanks. `openings`: their most frequent first words. `examples`: the first ones (their order follows
    from content alone, so it is a random one), the shortest and the longest.
    """
    texts = [each.text for each in found.prompts]
    by_length = sorted(texts, key=lambda text: (len(text), text))
    return {
        "kind": "prompts",
        "source": source.describe(),
        "hashes": found.hashes,
        "counts": found.counts,
        "prompts": len(texts),
        "characters": _lengths([len(text) for text in texts]),
        "words": _lengths([len(text.split()) for text in texts]),
        "scripts": dict(Counter(map(_script, texts)).most_common()),
        "questions": _share(text.rstrip("»\")' ").endswith("?") for text in texts),
        "several_lines": _share("\n" in text.strip() for text in texts),
        "alike": len(texts) - len({_bare(text) for text in texts}),
        "openings": Counter(filter(None, map(_opening, texts))).most_common(_OPENINGS),
        "examples": {
            "some": texts[: 2 * _ENDS],
            "shortest": by_length[:_ENDS],
            "longest": by_length[-_ENDS:][::-1],
        },
        "versions": versions(),
        "git": git_revision(),
    }


def _lengths(values: Sequence[int]) -> dict[str, Any]:
    """Quantiles, mean, and a histogram up to the 99th of a hundred; `outside` are those beyond."""
    ordered = sorted(values)
    told: dict[str, Any] = {name: ordered[round(share * (len(ordered) - 1))] for name, share in _QUANTILES}
    width = max(1, -(-(told["p99"] + 1 - told["min"]) // _BARS))
    edges = list(range(told["min"], told["p99"] + width + 1, width))
    places = Counter((value - told["min"]) // width for value in values)
    counts = [places[place] for place in range(len(edges) - 1)]
    outside = len(values) - sum(counts)
    return told | {"mean": statistics.fmean(values), "edges": edges, "counts": counts, "outside": outside}


def _script(text: str) -> str:
    """The script of most of a text's letters."""
    shares = {name: script_share(text, language) for language, name in LETTERS.items()}
    if None in shares.values():
        return "no letters"
    return next((name.capitalize() for name, share in shares.items() if (share or 0.0) > 0.5), "other")


def _share(found: Any) -> float:
    return statistics.fmean(map(float, found))


def _bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _opening(text: str) -> str:
    """The first word, without regard to case."""
    return next(iter(re.findall(r"\w+", text.casefold())), "")
