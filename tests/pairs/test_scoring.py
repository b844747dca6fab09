"""Marks by a judge's choices: a question that never gets an answer ends no run, and a judge that is gone does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from typing_extensions import override

from tests.judges.servers import chat, serving
from trainer.judges import Choice, Judge, Question
from trainer.judges.served import ServerJudge
from trainer.pairs.rubric import SCORES
from trainer.pairs.scoring import marks, told_of
from trainer.schema import UserError

QUESTIONS = [Question(f"q{number}", f"question {number}", SCORES) for number in range(8)]
NONSENSE = (200, b"<html>an error page</html>")


def judge(url: str, **settings: Any) -> ServerJudge:
    given = {"constrain": "logprobs", "attempts": 2, "wait": 0.01, "parallel": 2} | settings
    return ServerJudge(url, "m", **given)  # type: ignore[arg-type]


def said(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


@pytest.mark.parametrize("bad", [NONSENSE, (500, {"error": "cannot do this one"})])
@pytest.mark.parametrize("sick", [["question 3"], [f"question {number}" for number in range(1, 8)]])
def test_a_question_that_never_gets_an_answer_has_no_score(bad, sick) -> None:
    """Also where they come in a row: the criteria of one answer."""
    with serving(lambda n, body: bad if said(body) in sick else (200, chat("4", top={"4": -0.5}))) as asked:
        found = marks(judge(asked.url), QUESTIONS)
    assert found["q0"].score == 4.0
    assert found["q0"].mass == pytest.approx(0.606531)
    for each in QUESTIONS:
        if each.text in sick:
            assert isinstance(found[each.key].score, str)
            assert "cannot do" in found[each.key].score or "no OpenAI-compatible" in found[each.key].score


def test_a_second_asking_may_help() -> None:
    seen: list[str] = []

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(said(body))
        return NONSENSE if seen.count("question 3") <= 2 and seen[-1] == "question 3" else (200, chat("2"))

    with serving(answer) as asked:
        found = marks(judge(asked.url), QUESTIONS, in_words=True)
    assert {mark.score for mark in found.values()} == {2.0}


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("bad", [NONSENSE, (503, {"error": "gone"})])
def test_a_server_that_is_gone_ends_the_work(bad, count) -> None:
    with serving(lambda n, body: bad) as asked, pytest.raises(UserError, match=r"got no answer"):
        marks(judge(asked.url), QUESTIONS[:count])


def test_a_server_that_goes_while_it_is_asked_again_has_refused_nothing() -> None:
    plain: list[int] = []

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        if said(body) == "1":
            plain.append(number)
        return (200, chat("1")) if said(body) == "1" and len(plain) == 1 else (503, {})

    with serving(answer) as asked, pytest.raises(UserError, match=r"q0 got no answer .*asks again"):
        marks(judge(asked.url), QUESTIONS[:2])


class Own(Judge):
    """A user's, which does as it is told."""

    def __init__(self, answer: Callable[[Question], list[Choice]]) -> None:
        self.answer = answer

    @override
    def choose(self, questions: Sequence[Question]) -> Iterator[list[Choice]]:
        yield from map(self.answer, questions)

    @override
    def describe(self) -> dict[str, Any]:
        return {}


def test_a_judge_that_fails_is_one_line() -> None:
    def failing(question: Question) -> list[Choice]:
        raise KeyError("no such word\nand more")

    with pytest.raises(UserError, match=r"^Own\.choose: fails \(KeyError: .*no such word"):
        marks(Own(failing), QUESTIONS)


def test_a_judge_that_leaves_questions_out_has_not_scored_them() -> None:
    found = marks(Own(lambda q: [] if q.key == "q1" else [Choice(q.key, "3")]), QUESTIONS[:3], in_words=True)
    assert [found[key].score for key in ("q0", "q1", "q2")] == [3.0, "Own left it out", 3.0]
    words = marks(Own(lambda q: [Choice(q.key, "3")]), QUESTIONS[:1])
    assert words["q0"].score == "no probabilities of the digits"


def test_masses_in_short() -> None:
    assert told_of([]) is told_of([None]) is None
    assert told_of([0.2, None, 0.6]) == {"questions": 2, "mean": 0.4, "min": 0.2, "below_half": 0.5}
