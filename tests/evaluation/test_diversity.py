"""distinct-n by hand; self-BLEU by hand and beside torchmetrics' BLEU."""

from __future__ import annotations

import random

import pytest
from torchmetrics.functional.text import bleu_score

from trainer.evaluation.diversity import distinct, self_similarity


def test_distinct_by_hand() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct(["abc", "abd"], 3) == 1.0
    assert distinct([[1], []], 2) is None


def test_n_grams_do_not_reach_over_texts() -> None:
    assert distinct([[1, 2], [3, 1], [2, 3]], 2) == 1.0


def test_texts_that_are_all_the_same() -> None:
    assert self_similarity(["a b c d e"] * 4) == pytest.approx(1.0)
    assert self_similarity(["a b c d e", "v w x y z"]) == 0.0
    assert self_similarity(["a b", "", " "]) is None


def test_a_word_counts_as_often_as_another_text_has_it() -> None:
    # "a a a" against "a b": one of three unigrams, no longer ones (smoothed: 1/3 and 1/2; no 4-gram: 1/1).
    # The other way round: one of two unigrams, and two words where the nearest reference has three.
    first = (1 / 3 * 1 / 3 * 1 / 2) ** 0.25
    second = 2.718281828459045 ** (1 - 3 / 2) * (1 / 2 * 1 / 2) ** 0.25
    assert self_similarity(["a a a", "a b"]) == pytest.approx((first + second) / 2)


def test_as_torchmetrics_has_it() -> None:
    rng = random.Random(0)
    # Few words and one length: every text has a 4-gram in common with another, and no nearest length is in doubt.
    texts = [" ".join(rng.choices("abc", k=12)) for _ in range(20)]
    each = [
        float(bleu_score([text], [texts[:i] + texts[i + 1 :]], n_gram=4, smooth=True))
        for i, text in enumerate(texts)
    ]
    assert min(each) > 0
    assert self_similarity(texts) == pytest.approx(sum(each) / len(each), abs=1e-6)


def test_the_order_does_not_matter_and_many_texts_are_no_matter() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 40))) for _ in range(3000)]
    assert self_similarity(texts) == pytest.approx(self_similarity(texts[::-1]))
