"""What a model said where it was asked for an answer and a score of it: read, mended where the intent is plain, or not.

Two forms are asked for: `plain` ("answer, score") and `json` (`{"answer": ..., "estimate": ...}`). What is read stands
in the text as it is (JSON's escapes undone); where two readings are possible there is none.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from trainer.pairs.said_scores import ALONE, LABEL, MARKS, SAID, VALUE, NoEstimate, score_alone, score_of

Form = Literal["plain", "json"]
_ROUNDED = 0.5
"""So far a score of the whole may be from the mean of those by criterion."""


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """An answer and its score from 1 to 5; or a score for each criterion, in their order, where it gave those instead.

    `repairs` names what was otherwise than asked for.
    """

    answer: str
    scores: tuple[float, ...]
    repairs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """Why there is no estimate: one of `REASONS`."""

    reason: str


REASONS = {
    "empty": "nothing was said",
    "no_answer": "a score, and no answer in words",
    "no_score": "no score where it should stand",
    "score_in_the_middle": "a score with more of the answer behind it",
    "several_scores": "more than one score, or numbers that may be the answer's own",
    "several_objects": "more than one JSON object",
    "missing_criteria": "scores for some of the criteria only",
    "out_of_range": "a score outside 1 to 5",
    "other_scale": "a score of another scale",
    "malformed": "JSON that cannot be mended",
    "cut": "cut off before it was whole",
    "broken_text": "an answer with half a character in it",
}


def read_estimate(
    said: str, form: Form, criteria: Sequence[str] = (), finished: bool = True
) -> Estimate | Unreadable:
    """What a text says in one of the forms; never an error, whatever the text is.

    Args:
        criteria: their names; a text that scores each of them instead of the whole is read, too.
        finished: the model ended it; a number at the end of a text that was cut may have had more digits.
    """
    try:
        found = _read(said, form, criteria, finished)
    except NoEstimate as why:
        return Unreadable(str(why))
    if any("\ud800" <= char <= "\udfff" for char in found.answer):
        return Unreadable("broken_text")
    return found


def _read(said: str, form: Form, criteria: Sequence[str], finished: bool) -> Estimate:
    text = said.strip()
    if not text:
        raise NoEstimate("empty")
    found = _Objects(text, criteria, finished).read()
    repairs = ["code_fence"] if "```" in text and (found or text.startswith("```")) else []
    if found is not None:
        repairs += ["other_form"] if form == "plain" else []
    else:
        if not finished:
            raise NoEstimate("cut")
        fenced = _FENCED.fullmatch(text)
        found = _plain(fenced[1].strip() if fenced else text, criteria, labelled=form == "json")
        repairs += ["other_form"] if form == "json" else []
    return dataclasses.replace(found, repairs=(*repairs, *found.repairs))


# --- JSON ---------------------------------------------------------------------------------------------------

_ANSWER_KEYS, _SCORE_KEYS = ("answer", "ответ"), ("estimate", "estimation", "score", "rating", "оценка")
_QUOTE, _OPEN, _CLOSE = r"[\"'“”«»]?", r"[\"'“”«„]", r"[\"'“”»]"
_ANSWER_KEY = rf"{_QUOTE}(?:{'|'.join(_ANSWER_KEYS)}){_QUOTE}\s*+[:=]\s*+"
_SCORE_KEY = rf"{_QUOTE}(?:{'|'.join(_SCORE_KEYS)}){_QUOTE}\s*+[:=]\s*+"
_BEGINS = re.compile(rf"\{{\s*(?:{_ANSWER_KEY}|{_SCORE_KEY})", re.IGNORECASE)
_RAW_SCORE = r"(?P<score>\"[^\"\n]*\"|'[^'\n]*'|[^\"'{}\n]*?)"
_FLAGS = re.DOTALL | re.IGNORECASE
_ANSWER_FIRST = re.compile(
    rf"\{{\s*{_ANSWER_KEY}{_OPEN}(?P<answer>.*?)(?<!\\){_CLOSE}\s*+,?\s*+{_SCORE_KEY}{_RAW_SCORE}"
    r"(?P<end>\s*+,?\s*+(?:\}|```|\Z)|[^\S\n]*+,?[^\S\n]*+\n|,\s*+(?=[\"']))",
    _FLAGS,
)
_SCORE_FIRST = re.compile(
    rf"\{{\s*{_SCORE_KEY}{_RAW_SCORE}\s*+,?\s*+{_ANSWER_KEY}{_OPEN}(?P<answer>.*?)(?<!\\){_CLOSE}"
    r"(?P<end>\s*+,?\s*+(?:\}|```|\Z))",
    _FLAGS,
)
# An answer in pieces, or with more quotes around it than one.
_DEBRIS, _BARE_QUOTE = re.compile(r'"\s*+[,+]\s*+"|\A""|""\Z'), re.compile(r'(?<!\\)"')
_FURTHER_KEY = re.compile(rf"[\"'](?:{'|'.join((*_ANSWER_KEYS, *_SCORE_KEYS))})[\"']\s*:", _FLAGS)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|[\"'\\/bfnrt])")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class _Number(str):
    """A JSON number as it is written."""


class _Members(list[Any]):
    """A JSON object's members, also those of one name."""

    def of(self, *names: str) -> list[Any]:
        wanted = {name.casefold() for name in names}
        return [value for name, value in self if name.strip().casefold() in wanted]


