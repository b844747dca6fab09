"""A look at what a source gives, before anything is trained: counts, lengths, letters, examples."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.data.homoglyphs import is_swappable, mark
from trainer.data.sources import Loaded, Source, streamed
from trainer.schema import Demonstration, Preference, Split, Text, UserError

_LINE = 100
_QUANTILES = (("min", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def summarize_source(
    source: Source,
    *,
    splits: Sequence[Split] = ("train", "validation"),
    capitals: bool = False,
    examples: int = 3,
) -> dict[str, Any]:
    """What each split of a source holds, as plain JSON.

    For each split: `counts`, `hashes`, `lengths` (characters: min, median, p90, p99, max), `letters`
    (shares of the completions' characters that are Latin, Cyrillic, exchangeable) and `examples`.
    A split that the source does not have holds `missing`, the reason.
    """
    found: dict[str, Any] = {}
    for split in splits:
        try:
            loaded = streamed(source, split)
            found[split] = summarize_records(loaded, capitals=capitals, examples=examples)
        except UserError as error:
            if split == splits[0]:
                raise
            found[split] = {"missing": str(error)}
    return {"source": type(source).__name__, "prompt_template": source.prompt_template, "splits": found}


def summarize_records(loaded: Loaded, *, capitals: bool = False, examples: int = 3) -> dict[str, Any]:
    """`summarize_source` for one split that is loaded; its records are read once, and none is kept."""
    sizes: dict[str, array[int]] = {}
    letters, kind = _Letters(capitals), None
    shown: list[dict[str, Any]] = []
    for record in loaded.records:
        fields = dict(_fields(record))
        for name, value in fields.items():
            sizes.setdefault(name, array("L")).append(len(_words(value)))
        letters.add(_words(fields["completion" if "completion" in fields else "rejected"]))
        kind = kind or type(record).__name__.lower()
        if len(shown) < examples:
            shown.append(fields | {"origin": record.origin})
    return {
        "kind": kind,
        "counts": dict(loaded.counts),
        "hashes": loaded.hashes,
        "lengths": {name: _quantiles(found) for name, found in sizes.items()},
        "letters": letters.shares(),
        "examples": shown,
    }


def render_summary(summary: dict[str, Any]) -> str:
    """`summarize_source` as lines for a terminal; exchanged letters of the chosen are marked **so**."""
    lines = [summary["source"]]
    if summary["prompt_template"] is not None:
        lines.append(f"  prompt      {summary['prompt_template']!r}")
    for split, part in summary["splits"].items():
        lines += ["", split]
        if "missing" in part:
            lines.append(f"  none: {part['missing']}")
            continue
        lines += _render_part(part)
    return "\n".join(lines)


def _render_part(part: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{name} {count}" for name, count in part["counts"].items() if count or name == "kept")
    lines = [f"  counts      {counts}"]
    for name, lengths in part["lengths"].items():
        lines.append(
            f"  {name:<11} characters: " + ", ".join(f"{key} {value}" for key, value in lengths.items())
        )
    lines.append(
        "  letters     " + ", ".join(f"{name} {share:.1%}" for name, share in part["letters"].items())
    )
    for path, digest in part["hashes"].items():
        lines.append(f"  read        {path} ({digest[:12]})")
    for example in part["examples"]:
        lines.append(f"  example     {example['origin']}")
        shown = {name: _plain(value) for name, value in example.items() if name != "origin"}
        if "chosen" in shown:
            shown["chosen"] = mark(shown["rejected"], shown["chosen"])
        lines += [f"    {name:<11} {_cut(text)}" for name, text in shown.items()]
    return lines


def _fields(record: Demonstration | Preference) -> Iterable[tuple[str, Text]]:
    names = ("prompt", "chosen", "rejected") if isinstance(record, Preference) else ("prompt", "completion")
    return [(name, getattr(record, name)) for name in names]


def _words(value: Text) -> str:
    return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)


def _plain(value: Text) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(f"[{turn['role']}] {turn['content']}" for turn in value)


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in _QUANTILES}


class _Letters:
    """Shares of all characters of many texts, and the mean share of exchangeable letters of a text."""

    def __init__(self, capitals: bool) -> None:
        self._capitals, self._total, self._per_text = capitals, 0, array("d")
        self._found = {"latin": 0, "cyrillic": 0, "exchangeable": 0}

    def add(self, text: str) -> None:
        if not text:
            return
        exchangeable = sum(is_swappable(char, self._capitals) for char in text)
        self._found["latin"] += sum(char.isascii() and char.isalpha() for char in text)
        self._found["cyrillic"] += sum("\u0400" <= char <= "\u04ff" for char in text)
        self._found["exchangeable"] += exchangeable
        self._total += len(text)
        self._per_text.append(exchangeable / len(text))

    def shares(self) -> dict[str, float]:
        if not self._total:
            return {}
        shares = {name: count / self._total for name, count in self._found.items()}
        return shares | {"exchangeable in a median text": statistics.median(self._per_text)}


def _cut(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= _LINE else line[: _LINE - 3] + "..."
