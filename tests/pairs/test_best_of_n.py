"""Best of N: which candidates are the pair, what is left out and counted, and what cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.pairs.rewards import CountReward
from trainer.generation import Sampling
from trainer.pairs.best_of_n import BestOfN, choose
from trainer.pairs.candidates import CandidateFile
from trainer.pairs.continuations import Continuation, Continued, Generator
from trainer.pairs.prompts import NoPrompt, Prompt
from trainer.schema import UserError


def candidate(
    text: str, score: float | None, tokens: int = 9, finished: bool = True, **more: Any
) -> dict[str, Any]:
    return {"text": text, "tokens": tokens, "finished": finished, "score": score, **more}


def chosen(*candidates: dict[str, Any], margin: float = 0.0, tokens: int = 1) -> tuple[Any, dict[str, int]]:
    counts: Counter[str] = Counter()
    pair = choose(candidates, margin, tokens, counts)
    return pair and (pair.chosen["text"], pair.rejected["text"]), {k: v for k, v in counts.items() if v}


def test_the_best_is_chosen_and_the_worst_rejected() -> None:
    found, counts = chosen(candidate("b", 0.5), candidate("a", 2.0, finished=False), candidate("c", -1.0))
    assert found == ("a", "c")
    assert counts == {"candidates_unfinished": 1}


def test_the_first_of_equals() -> None:
    texts = [candidate(text, score) for text, score in (("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", 1.0))]
    assert chosen(*texts)[0] == ("b", "a")


def test_ties() -> None:
    assert chosen(candidate("a", 1.0), candidate("b", 1.0)) == (None, {"dropped_tie": 1})


def test_margins() -> None:
    texts = [candidate("a", 1.0), candidate("b", 0.25)]
    assert chosen(*texts, margin=0.75)[0] == ("a", "b"), "the margin itself is enough"
    assert chosen(*texts, margin=0.76) == (None, {"dropped_margin": 1})


def test_texts_that_say_the_same() -> None:
    texts = [candidate("a", 3.0), candidate("a", 3.0), candidate("a", 3.0)]
    assert chosen(*texts) == (None, {"dropped_duplicate": 1, "candidates_duplicate": 2})
    assert chosen(*texts, candidate("b", 1.0)) == (("a", "b"), {"candidates_duplicate": 2})


def test_short_texts() -> None:
    texts = [candidate("a", 9.0, tokens=3), candidate("b", 2.0, tokens=4), candidate("c", 1.0, tokens=5)]
    assert chosen(*texts, tokens=4) == (("b", "c"), {"candidates_short": 1})
    assert chosen(*texts, tokens=5) == (None, {"dropped_short": 1, "candidates_short": 2})
    blank = candidate(" \n", None, tokens=9)
    assert chosen(blank, *texts[1:]) == (("b", "c"), {"candidates_short": 1})


def test_invalid_texts_are_in_no_pair() -> None:
    broken = candidate("", None, tokens=0, invalid="status 500")
    assert chosen(broken, candidate("a", 2.0), candidate("b", 1.0)) == (("a", "b"), {"candidates_invalid": 1})
    assert chosen(broken, broken, candidate("a", 2.0)) == (
        None,
        {"dropped_invalid": 1, "candidates_invalid": 2},
    )


class Said(Generator):
    """Continues every prompt with the same texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        yield [(prompt, [Continuation(text, len(text), True) for text in self.texts]) for prompt in prompts]

    def describe(self) -> dict[str, Any]:
        return {"texts": list(self.texts)}


def rows(reward: Any, *texts: str) -> list[dict[str, Any]]:
    builder = BestOfN(Said(*texts), NoPrompt(1), reward)
    return next(iter(builder.rows(builder.prompts().prompts)))[0]["candidates"]


def test_blank_texts_are_not_scored() -> None:
    asked = []

    def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        asked.extend(completions)
        return [1.5] * len(completions)

    assert [each["score"] for each in rows(reward, "a", "", " ", "b")] == [1.5, None, None, 1.5]
    assert asked == ["a", "b"]
    assert [each["score"] for each in rows(CountReward("b"), "ab", "bb")] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "gave 1 scores for 2 texts"),
        ([1.0, float("nan")], "the score of 'other' is nan"),
        ([1.0, None], "the score of 'other' is None; a finite number is wanted"),
        ([1.0, "good"], "the score of 'other' is 'good'"),
        (torch.ones(2, 2), r"the score of 'one' is tensor\(\[1., 1.\]\)"),
        (None, r"fails at '', the first of 2 prompts \(TypeError: 'NoneType' object is not iterable\)"),
    ],
)
def test_a_reward_that_answers_nonsense_is_named(scores, message) -> None:
    class Wrong:
        def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            return scores

    with pytest.raises(UserError, match=f"Wrong: {message}"):
        rows(Wrong(), "one", "other")


def test_a_reward_that_fails_is_named_with_its_error() -> None:
    def broken(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        raise KeyError("no such word\nand more")

    with pytest.raises(
        UserError, match=r"broken: fails at '', the first of 2 prompts \(KeyError: "
    ) as caught:
        rows(broken, "one", "other")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_s_own_line_stays_as_it_is() -> None:
    def refusing(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        raise UserError("my.txt: no such file")

    with pytest.raises(UserError, match=r"^my\.txt: no such file$"):
        rows(refusing, "one", "other")


@pytest.mark.parametrize("found", [ValueError("no model"), {"weights": torch.ones(1)}])
def test_a_reward_that_cannot_describe_itself_is_named(found) -> None:
    class Shy(CountReward):
        def describe(self) -> dict[str, Any]:
            if isinstance(found, Exception):
                raise found
            return found

    with pytest.raises(
        UserError, match=r"Shy\.describe: fails \((Value|Type)Error: .*; it should give plain JSON"
    ):
        BestOfN(Said("a"), NoPrompt(1), Shy()).describe()


FILE = CandidateFile("x.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": None}, "BestOfN.prompts: is missing"),
        ({"reward": None}, "BestOfN.reward: is missing"),
        ({"n": 1}, "BestOfN.n: 1 is not possible"),
        ({"sampling": Sampling()}, "do_sample: is false"),
        ({"min_margin": -0.1}, "min_margin: -0.1"),
        ({"min_tokens": 0}, "min_tokens: 0"),
        ({"generator": FILE, "prompts": NoPrompt(1)}, "BestOfN.prompts: has no effect with a CandidateFile"),
        ({"generator": FILE, "prompts": None, "n": 4}, "BestOfN.n: has no effect"),
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(settings, message) -> None:
    given = {"generator": Said("a"), "prompts": NoPrompt(1), "reward": CountReward()} | settings
    with pytest.raises(UserError, match=message):
        BestOfN(**given)
