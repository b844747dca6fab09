"""Exchanging letters and finding the exchanged ones."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.homoglyphs import (
    INSTRUCTION,
    SWAP,
    SWAP_CAPITALS,
    align,
    fold,
    is_swappable,
    mark,
    substitute,
)

LETTERS = st.text(st.sampled_from("cyoсуоCYOСУОabcабв .,!<&*\n") | st.characters(codec="utf-8"), max_size=60)


@pytest.mark.parametrize(("before", "after"), sorted(SWAP_CAPITALS.items()))
def test_each_letter_has_its_twin_in_the_other_script(before: str, after: str) -> None:
    scripts = {unicodedata.name(letter).split()[0] for letter in (before, after)}
    assert scripts == {"LATIN", "CYRILLIC"}
    cases = {unicodedata.name(letter).split()[1] for letter in (before, after)}
    assert len(cases) == 1, "a capital's twin is a capital"
    assert SWAP_CAPITALS[after] == before


def test_lower_case_by_default_capitals_on_request() -> None:
    assert substitute("Cosy Yo-yo") == "C\u043es\u0443 Y\u043e-\u0443\u043e"
    assert substitute("CYO", capitals=True) == "\u0421\u0423\u041e"
    assert substitute("\u0441\u0443\u043e") == "cyo"
    assert len(SWAP) == 6
    assert [is_swappable("c"), is_swappable("C"), is_swappable("C", capitals=True)] == [True, False, True]
    assert INSTRUCTION.count("{text}") == 1


@given(LETTERS, st.booleans())
def test_exchanging_twice_gives_the_text_back(text: str, capitals: bool) -> None:
    once = substitute(text, capitals=capitals)
    assert substitute(once, capitals=capitals) == text
    assert len(once) == len(text)
    assert (once != text) == any(is_swappable(char, capitals) for char in text)
    assert fold(once) == fold(text)


@given(LETTERS, LETTERS)
def test_alignment_holds_both_texts_whole(source: str, output: str) -> None:
    pairs = align(source, output)
    assert "".join(left or "" for left, _ in pairs) == source
    assert "".join(right or "" for _, right in pairs) == output
    assert (None, None) not in pairs


@given(LETTERS)
def test_a_full_exchange_aligns_letter_by_letter(text: str) -> None:
    assert align(text, substitute(text)) == list(zip(text, substitute(text), strict=True))


def test_alignment_finds_lost_and_inserted_letters() -> None:
    assert align("abc", "xab\u0441") == [(None, "x"), ("a", "a"), ("b", "b"), ("c", "\u0441")]
    assert align("abc", "ac") == [("a", "a"), ("b", None), ("c", "c")]


def test_marks_stand_round_runs_of_exchanged_letters_only() -> None:
    source = "The coat from the coast"
    output = "The \u0441\u043eat from the coast!"
    assert mark(source, output) == "The **\u0441\u043e**at from the coast!"
    assert mark(source, output, "[", "]") == "The [\u0441\u043e]at from the coast!"
    assert mark(source, source) == source
    assert mark("", "") == mark("abc", "") == ""
