"""Texts of users, models and judges, made fit to be shown: nothing in them breaks a page or file; long ones are cut."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

LONG = 420
KEPT = 2000
"""Characters of a text that stand on the page at once, and that a report keeps at all."""

_MINUS = "−"
# Control characters as their pictures; halves of surrogate pairs, which UTF-8 cannot hold, and characters that turn the
# writing direction, also of what stands beside them, as the replacement mark.
_SHOWN_AS = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
    | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
)
# More marks than four on one letter leave its line, and lie over what others wrote.
_MANY_MARKS = re.compile(
    "([\u0300-\u036f\u0483-\u0489\u20d0-\u20ff]{4})[\u0300-\u036f\u0483-\u0489\u20d0-\u20ff]+"
)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A text as a page places it: what is seen at once; `rest` unfolds, after it or (with `tail`) before it."""

    text: str
    rest: str = ""
    tail: bool = False


def readable(value: Any) -> str:
    """A text, or the turns of a chat, without what a page or a UTF-8 file cannot hold."""
    text = value if isinstance(value, str) else _turns(value)
    return _MANY_MARKS.sub(r"\1", text.replace("\r\n", "\n").translate(_SHOWN_AS))


def kept(value: Any, tail: bool = False) -> str:
    """`readable`, cut to what a report keeps: it shows examples, and is no copy of the data. `tail`: keep the end."""
    text = readable(value)
    if len(text) <= KEPT:
        return text
    more = f"({len(text) - KEPT:,} more characters)"
    return f"{more} … {text[-KEPT:]}" if tail else f"{text[:KEPT]} … {more}"


def shown(value: Any, long: int = LONG, tail: bool = False) -> Shown:
    """A text in two parts where it is long; with `tail` its end is seen at once, as of a prompt."""
    text = re.sub(r"\n{3,}", "\n\n", readable(value).strip())
    if len(text) <= long * 1.25:
        return Shown(text)
    place = _break(text, len(text) - long if tail else long)
    return Shown(text[place:], text[:place], True) if tail else Shown(text[:place], text[place:])


def _break(text: str, place: int) -> int:
    """A place near the given one, behind a space if there is one."""
    found = text.rfind(" ", max(0, place - 60), place)
    return found + 1 if found > 0 else place


def _turns(value: Any) -> str:
    if isinstance(value, Sequence) and all(isinstance(turn, Mapping) for turn in value):
        return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value)
    return "" if value is None else str(value)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """1.5 as `1.50`, with a real minus; a dash where there is no value."""
    if value is None:
        return "–"
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not any(char in "123456789" for char in text):
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def between(interval: Sequence[float | None] | None, digits: int = 2) -> str:
    """`1.20 to 1.43`; empty without an interval."""
    if not interval or len(interval) != 2 or None in interval:
        return ""
    return f"{number(interval[0], digits)} to {number(interval[1], digits)}"


def facts(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (`sampling temperature`, `1.0`) pairs; what is unset or off is left out."""
    if not isinstance(settings, Mapping):
        settings = {"": settings}
    rows = []
    for key, value in settings.items():
        name = f"{prefix} {str(key).replace('_', ' ')}".strip()
        if isinstance(value, Mapping):
            rows += facts(value, name)
        elif value not in (None, "", [], {}):
            told = ", ".join(map(_told, value)) if isinstance(value, list | tuple) else _told(value)
            rows.append((readable(name), readable(told[:300])))
    return rows


def _told(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
