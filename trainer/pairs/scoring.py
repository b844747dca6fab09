"""Scores of answers by a judge's choices: the digits' expected value, what probability the digits had, and why not."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from trainer.judges import Choice, Judge, Question
from trainer.schema import UserError, failure

LOW = 0.5
"""Digits that hold less of the probability than this are not what the model would have said."""
_DECIMALS = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """The score that a question got, or why it got none; and how much probability the digits had, where known."""

    score: float | str
    mass: float | None


def marks(judge: Judge, questions: Sequence[Question], in_words: bool = False) -> dict[str, Mark]:
    """Each question's mark by its key. `in_words`: a digit that is said counts where no probabilities are given.

    A question that gets no answer is asked once more if the judge answers a plain one; without an answer to that,
    either, it has no score, so that one question never ends a run again and again.

    Raises:
        UserError: the judge is gone, or fails; the same questions may be asked later.
    """
    return {
        key: Mark(_score(choice, in_words), None if choice.mass is None else round(choice.mass, _DECIMALS))
        for key, choice in _choices(judge, questions).items()
    }


def told_of(masses: Iterable[float | None]) -> dict[str, Any] | None:
    """The digits' probability: in how many `questions` it is known, `mean`, `min`, the share `below_half`; or None."""
    known = [mass for mass in masses if mass is not None]
    if not known:
        return None
    return {
        "questions": len(known),
        "mean": statistics.fmean(known),
        "min": min(known),
        "below_half": statistics.fmean(mass < LOW for mass in known),
    }


def _choices(judge: Judge, questions: Sequence[Question]) -> dict[str, Choice]:
    found = _asked(judge, questions)
    for again in (True, False):
        left = [each for each in questions if not found[each.key].answered]
        if not left:
            break
        plain = Question("plain", left[0].choices[0], left[0].choices)
        if not _asked(judge, [plain])[plain.key].answered:
            first = found[left[0].key]
            raise UserError(f"question {first.key} got no answer ({first.said}); the same command asks again")
        if again:
            found |= _asked(judge, left)
    return found


def _asked(judge: Judge, questions: Sequence[Question]) -> dict[str, Choice]:
    """What the judge says to each question; whatever goes wrong in it is one line."""
    name = type(judge).__qualname__
    found = {each.key: Choice(each.key, None, f"{name} left it out", answered=False) for each in questions}
    try:
        found |= {each.key: each for some in judge.choose(questions) for each in some}
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}.choose: fails ({failure(error)}); what was scored before is kept") from error
    return found


def _score(choice: Choice, in_words: bool) -> float | str:
    """The digits' mean by their probabilities; or why there is none."""
    if choice.probabilities is not None:
        return math.fsum(share * digit for digit, share in enumerate(choice.probabilities, start=1))
    if choice.pick is None:
        return choice.said or "nothing was said"
    return float(choice.pick) if in_words else "no probabilities of the digits"
