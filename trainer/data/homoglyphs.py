"""Letters that look alike in Latin and Cyrillic: exchanging them, and finding them in an output.

The exchange is c and с, y and у, o and о, in both directions. `INSTRUCTION` is the one place that holds what
the model is asked.
"""

from __future__ import annotations

import itertools
from typing import Literal

from rapidfuzz.distance import Levenshtein

INSTRUCTION = "Repeat: {text}\n"

_LATIN, _CYRILLIC = "cyo", "суо"  # the second string is Cyrillic

SWAP: dict[str, str] = dict(zip(_LATIN + _CYRILLIC, _CYRILLIC + _LATIN, strict=True))
"""Lower-case letter -> its twin in the other script."""

SWAP_CAPITALS: dict[str, str] = SWAP | {a.upper(): b.upper() for a, b in SWAP.items()}
"""`SWAP` and the same for capitals."""

_SWAP_TABLE, _SWAP_CAPITALS_TABLE = str.maketrans(SWAP), str.maketrans(SWAP_CAPITALS)
_FOLD_TABLE = str.maketrans(_CYRILLIC + _CYRILLIC.upper(), _LATIN + _LATIN.upper())


def substitute(text: str, *, capitals: bool = False) -> str:
    """Exchange every c/с, y/у, o/о with its twin in the other script; applied twice it gives the text back.

    Capitals stay as they are unless `capitals`. The length never changes.
    """
    return text.translate(_SWAP_CAPITALS_TABLE if capitals else _SWAP_TABLE)


def is_swappable(char: str, capitals: bool = False) -> bool:
    """Whether `substitute` would change this character."""
    return char in (SWAP_CAPITALS if capitals else SWAP)


def is_substituted(before: str | None, after: str | None) -> bool:
    """Whether an aligned pair is a letter and its twin; capitals count, asked for or not."""
    return before is not None and SWAP_CAPITALS.get(before) == after


def fold(text: str) -> str:
    """Put both twins (capitals too) to the Latin one: texts then compare whatever was exchanged."""
    return text.translate(_FOLD_TABLE)


def align(source: str, output: str) -> list[tuple[str | None, str | None]]:
    """Pair the characters of two texts by Levenshtein distance over folded texts, so that twins count as
    equal.

    Returns (source character, output character) in reading order; None on the left is an inserted character,
    None on the right a lost one. Joining either side without its None gives that text back.
    """
    pairs: list[tuple[str | None, str | None]] = []
    for step in Levenshtein.opcodes(fold(source), fold(output)):
        left, right = source[step.src_start : step.src_end], output[step.dest_start : step.dest_end]
        pairs.extend(itertools.zip_longest(left, right))
    return pairs


def marked(source: str, output: str) -> list[tuple[str, Literal["swapped", "changed", ""]]]:
    """`output` in runs: letters exchanged for their twin (`swapped`), others not the source's (`changed`)."""
    pairs = [pair for pair in align(source, output) if pair[1] is not None]
    runs = itertools.groupby(pairs, key=lambda pair: _kind(*pair))
    return [("".join(after or "" for _, after in run), kind) for kind, run in runs]


def _kind(before: str | None, after: str | None) -> Literal["swapped", "changed", ""]:
    if is_substituted(before, after):
        return "swapped"
    return "" if before == after else "changed"


def language(text: str) -> Literal["ru", "en"]:
    """`ru` where Cyrillic letters are at least as many as Latin ones, `en` otherwise."""
    cyrillic = sum("Ѐ" <= char <= "ӿ" for char in text)
    latin = sum(char.isascii() and char.isalpha() for char in text)
    return "ru" if cyrillic >= latin else "en"


def mark(source: str, output: str, open: str = "**", close: str = "**") -> str:
    """`output` with each run of letters that were exchanged put between `open` and `close`."""
    runs = marked(source, output)
    return "".join(f"{open}{text}{close}" if kind == "swapped" else text for text, kind in runs)