_DECODER = json.JSONDecoder(
    object_pairs_hook=_Members, parse_float=_Number, parse_int=_Number, parse_constant=_Number, strict=False
)


class _Objects:
    """Looks for the JSON object that was asked for, whatever stands around it."""

    def __init__(self, text: str, criteria: Sequence[str], finished: bool) -> None:
        self.text, self.criteria, self.finished = text, criteria, finished

    def read(self) -> Estimate | None:
        """None where there is no such object."""
        found, ends, place = [], [0], 0
        while (place := self.text.find("{", place)) >= 0:
            value, end = self._decoded(place)
            if isinstance(value, _Members) and (value.of(*_ANSWER_KEYS) or value.of(*_SCORE_KEYS)):
                found.append(value)
                ends.append(end)
                place = end
            elif value is None and _BEGINS.match(self.text, place):
                return self._mended(place, first=not found)
            else:
                place += 1
        if not found:
            return None
        estimate = self._of(_one_of(found))
        around = (self.text[: self.text.find("{")] + self.text[ends[-1] :]).strip(" \n\t`")
        words = ["words_around"] if re.sub(r"^json\b", "", around).strip() else []
        return dataclasses.replace(estimate, repairs=(*words, *estimate.repairs))

    def _decoded(self, place: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(self.text, place)
        except (ValueError, RecursionError):
            return None, place

    def _of(self, members: _Members) -> Estimate:
        answers, scores = members.of(*_ANSWER_KEYS), members.of(*_SCORE_KEYS)
        if len(answers) > 1 or len(scores) > 1:
            raise NoEstimate("several_scores" if len(scores) > 1 else "several_objects")
        if not answers or not isinstance(answers[0], str) or not _says(answers[0]):
            raise NoEstimate("no_answer")
        values, repairs = self._scores(scores[0]) if scores else self._by_criterion(members)
        if scores and all(members.of(name) for name in self.criteria) and self.criteria:
            each, mended = self._by_criterion(members)
            if abs(sum(values) / len(values) - sum(each) / len(each)) > _ROUNDED:
                raise NoEstimate("several_scores")
            repairs += mended
        return Estimate(answers[0].strip(), values, tuple(dict.fromkeys(repairs)))

    def _scores(self, value: Any) -> tuple[tuple[float, ...], list[str]]:
        if isinstance(value, _Members):
            return self._by_criterion(value)
        if isinstance(value, list):
            if len(value) != 1 and (len(value) != len(self.criteria) or not value):
                raise NoEstimate("several_scores" if value else "no_score")
            each = [self._scores(item) for item in value]
            if any(len(scores) != 1 for scores, _ in each):
                raise NoEstimate("several_scores")
            return tuple(scores[0] for scores, _ in each), ["list", *(r for _, rs in each for r in rs)]
        if not isinstance(value, str):
            raise NoEstimate("no_score")
        score, repairs = score_alone(value)
        return (score,), repairs + ([] if isinstance(value, _Number) else ["quoted"])

    def _by_criterion(self, members: _Members) -> tuple[tuple[float, ...], list[str]]:
        given = [members.of(name) for name in self.criteria]
        if not any(given):
            raise NoEstimate("no_score")
        if any(len(each) != 1 for each in given):
            raise NoEstimate("missing_criteria")
        each = [self._scores(values[0]) for values in given]
        if any(len(scores) != 1 for scores, _ in each):
            raise NoEstimate("several_scores")
        return tuple(scores[0] for scores, _ in each), ["criteria", *(r for _, rs in each for r in rs)]

    def _mended(self, place: int, first: bool) -> Estimate:
        """Of an object that is no JSON: both members are whole, and there is one way to part them."""
        found = _ANSWER_FIRST.match(self.text, place) or _SCORE_FIRST.match(self.text, place)
        if found is None:
            raise NoEstimate("malformed" if self.finished and "}" in self.text[place:] else "cut")
        if not first or _FURTHER_KEY.search(self.text, found.end()) or _FURTHER_KEY.search(found["answer"]):
            raise NoEstimate("several_objects")
        closed = found["end"].strip(" \t") or found["score"].endswith(("'", '"'))
        if not closed and not self.finished:
            raise NoEstimate("cut")
        if _DEBRIS.search(found["answer"]) or len(_BARE_QUOTE.findall(found["answer"])) % 2:
            raise NoEstimate("malformed")
        score, repairs = score_alone(found["score"])
        answer = _unescaped(found["answer"]).strip()
        if not _says(answer):
            raise NoEstimate("no_answer")
        whole = "}" in self.text[max(found.end("answer"), found.end("score")) :]
        return Estimate(answer, (score,), ("mended_json", *([] if whole else ["cut"]), *repairs))


def _one_of(found: list[_Members]) -> _Members:
    """The one object; the same one twice, or an answer and a score that stand in an object each, are one, too."""
    if all(each == found[0] for each in found):
        return found[0]
    answers = [each for each in found if each.of(*_ANSWER_KEYS)]
    scores = [each for each in found if each.of(*_SCORE_KEYS)]
    if len(found) == 2 and len(answers) == len(scores) == 1 and answers[0] is found[0]:
        return _Members([*answers[0], *scores[0]])
    raise NoEstimate("several_objects")


def _unescaped(text: str) -> str:
    """JSON's escapes undone; what is none of them (as in LaTeX) stays."""

    def plain(found: re.Match[str]) -> str:
        code = found[1]
        return chr(int(code[1:], 16)) if code[0] == "u" and len(code) > 1 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(plain, text).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _says(answer: str) -> bool:
    return any(char.isalnum() for char in answer)


# --- plain --------------------------------------------------------------------------------------------------

_LABELLED = re.compile(
    rf"(?P<before>^[\s>#*_`-]*+|[,;.!?…|(—–][ \t*_`]*+){LABEL}[*_`]*+(?:\s*+[:=—–-]|\s)[\s*_`]*+{VALUE}",
    re.IGNORECASE | re.MULTILINE,
)
_AT_THE_END = re.compile(
    rf"(?<!\s)(?P<before>\s*+[,;|]\s*+|(?<=[.!?…»”\"*_`)])\s++|[^\S\n]*+\n\s*+|\s++[—–-]\s++|\s*+\()[*_`\"'«“\[]*+"
    rf"{VALUE}{MARKS}+[.;!]?{MARKS}+\Z",
    re.IGNORECASE,
)
_FENCED = re.compile(r"```[\w-]*\n((?:(?!```).)*)```", re.DOTALL)
_IN_THE_MIDDLE = re.compile(rf"[,;]\s*[*_`]*{VALUE}", re.IGNORECASE)
_ANSWER_LABEL = re.compile(r"[\s*_`#>]*(?:ответ|answer)[*_`]*\s*:[\s*_`]*", re.IGNORECASE)
_COMMENT = re.compile(
    r"[\s*_`.,;:!—–-]*(?:\([^()]*\)[\s.]*\Z|\Z|(?:по|объ)яснени|комментари|обосновани|потому что|так как|поскольку"
    r"|надеюсь|(?:мой |данный |этот )?ответ\b|explanation|justification|reason|because|comment|note\b|i hope|hope"
    r"|let me know|(?:the|this|my) answer\b)",
    re.IGNORECASE,
)
_OTHER_NUMBER = re.compile(rf"(?:[,;:|]\s*|\n\s*|\s(?:и|and)\s+)(?:{SAID})\Z", re.IGNORECASE)


def _plain(text: str, criteria: Sequence[str], labelled: bool) -> Estimate:
    """An answer and the score behind it; `labelled`: only a score that is called one."""
    marks = list(_LABELLED.finditer(text))
    if len(marks) > 1:
        raise NoEstimate("several_scores")
    by_criterion = _criteria(text[: marks[0].start()] if marks else text, criteria)
    if by_criterion is not None:
        return _also_whole(by_criterion, text, marks[0]) if marks else by_criterion
    if marks:
        return _by_label(text, marks[0])
    found = None if labelled else _AT_THE_END.search(text)
    if found is None:
        if ALONE.fullmatch(text):
            raise NoEstimate("no_answer")
        raise NoEstimate("score_in_the_middle" if _IN_THE_MIDDLE.search(text) else "no_score")
    return _by_place(text, found)


def _by_label(text: str, found: re.Match[str]) -> Estimate:
    """`Ответ ... Оценка: 4`: behind it no more than a comment may stand; or `Оценка: 4`, then `Ответ: ...`."""
    score, repairs = score_of(found)
    # A sentence's own mark before the label stays with the answer.
    kept = found.start() + (found["before"][:1] in tuple(".!?…"))
    before, rest = text[:kept].rstrip(), text[found.end() :]
    closing = rest.lstrip(" \n\t*_`.,;")
    if not before.strip() and (opening := _ANSWER_LABEL.match(closing)):
        return _made(closing[opening.end() :], score, ["score_first", *repairs])
    if rest[:1] == ")" and found["before"][:1] == "(":
        rest = rest[1:]
    if not _COMMENT.match(rest):
        raise NoEstimate("score_in_the_middle")
    return _made(before, score, ["label", *(["words_around"] if _says(rest) else []), *repairs])


def _also_whole(by_criterion: Estimate, text: str, found: re.Match[str]) -> Estimate:
    """A score of the whole behind those by criterion: it was asked for, and stands if it is their mean, rounded."""
    score, repairs = score_of(found)
    off = abs(score - sum(by_criterion.scores) / len(by_criterion.scores))
    if off > _ROUNDED or not _COMMENT.match(text[found.end() :]):
        raise NoEstimate("several_scores")
    return Estimate(by_criterion.answer, (score,), ("label", *by_criterion.repairs, *repairs))


def _by_place(text: str, found: re.Match[str]) -> Estimate:
    """`answer, score`: the number is the score, unless it may as well be the answer's own."""
    before, kind, scaled = text[: found.start()], found["before"], found["scale"] or found["unit"]
    score, repairs = score_of(found)
    if kind.strip() in ("—", "–", "-", "(") and not scaled:
        raise NoEstimate("no_score")
    digits, opening = before[-1:].isdigit(), _ANSWER_LABEL.match(before)
    own = before[opening.end() :] if opening else before
    if (kind == "," and digits) or (not scaled and _OTHER_NUMBER.search(own)):
        raise NoEstimate("several_scores")
    if not scaled and re.search(rf"(?:^|\s)[*_]*{int(score) - 1}[.)][*_]*\s", before):
        # The marker of a list's next item looks like that, too.
        raise NoEstimate("several_scores")
    return _made(before, score, repairs)


def _made(answer: str, score: float, repairs: Sequence[str]) -> Estimate:
    opening = _ANSWER_LABEL.match(answer)
    answer = (answer[opening.end() :] if opening else answer).strip()
    if not _says(answer):
        raise NoEstimate("no_answer")
    return Estimate(answer, (score,), tuple(dict.fromkeys([*(["label"] if opening else []), *repairs])))


def _criteria(text: str, criteria: Sequence[str]) -> Estimate | None:
    """An answer with a score for each criterion behind it; None where none of them has one."""
    patterns = [rf"(?:^|[\s,;|(*_-]){re.escape(name)}[\s*_|:=—–-]{{1,8}}{VALUE}" for name in criteria]
    found = [list(re.finditer(pattern, text, re.IGNORECASE)) for pattern in patterns]
    if not any(found):
        return None
    if any(len(each) != 1 for each in found):
        raise NoEstimate("missing_criteria" if any(not each for each in found) else "several_scores")
    ends = [each[0] for each in found]
    if not _COMMENT.match(text[max(each.end() for each in ends) :].lstrip(" \n|)")):
        raise NoEstimate("score_in_the_middle")
    scores = [score_of(each) for each in ends]
    made = _made(text[: min(each.start() for each in ends)].rstrip(" \n|(*-_"), 1.0, [])
    repairs = dict.fromkeys(["criteria", *made.repairs, *(repair for _, some in scores for repair in some)])
    return Estimate(made.answer, tuple(score for score, _ in scores), tuple(repairs))
