"""What the manifest says of a model's scores of itself, worked out by hand on a few rows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.pairs.building import Pair
from trainer.pairs.judging import compared, findings, script_share, spearman


def answer(
    text: str, clear: float | None, short: float | None = None, again: Any = None, **more: Any
) -> dict[str, Any]:
    """A candidate with two scores (or one), and those of a second scoring."""
    if clear is None:
        return {"text": text, "score": None, "scores": None, **more}
    scores = {"clear": clear} if short is None else {"clear": clear, "short": short}
    found = {"text": text, "score": sum(scores.values()) / len(scores), "scores": scores, **more}
    return found if again is None else found | {"again": [again]}


def told(
    *rows: list[dict[str, Any]], pairs: list[tuple[int, int, int]] = (), language: str = "ru"
) -> dict[str, Any]:
    """`findings` of rows of candidates; pairs are (row, chosen, rejected)."""
    made = [{"key": f"k{n}", "prompt": "p", "candidates": row} for n, row in enumerate(rows)]
    kept = [(made[n], Pair(rows[n][better], rows[n][worse])) for n, better, worse in pairs]
    return findings(made, kept, language, 0.5)  # type: ignore[arg-type]


def test_scores_by_criterion_and_their_correlation_with_length() -> None:
    found = told(
        [answer("aaaa", 5, 1), answer("aa", 3, 3), answer("a", 1, 5)],
        [answer("aaa", 4, 2), answer("aaaaa", 5, 1)],
        pairs=[(0, 0, 2), (1, 1, 0)],
    )
    clear, short = found["criteria"]["clear"], found["criteria"]["short"]
    assert (clear["mean"], clear["chosen_mean"], clear["rejected_mean"]) == (3.6, 5, 2.5)
    assert (short["mean"], short["chosen_mean"], short["rejected_mean"]) == (2.4, 1, 3.5)
    assert clear["sd"] == pytest.approx((11.2 / 5) ** 0.5)
    # Ranks of the scores 5, 3, 1, 4, 5 are 4.5, 2, 1, 3, 4.5; those of the lengths 4, 2, 1, 3, 5: one tie among five.
    assert clear["with_length"] == pytest.approx(9.5 / (9.5 * 10) ** 0.5)
    assert short["with_length"] == pytest.approx(-9.5 / (9.5 * 10) ** 0.5)
    assert found["with_length"]["all"] is None, "every label is 3"


def test_within_prompts_a_longer_prompt_counts_for_nothing() -> None:
    found = told(
        [answer("a" * n, score) for n, score in ((1, 1), (2, 2), (3, 3))],
        [answer("a" * n, score) for n, score in ((101, 3), (102, 2), (103, 1))],
    )
    assert found["with_length"]["within_prompts"] == pytest.approx(0.0)
    alike = told(
        [answer("a" * n, score) for n, score in ((1, 1), (2, 2), (3, 3))], [answer("a", 1), answer("b", 2)]
    )
    assert alike["with_length"]["within_prompts"] == pytest.approx(1.0), (
        "two answers have no ranks to speak of"
    )


def test_of_an_answer_that_came_again_the_first_score_counts() -> None:
    """As a pair takes it: 4 against 3 is no tie, whatever the second reading of the first gave."""
    ties = told([answer("a", 4), answer("b", 3), answer("a", 3)])["ties"]
    assert (ties["prompts"], ties["answer_pairs"]) == (0, 0.0)


def test_ties_are_of_different_answers() -> None:
    found = told(
        [answer("a", 4), answer("b", 4), answer("a", 4)],
        [answer("a", 4), answer("b", 4.25), answer("c", 1)],
        [answer("a", 4), answer("a", 4)],
        [answer("a", 4), answer("b", None, invalid="cut")],
    )["ties"]
    # Two prompts have different answers with scores: one pair in the first, three in the second.
    assert (found["prompts"], found["of"], found["share"]) == (1, 2, 0.5)
    assert (found["answer_pairs"], found["answer_pairs_rounded"]) == (1 / 4, 2 / 4)


def test_what_could_not_be_read_and_what_was_mended() -> None:
    found = told(
        [
            answer("a", 4, repairs=["label", "scale"]),
            answer("b", 4, repairs=["label"]),
            answer("", None, invalid="cut", said="x" * 900),
            answer("c", None, invalid="no score (clear: because)"),
            answer("d", None, invalid="no score (short: because)"),
        ]
    )
    assert (found["answers"], found["labelled"]) == (5, 2)
    assert found["unread"] == {"cut": 1, "no score": 2}
    assert found["repaired"] == {"label": 2, "scale": 1}
    assert [(each["sample"], len(each["said"])) for each in found["unread_examples"]] == [
        (2, 300),
        (3, 1),
        (4, 1),
    ]


def test_no_more_than_some_examples_are_listed() -> None:
    found = told([answer("", None, invalid="cut", said="x")] * 50)
    assert found["unread"] == {"cut": 50}
    assert len(found["unread_examples"]) == 20


def test_agreement_with_a_second_scoring() -> None:
    found = told(
        [answer("a", 5, 5, {"clear": 4, "short": 4}), answer("b", 3, 3, {"clear": 2, "short": 2})],
        [answer("c", 4, 4, {"clear": 1, "short": 2}), answer("d", 2, 2, {"clear": 3, "short": 3})],
        [answer("e", 1, 1, {"clear": 1, "short": 1}), answer("f", 2, 2) | {"again": [None]}],
        pairs=[(0, 0, 1), (1, 0, 1), (2, 1, 0)],
    )["agreement"]
    (once,) = found
    assert once["answers"] == 5
    assert once["mean_difference"] == pytest.approx((-1 - 1 - 2.5 + 1 + 0) / 5)
    assert once["mean_absolute_difference"] == pytest.approx(5.5 / 5)
    assert once["same_rounded"] == 1 / 5
    assert (once["pairs"], once["pairs_confirmed"]) == (2, 0.5), (
        "a pair without a second score is not counted"
    )
    # Ranks of 5, 3, 4, 2, 1 against those of 4, 2, 1.5, 3, 1.
    assert once["spearman"] == pytest.approx(1 - 6 * (0 + 0 + 4 + 4 + 0) / 120)


def test_a_tie_neither_confirms_a_pair_nor_contradicts_it() -> None:
    found = compared([], [(4.0, 3.0), (3.0, 4.0), (0.1 + 0.2, 0.3), (2.0, 2.0), (None, 1.0)])
    assert found["pairs"] == 4
    assert [found[f"pairs_{name}"] for name in ("confirmed", "contradicted", "tied")] == [0.25, 0.25, 0.5]


def test_what_the_digits_held_of_the_probability() -> None:
    sure, unsure = {"clear": 0.9, "short": 0.7}, {"clear": 0.2, "short": None}
    rows = [
        [answer("a", 4, 4, mass=sure), answer("a", 4, 4, mass=sure)],
        [answer("b", None, mass=unsure)],
        [answer("c", 4, 4, again_mass=[{"clear": None}, {"clear": 0.4}])],
    ]
    for each in (each for row in rows for each in row if each["score"] is not None):
        each["again"] = [None, None]
    found = told(*rows)
    # The same answer is asked about once; one without a score was asked about, too.
    assert found["mass"] == {
        "questions": 3,
        "mean": pytest.approx(1.8 / 3),
        "min": 0.2,
        "below_half": pytest.approx(1 / 3),
    }
    assert found["agreement"][0]["mass"] is None
    assert found["agreement"][1]["mass"] == {"questions": 1, "mean": 0.4, "min": 0.4, "below_half": 1.0}
    assert told([answer("a", 4)])["mass"] is None


def test_answers_that_could_not_be_read_are_in_no_language_and_counted() -> None:
    unread = answer("", None, invalid="cut", said='{"answer": "Hello", "estimate"')
    found = told([answer("Привет", 3), unread, unread])["language"]
    assert (found["answers"], found["other"], found["share"], found["not_read"]) == (1, 0, 0.0, 2)


def test_the_same_answer_again() -> None:
    found = told(
        [answer("a", 4), answer("a", 5), answer("b", 3), answer("b", 3)], [answer("a", 1), answer("c", 2)]
    )
    assert found["same_answers"] == {"texts": 2, "same_score": 0.5}
    assert told([answer("a", 4)])["same_answers"] == {"texts": 0, "same_score": None}


@pytest.mark.parametrize(("language", "other"), [("ru", 2), ("en", 2)])
def test_language_by_the_script_of_letters(language, other) -> None:
    texts = ["Привет", "Hello", "IT-компания Яндекс", "seen Омск near by", "42 + 1", ""]
    found = told([answer(text, 3) for text in texts], language=language)["language"]
    assert found == {
        "wanted": language, "threshold": 0.5, "answers": 4, "without_letters": 1, "not_read": 1, "other": other,
        "share": other / 4,
    }  # fmt: skip


def test_the_share_of_a_language_s_letters() -> None:
    assert script_share("Ёж, ҐЇ!", "ru") == 1
    assert script_share("abcд", "ru") == 0.25
    assert script_share("abcд", "en") == 0.75
    assert script_share("Это, café, 東京", "en") == 4 / 9
    assert script_share("1, 2", "en") is None


def test_a_correlation_needs_three_points_and_two_values() -> None:
    assert spearman([(1, 2), (2, 3)]) is None
    assert spearman([(1, 2), (1, 3), (1, 4)]) is None
    assert spearman([(1, 2), (2, 2), (3, 2)]) is None
    assert spearman([(1, 30), (2, 20), (3, 10)]) == pytest.approx(-1)
    # The same mean of digits, added up in another order, is the same rank.
    assert spearman([(0.1 + 0.2, 2), (0.3, 2), (1, 3)]) == pytest.approx(1)


def test_nothing_compares_with_nothing() -> None:
    assert compared([], []) == {
        "answers": 0, "spearman": None, "mean_difference": None, "mean_absolute_difference": None, "same_rounded": None,
        "pairs": 0, "pairs_confirmed": None, "pairs_contradicted": None, "pairs_tied": None,
    }  # fmt: skip


CANDIDATE = st.one_of(
    st.builds(answer, st.text(max_size=5), st.integers(1, 5)),
    st.builds(lambda text: answer(text, None, invalid="cut"), st.text(max_size=5)),
)


@settings(deadline=None)
@given(st.lists(st.lists(CANDIDATE, max_size=5), max_size=5), st.sampled_from(["ru", "en"]))
def test_shares_are_shares_whatever_the_rows(rows, language) -> None:
    found = told(*rows, language=language)
    assert found["labelled"] + sum(found["unread"].values()) == found["answers"]
    for share in (found["ties"]["share"], found["ties"]["answer_pairs"], found["language"]["share"]):
        assert share is None or 0 <= share <= 1
    for value in (found["with_length"]["all"], found["with_length"]["within_prompts"]):
        assert value is None or -1 - 1e-9 <= value <= 1 + 1e-9
