"""Two answers to each question before a judge, in both orders: what it said, kept as it comes."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from trainer.evaluation.win_rate_answers import name_of
from trainer.judges import Choice, Judge, JudgeGone, Question
from trainer.ledger import Ledger
from trainer.provenance import sha256_text
from trainer.schema import UserError, failure

CHOICES = ("A", "B", "C")
"""The first answer is better, the second, or neither."""

Outcome = Literal["win", "loss", "tie", "invalid"]
_PLACE = re.compile(r"\{(question|first|second)\}")
_EMPTY = "(nothing)"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A question, the trained model's own answer, and the other's; `key` names the question."""

    key: str
    question: str
    own: str
    other: str
    against: str

    def asked(self, own_first: bool) -> tuple[str, str]:
        """The answers as the judge is shown them: first and second."""
        return (self.own, self.other) if own_first else (self.other, self.own)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What both orders say together. `picks`: A, B, C or None, the own answer standing first, then second.

    `answered` is false where the judge gave no answer to one of them; `identical` where the two answers are the same
    text, which is a tie that nobody was asked about.
    """

    comparison: Comparison
    picks: tuple[str | None, str | None]
    answered: bool = True
    identical: bool = False

    @property
    def orders(self) -> tuple[Outcome, Outcome]:
        """What each order says for the own answer."""
        return _outcome(self.picks[0], "A"), _outcome(self.picks[1], "B")

    @property
    def outcome(self) -> Outcome:
        """A win (or a loss) only where both orders say so, invalid where one of them is; else a tie."""
        if "invalid" in self.orders:
            return "invalid"
        return self.orders[0] if self.orders[0] == self.orders[1] else "tie"


def judged(
    comparisons: Sequence[Comparison],
    judge: Judge,
    prompt: str,
    folder: str | Path,
    *,
    progress: bool = False,
) -> tuple[list[Verdict], Path, str | None]:
    """The verdict of each comparison; where they are kept; and why the judge stopped before all, if it did.

    Args:
        prompt: what the judge is asked, with {question}, {first} and {second} where the texts belong.
        folder: verdicts of each judge and prompt lie in a folder of their own in it; no question is asked again.

    Raises:
        UserError: a prompt without its places, or a judge that cannot be asked at all.
    """
    check_prompt(prompt)
    settings = {"judge": _described(judge), "prompt": prompt}
    place = Path(folder) / name_of(settings)
    asked = {
        _key(each, order): (each, order)
        for each in comparisons
        if each.own != each.other
        for order in (True, False)
    }
    with Ledger(place, settings) as ledger:
        gone = _ask(judge, prompt, asked, ledger, progress)
        return [_verdict(each, ledger) for each in comparisons], place, gone


def check_prompt(prompt: str, name: str = "prompt") -> None:
    """Refuse a judge's prompt that does not hold the question and both answers."""
    places = set(_PLACE.findall(prompt))
    if absent := [f"{{{each}}}" for each in ("question", "first", "second") if each not in places]:
        raise UserError(f"{name}: does not hold {', '.join(absent)}; the texts have to stand somewhere")


def filled(prompt: str, question: str, first: str, second: str) -> str:
    """The prompt with the texts in their places; what looks like a place in a text stays as it is."""
    texts = _texts(prompt, question, first, second)
    return _PLACE.sub(lambda found: texts[found[1]], prompt)


def _texts(prompt: str, question: str, first: str, second: str) -> dict[str, str]:
    """The texts as they are shown: a line that poses as one of the prompt's own is quoted."""
    own = {line.strip() for line in _PLACE.sub("\n", prompt).splitlines()} - {""}

    def quoted(text: str) -> str:
        return "\n".join(f"> {line}" if line.strip() in own else line for line in text.split("\n"))

    shown = {"question": question, "first": first.strip() or _EMPTY, "second": second.strip() or _EMPTY}
    return {name: quoted(text) for name, text in shown.items()}


def _ask(
    judge: Judge, prompt: str, asked: dict[str, tuple[Comparison, bool]], ledger: Ledger, progress: bool
) -> str | None:
    missing = ledger.missing(asked)
    questions = []
    for key in missing:
        comparison, order = asked[key]
        shown = (comparison.question, *comparison.asked(order))
        judged = tuple(_texts(prompt, *shown).values())
        questions.append(Question(key, filled(prompt, *shown), CHOICES, judged))
    if not questions:
        return None
    terminal = sys.stderr.isatty()
    with tqdm(
        total=len(asked), initial=len(asked) - len(missing), desc="judging", unit="question",
        disable=not progress, mininterval=0.2 if terminal else 10.0,
    ) as bar:  # fmt: skip
        try:
            for choices in _choices(judge, questions):
                # What got no answer is asked again by the next run.
                ledger.add(_rows([choice for choice in choices if choice.answered], asked))
                bar.update(len(choices))
        except JudgeGone as error:
            return str(error)
        except KeyboardInterrupt as stop:
            kept = f"{len(ledger.rows):,} verdicts are kept in {ledger.folder}; the same command goes on"
            raise KeyboardInterrupt(kept) from stop
    return None


def _choices(judge: Judge, questions: Sequence[Question]) -> Iterator[list[Choice]]:
    """What the judge says. Whatever goes wrong in it is a `UserError`: what it said before is kept."""
    name, asked, said = type(judge).__qualname__, {question.key for question in questions}, 0
    try:
        for choices in judge.choose(questions):
            if strange := next((each.key for each in choices if each.key not in asked), None):
                raise UserError(f"{name}: answers the question {strange!r}, which it was not asked")
            json.dumps([each.probabilities for each in choices], allow_nan=False)
            said += len(choices)
            yield choices
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: fails after {said:,} answers, which are kept ({failure(error)})") from error


def _described(judge: Judge) -> dict[str, Any]:
    try:
        found = judge.describe()
        json.dumps(found)
    except UserError:
        raise
    except Exception as error:
        name = type(judge).__qualname__
        raise UserError(f"{name}.describe: fails ({failure(error)}); it should give plain JSON") from error
    return found


def _rows(choices: Sequence[Choice], asked: dict[str, tuple[Comparison, bool]]) -> Iterator[dict[str, Any]]:
    for choice in choices:
        comparison, order = asked[choice.key]
        first, second = comparison.asked(order)
        yield {
            "key": choice.key,
            "question": comparison.question,
            "first": first,
            "second": second,
            # A pick that was not to be had is none.
            "pick": choice.pick if choice.pick in CHOICES else None,
            "said": choice.said,
            "probabilities": list(choice.probabilities) if choice.probabilities else None,
        }


def _verdict(comparison: Comparison, ledger: Ledger) -> Verdict:
    if comparison.own == comparison.other:
        return Verdict(comparison, ("C", "C"), identical=True)
    rows = [ledger.rows.get(_key(comparison, order)) for order in (True, False)]
    first, second = (row["pick"] if row else None for row in rows)
    return Verdict(comparison, (first, second), answered=None not in rows)


def _key(comparison: Comparison, own_first: bool) -> str:
    return sha256_text(comparison.question, *comparison.asked(own_first))[:32]


def _outcome(pick: str | None, own: str) -> Outcome:
    if pick is None:
        return "invalid"
    return "tie" if pick == "C" else "win" if pick == own else "loss"
