"""Texts fit to be shown: what is replaced, what is cut, how numbers are written."""

import pytest

from trainer.report.texts import KEPT, between, facts, kept, number, readable, shown


def test_what_breaks_a_page_is_replaced_and_what_languages_need_stays():
    assert readable("a\x00b\x1bc\x7f\x9b") == "a␀b␛c␡\ufffd"
    assert readable("\u202eevil\u2069 half \ud800") == "\ufffdevil\ufffd half \ufffd"
    assert readable("e" + "\u0301" * 50) == "e" + "\u0301" * 4
    for good in ("строка\tс табуляцией\n", "می‌خواهم", "👩‍👩‍👧", "a\u00a0b", "naïve café", "й"):
        assert readable(good) == good
    assert readable("a\r\nb") == "a\nb"
    readable("\ud83d" * 10).encode()


def test_turns_and_nothing_become_text():
    assert readable([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]) == (
        "user: Hi\n\nassistant: Hello"
    )
    assert readable(None) == ""
    assert readable(3) == "3"


def test_long_texts_part_between_words_and_lose_nothing():
    words = " ".join(f"word{number}" for number in range(300))
    front, back = shown(words), shown(words, tail=True)
    assert front.text + front.rest == words
    assert back.rest + back.text == words
    assert front.text.endswith(" ")
    assert len(front.text) <= 420
    assert (front.tail, back.tail) == (False, True)
    assert shown(" short \n").text == "short"
    assert shown("a\n\n\n\nb").text == "a\n\nb"
    assert len(shown("x" * 900).text) == 420


def test_a_report_keeps_no_whole_books():
    assert kept("a" * KEPT) == "a" * KEPT
    assert kept("a" * (KEPT + 1500)).endswith("… (1,500 more characters)")
    assert kept("b" + "a" * KEPT, tail=True) == "(1 more characters) … " + "a" * KEPT


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "–"), (1.239, "1.24"), (-0.5, "−0.50"), (-0.001, "0.00"), (12345.6, "12,345.60")],
)
def test_numbers(value, told):
    assert number(value) == told


def test_intervals_and_signs():
    assert between([-0.1, 0.25]) == "−0.10 to 0.25"
    assert between(None) == between([None, 1.0]) == ""
    assert number(0.031, 1, sign=True) == "0.0"
    assert number(3.1, 1, sign=True) == "+3.1"


def test_facts_are_flat_and_leave_out_what_is_off():
    settings = {
        "n": 4,
        "reward": {"label": "POSITIVE", "output": None},
        "seeds": [1, 2],
        "rate": 1e-6,
        "off": "",
    }
    assert facts(settings) == [("n", "4"), ("reward label", "POSITIVE"), ("seeds", "1, 2"), ("rate", "1e-06")]
    assert facts("plain") == [("", "plain")]
