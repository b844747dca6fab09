"""Judges of a user's own that fail, or answer what was not asked: one line, and what they said is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from trainer.evaluation.verdicts import Comparison, judged
from trainer.judges import Choice, Judge, Question
from trainer.schema import UserError

PROMPT = "Q: {question} | {first} | {second}"
COMPARISONS = [Comparison(f"k{n}", f"question {n}", f"own {n}", f"other {n}", "base") for n in range(3)]


class Failing(Judge):
    """Says A to the first `sane` questions, and then what `after` gives."""

    def __init__(self, after: Any = None, sane: int = 2, told: Any = "plain") -> None:
        self.after, self.sane, self.told = after, sane, told
        self.asked: list[str] = []

    def choose(self, questions: Sequence[Question]) -> Iterator[list[Choice]]:
        for number, question in enumerate(questions):
            self.asked.append(question.key)
            yield [Choice(question.key, "A")] if number < self.sane else self.after(question)

    def describe(self) -> dict[str, Any]:
        return {"told": self.told}


def _raises(question: Question) -> Any:
    raise KeyError("no verdict\nand more")


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (_raises, r"Failing: fails after 2 answers, which are kept \(KeyError: "),
        (lambda question: None, r"Failing: fails after 2 answers, which are kept \(TypeError: "),
        (
            lambda question: [Choice("other", "A")],
            "Failing: answers the question 'other', which it was not asked",
        ),
        (
            lambda question: [Choice(question.key, "A", probabilities=(float("nan"), 0.0, 0.0))],
            r"fails after 2 answers, which are kept \(ValueError: ",
        ),
    ],
)
def test_a_judge_that_fails_is_one_line_and_what_it_said_is_kept(tmp_path, after, message) -> None:
    with pytest.raises(UserError, match=message):
        judged(COMPARISONS, Failing(after), PROMPT, tmp_path)
    sound = Failing(sane=6)
    verdicts, _, stopped = judged(COMPARISONS, sound, PROMPT, tmp_path)
    assert stopped is None
    assert len(sound.asked) == 4, "what was answered is not asked again"
    assert {each.outcome for each in verdicts} == {"tie"}


def test_a_judge_that_cannot_describe_itself_is_named(tmp_path) -> None:
    with pytest.raises(
        UserError, match=r"Failing\.describe: fails \(TypeError: .*; it should give plain JSON"
    ):
        judged(COMPARISONS, Failing(told={1, 2}), PROMPT, tmp_path)
