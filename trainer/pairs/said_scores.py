"""Scores from 1 to 5 as they are written: digits, Russian and English words, "4/5", decimal commas."""

from __future__ import annotations

import re

LOWEST, HIGHEST = 1.0, 5.0


class NoEstimate(Exception):
    """Carries a reason of `estimates.REASONS` out of the reading."""


WORDS = {
    **dict.fromkeys(("один", "одна", "единица", "one"), "1"),
    **dict.fromkeys(("два", "две", "двойка", "two"), "2"),
    **dict.fromkeys(("три", "тройка", "three"), "3"),
    **dict.fromkeys(("четыре", "четвёрка", "четверка", "four"), "4"),
    **dict.fromkeys(("пять", "пятёрка", "пятерка", "five"), "5"),
}
DIGITS = r"[0-9]{1,9}(?:[.,][0-9]{1,9})?"
SAID = rf"(?:[-−]?{DIGITS}|{'|'.join(WORDS)})"
_SCALE = rf"(?:\s?/\s?|\s+(?:из|out\s+of|of)\s+)(?:{DIGITS}|пяти|десяти|five|ten)"
_UNIT = r"\s*(?:балл(?:а|ов|ы)?|points?)"
# No digit or letter goes on behind it, nor a percent sign, a range or half a point.
VALUE = (
    rf"(?P<said>{SAID})(?P<scale>{_SCALE})?(?P<unit>{_UNIT})?"
    r"(?![\w%+]|\s?[-–—/][0-9]|-\w|[.,][0-9]|\s+с\s+половиной|\s+and\s+a\s+half)"
)
MARKS = r"[\s*_`~\"'«»“”\[\]()<>]*"
_KIND = r"(?:(?:итоговая|средняя|общая|моя|final|overall|average|my)\s+)?"
_RANGE = r"(?:\s*\(?(?:от\s+|from\s+|по\s+шкале\s+от\s+)?1\s*(?:-|–|до|to)\s*5\)?)?"
LABEL = rf"{_KIND}(?:(?:само)?оценка(?:\s+ответа)?|балл|score|estimate|rating|grade){_RANGE}"
ALONE = re.compile(
    rf"{MARKS}(?:{LABEL}\s*[:=—–]\s*)?{VALUE}{MARKS}[.;!,]?{MARKS}(?:\([^()0-9]*\))?", re.IGNORECASE
)


def score_of(found: re.Match[str]) -> tuple[float, list[str]]:
    """The score of a match of `VALUE`, and what was mended."""
    said, scale = found["said"].lower(), found["scale"]
    repairs = ["number_word"] if said in WORDS else ["decimal_comma"] if "," in said else []
    if scale is not None:
        repairs.append("scale")
        whole = re.split(r"[/\s]+", scale.strip(" /"))[-1].lower()
        if whole not in ("5", "5.0", "5,0", "пяти", "five"):
            raise NoEstimate("other_scale")
    try:
        value = float(WORDS.get(said, said).replace(",", ".").replace("−", "-"))
    except ValueError:  # a letter that only looks like one of the word's, such as a dotless i
        raise NoEstimate("no_score") from None
    if not LOWEST <= value <= HIGHEST:
        raise NoEstimate("out_of_range")
    return value, repairs


def score_alone(text: str) -> tuple[float, list[str]]:
    """The score of a text that should hold nothing else."""
    found = ALONE.fullmatch(text.strip())
    if found is None:
        raise NoEstimate("several_scores" if len(re.findall(DIGITS, text)) > 1 else "no_score")
    return score_of(found)
