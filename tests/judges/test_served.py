"""The server judge, against a real HTTP server: constrained, nonsense, silence, and a server that goes away."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import pytest

from tests.judges.servers import chat, completion, serving
from trainer.judges import Choice, JudgeGone, Question
from trainer.judges.served import ServerJudge
from trainer.schema import UserError

CHOICES = ("A", "B", "C")


def questions(count: int) -> list[Question]:
    return [Question(str(number), f"question {number}", CHOICES) for number in range(count)]


def judge(url: str, **settings) -> ServerJudge:
    return ServerJudge(url, "tiny", **{"wait": 0.01, "timeout": 5.0, "attempts": 2, **settings})


def choices(made: ServerJudge, count: int = 1) -> dict[str, Choice]:
    return {choice.key: choice for some in made.choose(questions(count)) for choice in some}


def asked_number(body: dict) -> int:
    return int(body["messages"][0]["content"].split()[-1])


def test_each_question_once_whatever_comes_first() -> None:
    def answer(n: int, body: dict):
        time.sleep(0.05 * (asked_number(body) % 3))
        return 200, chat("ABC"[asked_number(body) % 3])

    with serving(answer) as asked:
        found = choices(judge(asked.url, parallel=3), 9)
    assert {key: choice.pick for key, choice in found.items()} == {str(n): "ABC"[n % 3] for n in range(9)}
    assert len(asked.bodies) == 9
    assert {body["temperature"] for body in asked.bodies} == {0.0}


def test_several_at_once() -> None:
    def answer(n: int, body: dict):
        time.sleep(0.2)
        return 200, chat("A")

    begun = time.monotonic()
    with serving(answer) as asked:
        choices(judge(asked.url, parallel=8), 8)
    assert time.monotonic() - begun < 1.2


@pytest.mark.parametrize(
    ("constrain", "sent"),
    [
        ("grammar", {"grammar": 'root ::= "A" | "B" | "C"'}),
        ("choice", {"structured_outputs": {"choice": ["A", "B", "C"]}}),
        ("logprobs", {"logprobs": True, "top_logprobs": 20}),
        (None, {}),
    ],
)
def test_constraints(constrain, sent) -> None:
    with serving(lambda n, body: (200, chat("B"))) as asked:
        assert choices(judge(asked.url, constrain=constrain))["0"].pick == "B"
    body = asked.bodies[0]
    assert {name: body.get(name) for name in sent} == sent
    assert set(body) <= {"model", "messages", "max_tokens", "temperature", "seed", "guided_choice", *sent}


def test_the_likeliest_choice_by_its_log_prob() -> None:
    top = {"The": math.log(0.5), " B": math.log(0.2), "B": math.log(0.1), "A": math.log(0.1)}
    with serving(lambda n, body: (200, chat("The answer", top=top))) as asked:
        found = choices(judge(asked.url, constrain="logprobs"))["0"]
    assert found.pick == "B"
    assert found.probabilities == pytest.approx((0.25, 0.75, 0.0))
    assert found.mass == pytest.approx(0.4)


@pytest.mark.parametrize(("top", "mass"), [({"The": -0.1}, 0.0), ({}, None), (None, None)])
def test_what_the_choices_held_where_none_is_likely_or_nothing_is_told(top, mass) -> None:
    with serving(lambda n, body: (200, chat("B", top=top))) as asked:
        found = choices(judge(asked.url, constrain="logprobs"))["0"]
    assert (found.pick, found.probabilities, found.mass) == ("B", None, mass)


def test_plain_completions() -> None:
    with serving(lambda n, body: (200, completion(" C", top={" C": -0.1}))) as asked:
        assert choices(judge(asked.url, chat=False, constrain="logprobs"))["0"].pick == "C"
    assert asked.bodies[0]["prompt"] == "question 0"


def test_nonsense_is_asked_again_and_then_invalid() -> None:
    with serving(lambda n, body: (200, chat("Bananas!"))) as asked:
        found = choices(judge(asked.url, tries=3))["0"]
    assert (found.pick, found.said, found.answered) == (None, "Bananas!", True)
    assert [body["temperature"] for body in asked.bodies] == [0.0, 1.0, 1.0]


def test_a_second_try_may_help() -> None:
    with serving(lambda n, body: (200, chat("Hm." if n == 0 else "B"))) as asked:
        assert choices(judge(asked.url))["0"].pick == "B"


def broken(n: int, body: dict):
    return (500, {}) if asked_number(body) == 3 else (200, chat("A"))


def garbage(n: int, body: dict):
    return (200, b"<html>") if asked_number(body) == 3 else (200, chat("A"))


def refused(n: int, body: dict):
    return (400, {"error": "too long"}) if asked_number(body) == 3 else (200, chat("A"))


def silent(n: int, body: dict):
    return (lambda handler: time.sleep(1)) if asked_number(body) == 3 else (200, chat("A"))


@pytest.mark.parametrize(
    ("answer", "told"),
    [(broken, "status 500"), (garbage, "no OpenAI"), (refused, "too long"), (silent, "no answer within")],
)
def test_one_question_without_an_answer_is_invalid(answer, told) -> None:
    with serving(answer) as asked:
        found = choices(judge(asked.url, timeout=0.3), 6)
    assert {key for key, choice in found.items() if choice.pick == "A"} == set("01245")
    # A refusal is an answer: asked again it would be the same.
    assert (found["3"].pick, found["3"].answered) == (None, answer is refused)
    assert told in found["3"].said


def test_refusals_at_the_front_are_the_questions_fault() -> None:
    with serving(lambda n, body: (400, {}) if asked_number(body) < 8 else (200, chat("A"))) as asked:
        found = choices(judge(asked.url), 12)
    assert [(found[str(n)].pick, found[str(n)].answered) for n in range(12)] == [(None, True)] * 8 + [
        ("A", True)
    ] * 4


def test_a_server_that_refuses_everything_is_no_judge() -> None:
    with serving(lambda n, body: (400, {"error": "no such setting"})) as asked:
        with pytest.raises(JudgeGone, match="all 6 questions were refused"):
            choices(judge(asked.url), 6)
        with pytest.raises(JudgeGone, match=r"the first 2\d questions were refused"):
            choices(judge(asked.url), 100)
        assert len(asked.bodies) < 50


def test_questions_that_are_all_too_long_are_not_the_server_s_fault() -> None:
    def answer(n, body):
        return (400, {"error": "too long"}) if len(json.dumps(body)) > 2000 else (200, chat("A"))

    with serving(answer) as asked:
        asked_for = [dataclasses.replace(each, text="long " * 500) for each in questions(60)]
        found = [choice for some in judge(asked.url).choose(asked_for) for choice in some]
    assert len(found) == 60
    assert all(choice.answered and choice.pick is None and "too long" in choice.said for choice in found)


def test_a_server_that_goes_away_is_not_asked_for_ever() -> None:
    found: list[list[Choice]] = []
    with serving(lambda n, body: (200, chat("A")) if n < 6 else (503, {})) as asked:
        with pytest.raises(JudgeGone, match=r"\d questions in a row"):
            found.extend(judge(asked.url, parallel=2).choose(questions(1000)))
        assert len(asked.bodies) < 40
    assert [choice.pick for some in found for choice in some].count("A") == 6


def test_many_bad_questions_in_a_row_are_not_the_server_s_fault() -> None:
    with serving(lambda n, body: (200, b"<html>") if "question" in str(body) else (200, chat("A"))) as asked:
        found = choices(judge(asked.url), 12)
    assert {choice.answered for choice in found.values()} == {False}
    assert len(found) == 12


def test_a_wrong_key_ends_it_at_once(monkeypatch) -> None:
    monkeypatch.setenv("TINY_KEY", "sk-secret")
    with serving(lambda n, body: (401, {})) as asked:
        with pytest.raises(UserError, match="TINY_KEY"):
            choices(judge(asked.url, key_variable="TINY_KEY", parallel=1), 50)
        assert len(asked.bodies) <= 2


def test_it_may_be_asked_again_after_it_was_gone() -> None:
    with serving(lambda n, body: (503, {}) if n < 12 else (200, chat("A"))) as asked:
        made = judge(asked.url, parallel=1)
        with pytest.raises(JudgeGone):
            choices(made, 6)
        assert choices(made, 2)["1"].pick == "A"


def test_what_it_says_of_itself_holds_no_key(monkeypatch) -> None:
    monkeypatch.setenv("TINY_KEY", "sk-secret")
    made = judge("http://localhost:1/v1", key_variable="TINY_KEY")
    assert "secret" not in str(made.describe())
    assert made.describe()["model"] == "tiny"


@pytest.mark.parametrize("settings", [{"tries": 0}, {"parallel": 0}, {"max_tokens": 0}])
def test_what_cannot_work(settings) -> None:
    with pytest.raises(UserError, match=f"judge.{next(iter(settings))}: 0"):
        judge("http://localhost:1/v1", **settings)
