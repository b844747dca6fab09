"""Answers with scores as models really give them: what is read, what is mended, and what is left unread."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.pairs.estimates import REASONS, Estimate, Unreadable, read_estimate

RU = ("Краткость", "Полезность", "Точность", "Ясность", "Лаконичность")
EN = ("Brevity", "Helpfulness", "Accuracy", "Clarity", "Conciseness")

READ_JSON = {
    # as asked for
    '{"answer": "Париж", "estimate": 5}': ("Париж", 5),
    '{"answer": "It is Paris.", "estimate": 4.5}': ("It is Paris.", 4.5),
    '{"estimate": 3, "answer": "Paris"}': ("Paris", 3),
    '{\n  "answer": "Раз.\\nДва.",\n  "estimate": 4\n}': ("Раз.\nДва.", 4),
    '{"answer": "Он сказал \\"нет\\"", "estimate": 5}': ('Он сказал "нет"', 5),
    '{"answer": "\\u041f\\u0430\\u0440\\u0438\\u0436 \\ud83d\\ude00", "estimate": 5}': ("Париж 😀", 5),
    # braces, lists and code in the answer
    '{"answer": "f() { return {a: 1}; }", "estimate": 4}': ("f() { return {a: 1}; }", 4),
    '{"answer": "- раз\\n- два\\n1. три", "estimate": 4}': ("- раз\n- два\n1. три", 4),
    '{"answer": "Пиши {\\"answer\\": \\"x\\", \\"estimate\\": 1}", "estimate": 5}': (
        'Пиши {"answer": "x", "estimate": 1}', 5,
    ),
    # around it
    '```json\n{"answer": "Париж", "estimate": 5}\n```': ("Париж", 5),
    '```\n{"answer": "Paris", "estimate": 5}\n```': ("Paris", 5),
    'Вот мой ответ:\n\n{"answer": "Париж", "estimate": 5}\n\nНадеюсь, это поможет!': ("Париж", 5),
    'Sure! ```json\n{"answer": "Paris", "estimate": 5}\n``` It is short and correct.': ("Paris", 5),
    '[{"answer": "Париж", "estimate": 5}]': ("Париж", 5),
    '{"result": {"answer": "Paris", "estimate": 2}}': ("Paris", 2),
    # the score in other words
    '{"answer": "Париж", "estimate": "4"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "4/5"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": 4/5}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "4,5"}': ("Париж", 4.5),
    '{"answer": "Париж", "estimate": 4,5}': ("Париж", 4.5),
    '{"answer": "Париж", "estimate": "четыре"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "Пять из пяти"}': ("Париж", 5),
    '{"answer": "Paris", "estimate": "four"}': ("Paris", 4),
    '{"answer": "Paris", "estimate": "5 out of 5"}': ("Paris", 5),
    '{"answer": "Париж", "estimate": "Оценка: 4"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "**4**"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": [4]}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "[4]"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "4 балла"}': ("Париж", 4),
    '{"answer": "Париж", "estimate": "4 (кратко и верно)"}': ("Париж", 4),
    # keys in another language, or case, and further ones
    '{"ответ": "Париж", "оценка": 5}': ("Париж", 5),
    '{"Answer": "Paris", "Score": 5}': ("Paris", 5),
    '{"answer": "Париж", "estimate": 5, "comment": "кратко"}': ("Париж", 5),
    # broken JSON whose intent is plain
    '{"answer": "Париж", "estimate": 5,}': ("Париж", 5),
    "{'answer': 'Париж', 'estimate': 5}": ("Париж", 5),
    '{answer: "Paris", estimate: 5}': ("Paris", 5),
    '{“answer”: “Париж”, “estimate”: 5}': ("Париж", 5),
    '{"answer": "Париж"\n "estimate": 5}': ("Париж", 5),
    '{"answer": "Он сказал "нет" и ушёл", "estimate": 4}': ('Он сказал "нет" и ушёл', 4),
    '{"answer": "Первая строка\nвторая", "estimate": 4}': ("Первая строка\nвторая", 4),
    '{"answer": "x = \\frac{1}{2} и \\( y \\)", "estimate": 4}': ("x = \frac{1}{2} и \\( y \\)", 4),
    '{"answer": "Париж", "estimate": четыре}': ("Париж", 4),
    '{"answer": "Париж", "estimate": 5': ("Париж", 5),
    '```json\n{"answer": "Париж", "estimate": 5\n```': ("Париж", 5),
    '{"answer": "Париж", "estimate": "5"': ("Париж", 5),
    '{"estimate": 4, "answer": "It isn\'t "big", no"}': ('It isn\'t "big", no', 4),
    # the same twice; one object for each half
    '{"answer": "Париж", "estimate": 5}\n{"answer": "Париж", "estimate": 5}': ("Париж", 5),
    '{"answer": "Париж"}\n{"estimate": 5}': ("Париж", 5),
    # the other form, with the score called by its name
    "Париж.\n\nОценка: 5": ("Париж.", 5),
}  # fmt: skip

UNREAD_JSON = {
    "": "empty",
    "  \n": "empty",
    "{}": "no_score",
    "null": "no_score",
    "Париж": "no_score",
    "Париж, 5": "score_in_the_middle",
    '{"answer": "Париж"}': "no_score",
    '{"answer": "Париж", "estimate": null}': "no_score",
    '{"answer": "Париж", "estimate": true}': "no_score",
    '{"answer": "Париж", "estimate": ""}': "no_score",
    '{"answer": "Париж", "estimate": "высокая"}': "no_score",
    '{"answer": "Paris", "estimate": NaN}': "no_score",
    '{"answer": "Paris", "estimate": Infinity}': "no_score",
    '{"answer": "Paris", "estimate": 1e0}': "several_scores",
    '{"answer": "Париж, 5 миллионов", "estimate": "[оценка от 1 до 5]"}': "several_scores",
    '{"estimate": 5}': "no_answer",
    '{"answer": "", "estimate": 5}': "no_answer",
    '{"answer": "...", "estimate": 5}': "no_answer",
    '{"answer": null, "estimate": 5}': "no_answer",
    '{"answer": ["раз", "два"], "estimate": 5}': "no_answer",
    '{"answer": {"text": "Париж"}, "estimate": 5}': "no_answer",
    '{"answer": "Париж", "estimate": 0}': "out_of_range",
    '{"answer": "Париж", "estimate": 6}': "out_of_range",
    '{"answer": "Париж", "estimate": -3}': "out_of_range",
    '{"answer": "Париж", "estimate": "10"}': "out_of_range",
    '{"answer": "Париж", "estimate": 5.1}': "out_of_range",
    '{"answer": "Париж", "estimate": "8/10"}': "other_scale",
    '{"answer": "Париж", "estimate": "4 из десяти"}': "other_scale",
    '{"answer": "Париж", "estimate": "80%"}': "no_score",
    '{"answer": "Париж", "estimate": "4-5"}': "several_scores",
    '{"answer": "Париж", "estimate": "4 или 5"}': "several_scores",
    '{"answer": "Париж", "estimate": [4, 5]}': "several_scores",
    '{"answer": "Париж", "estimate": "4 (или 5)"}': "several_scores",
    '{"answer": "Париж", "estimate": []}': "no_score",
    '{"answer": "Париж", "estimate": {"Краткость": 5}}': "missing_criteria",
    '{"answer": "Париж", "estimate": 5, "estimate": 4}': "several_scores",
    '{"answer": "Париж", "answer": "Лион", "estimate": 4}': "several_objects",
    '{"answer": "Париж", "estimate": 5} {"answer": "Лион", "estimate": 3}': "several_objects",
    '[{"answer": "Париж", "estimate": 5}, {"answer": "Лион", "estimate": 3}]': "several_objects",
    '{"answer": "Париж, "estimate": 5, "answer": "Лион", "estimate": 3}': "several_objects",
    '{"answer": "Париж", "estimate": 5,} {"answer": "Лион", "estimate": 3}': "several_objects",
    '{"answer": "Париж", "esti': "cut",
    '{"answer": "Париж", "estimate": ': "no_score",
    '{"answer": "Париж — столица Фра': "cut",
    '{"answer": "пример: {\'answer\': \'x\', \'estimate\': 3} и ещё': "several_objects",
    '{"answer": 5 яблок, "estimate": 3}': "malformed",
    '{"answer": "да \\ud83d", "estimate": 5}': "broken_text",
    '{"answer": "Он "\\ud83d" сказал", "estimate": 5}': "broken_text",
    "[" * 5000: "no_score",
    '{"answer": ' * 5000: "cut",
    '{"x":' * 3000: "no_score",
}  # fmt: skip

READ_PLAIN = {
    "Париж, 5": ("Париж", 5),
    "Paris, 5": ("Paris", 5),
    "Столица Франции — Париж. 5": ("Столица Франции — Париж.", 5),
    "Столица Франции — Париж.\n5": ("Столица Франции — Париж.", 5),
    "Столица Франции — Париж.\n\n**5**": ("Столица Франции — Париж.", 5),
    "Париж, 5.": ("Париж", 5),
    "Париж, 4,5": ("Париж", 4.5),
    "Париж, 4.5": ("Париж", 4.5),
    "Париж; 4": ("Париж", 4),
    "Париж | 4": ("Париж", 4),
    "Париж, 4/5": ("Париж", 4),
    "Париж (4/5)": ("Париж", 4),
    "Париж — 4/5": ("Париж", 4),
    "Париж, 5 из 5": ("Париж", 5),
    "Париж, пять из пяти": ("Париж", 5),
    "Париж, четыре": ("Париж", 4),
    "Париж, четыре балла": ("Париж", 4),
    "Paris, four": ("Paris", 4),
    "Paris, 3 out of 5": ("Paris", 3),
    "Париж, **5**": ("Париж", 5),
    "Париж, [5]": ("Париж", 5),
    "Париж, «5»": ("Париж", 5),
    "**Париж**, 5": ("**Париж**", 5),
    "Дважды два — 4, 5": ("Дважды два — 4", 5),
    "4, 5": ("4", 5),
    "Ответ: 4, 5": ("4", 5),
    "Париж, оценка 5": ("Париж", 5),
    "Париж. Оценка: 5": ("Париж.", 5),
    "Париж. Оценка — 5.": ("Париж.", 5),
    "Париж.\nОценка: 5": ("Париж.", 5),
    "Париж.\n\n**Оценка:** 4/5": ("Париж.", 4),
    "Париж.\n\n**Оценка: 4**": ("Париж.", 4),
    "Париж.\n\n## Оценка: четыре": ("Париж.", 4),
    "Париж.\n\nОценка (от 1 до 5): 4": ("Париж.", 4),
    "Париж.\n\nОценка от 1 до 5: 4,5": ("Париж.", 4.5),
    "Париж.\nИтоговая оценка: 5": ("Париж.", 5),
    "Ответ: Париж\nОценка: 4": ("Париж", 4),
    "**Ответ:** Париж\n**Оценка:** 4": ("Париж", 4),
    "Оценка: 4\nОтвет: Париж": ("Париж", 4),
    "Answer: Paris\nScore: 4": ("Paris", 4),
    "Paris.\n\nScore: 4/5 (short and correct)": ("Paris.", 4),
    "Paris (score: 4)": ("Paris", 4),
    "Париж.\n\nОценка: 5\n\nНадеюсь, это поможет!": ("Париж.", 5),
    "Париж.\nОценка: 5. Ответ краткий и точный.": ("Париж.", 5),
    "Раз, два, три.\n\nОценка: 4\n\nПояснение: перечислено всё.": ("Раз, два, три.", 4),
    "1. Вода\n2. Соль\n\nОценка: 5": ("1. Вода\n2. Соль", 5),
    "- вода\n- соль\n\n5": ("- вода\n- соль", 5),
    "```\nПариж, 5\n```": ("Париж", 5),
    "В 2005 году там жило 3 человека. Оценка: 4": ("В 2005 году там жило 3 человека.", 4),
    '{"answer": "Париж", "estimate": 5}': ("Париж", 5),
    "Париж.\nКраткость: 5, Полезность: 4, Точность: 5, Ясность: 4, Лаконичность: 5\nОбщая оценка: 4,6": (
        "Париж.",
        4.6,
    ),
    "int x = {1};\n\nОценка: 3": ("int x = {1};", 3),
}

UNREAD_PLAIN = {
    "": "empty",
    "5": "no_answer",
    "**5/5**": "no_answer",
    "Оценка: 5": "no_answer",
    "Париж": "no_score",
    "Столица Франции — Париж.": "no_score",
    "Дважды два — 4": "no_score",
    "Дважды два — четыре": "no_score",
    "Глава (5)": "no_score",
    "В 2005 году": "no_score",
    "У кошки 4 лапы и хвост.": "no_score",
    "Париж, 5. Это столица, в ней 20 округов.": "score_in_the_middle",
    "Шкала такая. Оценка: 5. Её ставят за отличную работу.": "score_in_the_middle",
    "Шкала:\nОценка: 5 получает тот, кто старался": "score_in_the_middle",
    "Простые числа: 2, 3, 5": "several_scores",
    "раз, два, три": "several_scores",
    "Я вижу 2 и 3, 4 и 5": "score_in_the_middle",
    "Ответ 3,5": "several_scores",
    "1. Вода\n2. Соль\n3": "several_scores",
    "Оценка: 4. Оценка: 5": "several_scores",
    "Париж, 6": "out_of_range",
    "Париж, 0": "out_of_range",
    "Париж, 10": "out_of_range",
    "Париж, -3": "out_of_range",
    "Париж.\nОценка: 100": "out_of_range",
    "Париж, 8/10": "other_scale",
    "Paris, 4 out of ten": "other_scale",
    "Париж, 4-5": "no_score",
    "Париж, 80%": "no_score",
    "Париж, 4+": "no_score",
    "Париж, четыре с половиной": "no_score",
    "Париж ★★★★☆": "no_score",
    "Paris, NaN": "no_score",
    "Paris, five-star hotel": "no_score",
    "Отель Хилтон, 5 звёзд": "score_in_the_middle",
    "Париж.\nКраткость: 5, Полезность: 5, Точность: 5, Ясность: 5, Лаконичность: 5\nОценка: 2": "several_scores",
    "Краткость: 5\nПолезность: 4": "missing_criteria",
    "Париж.\nКраткость: 5": "missing_criteria",
}


def shapes(found: dict) -> list:
    return [
        pytest.param(said, expected, id=f"{n}:{said[:50]!a}")
        for n, (said, expected) in enumerate(found.items())
    ]


@pytest.mark.parametrize(("said", "expected"), shapes(READ_JSON))
def test_json_that_is_read(said, expected) -> None:
    found = read_estimate(said, "json", RU)
    assert isinstance(found, Estimate), found
    assert (found.answer, found.scores) == (expected[0], (expected[1],))


@pytest.mark.parametrize(("said", "reason"), shapes(UNREAD_JSON))
def test_json_that_is_not(said, reason) -> None:
    assert read_estimate(said, "json", RU) == Unreadable(reason)


@pytest.mark.parametrize(("said", "expected"), shapes(READ_PLAIN))
def test_plain_answers_that_are_read(said, expected) -> None:
    found = read_estimate(said, "plain", RU)
    assert isinstance(found, Estimate), found
    assert (found.answer, found.scores) == (expected[0], (expected[1],))


@pytest.mark.parametrize(("said", "reason"), shapes(UNREAD_PLAIN))
def test_plain_answers_that_are_not(said, reason) -> None:
    assert read_estimate(said, "plain", RU) == Unreadable(reason)


@pytest.mark.parametrize(
    ("said", "form", "criteria", "answer"),
    [
        ("Париж.\n\nКраткость: 5\nПолезность: 4\nТочность: 5\nЯсность: 4,5\nЛаконичность: 5/5", "plain", RU, "Париж."),
        ("Париж.\n**Краткость:** 5, **Полезность:** 4, **Точность:** 5, **Ясность:** 4.5, **Лаконичность:** 5",
         "plain", RU, "Париж."),
        ("Paris.\n\n- Brevity: 5\n- Helpfulness: 4\n- Accuracy: 5\n- Clarity: 4.5\n- Conciseness: five", "plain", EN,
         "Paris."),
        ("Paris.\n| Brevity | 5 |\n| Helpfulness | 4 |\n| Accuracy | 5 |\n| Clarity | 4.5 |\n| Conciseness | 5 |",
         "plain", EN, "Paris."),
        ('{"answer": "Париж.", "estimate": [5, 4, 5, 4.5, 5]}', "json", RU, "Париж."),
        ('{"answer": "Париж.", "estimate": {"краткость": 5, "полезность": 4, "точность": 5, "ясность": "4,5",'
         ' "лаконичность": 5}}', "json", RU, "Париж."),
        ('{"answer": "Paris.", "brevity": 5, "helpfulness": 4, "accuracy": 5, "clarity": 4.5, "conciseness": 5}',
         "json", EN, "Paris."),
    ],
)  # fmt: skip
def test_a_score_for_each_criterion(said, form, criteria, answer) -> None:
    found = read_estimate(said, form, criteria)
    assert isinstance(found, Estimate), found
    assert (found.answer, found.scores) == (answer, (5, 4, 5, 4.5, 5))


@pytest.mark.parametrize(
    ("said", "form", "expected"),
    [
        ('{"answer": "Париж", "estimate": 4', "json", "cut"),
        ('{"answer": "Париж", "estimate": "4"', "json", Estimate("Париж", (4,), ("mended_json", "cut"))),
        ('{"answer": "Париж", "estimate": 4} И ещё', "json", Estimate("Париж", (4,), ("words_around",))),
        ("Париж, 4", "plain", "cut"),
        ("Париж.\nОценка: 4", "plain", "cut"),
    ],
)
def test_what_a_limit_cut_off_may_have_gone_on(said, form, expected) -> None:
    expected = Unreadable(expected) if isinstance(expected, str) else expected
    assert read_estimate(said, form, finished=False) == expected


def test_what_was_mended_is_named() -> None:
    found = read_estimate("```json\n{'answer': 'Париж', 'estimate': '4,5 из 5',}\n```", "json")
    assert found == Estimate("Париж", (4.5,), ("code_fence", "mended_json", "decimal_comma", "scale"))
    assert read_estimate('{"answer": "Париж", "estimate": 5}', "json").repairs == ()
    assert read_estimate("Париж, 5", "plain").repairs == ()


@pytest.mark.parametrize(
    ("said", "form", "reason"),
    [
        ("Paris, fıve", "plain", "no_score"),
        ("Paris, fİve", "plain", "no_score"),
        ('{"answer": "Paris", "estimate": "fıve"}', "json", "no_score"),
        ('{"answer": "раз", "два", "estimate": 5}', "json", "malformed"),
        ('{"answer": "раз" + "два", "estimate": 5}', "json", "malformed"),
        ('{"answer": "Париж". "estimate": 5}', "json", "malformed"),
        ('{"answer": "Париж"], "estimate": 5}', "json", "malformed"),
        ('{"answer": """Париж""", "estimate": 5}', "json", "malformed"),
        ('{"answer": "Париж", "estimate": 2, "краткость": 5, "полезность": 5, "точность": 5, "ясность": 5,'
         ' "лаконичность": 5}', "json", "several_scores"),
        ("**4.** четыре\n\n5", "plain", "several_scores"),
    ],
)  # fmt: skip
def test_what_only_looks_like_one(said, form, reason) -> None:
    assert read_estimate(said, form, RU) == Unreadable(reason)


def test_unescaped_quotes_in_pairs_are_the_answer_s_own() -> None:
    found = read_estimate('{"answer": "Он сказал "да".", "estimate": 5}', "json")
    assert found == Estimate('Он сказал "да".', (5,), ("mended_json",))


@pytest.mark.parametrize("blank", ["\n", " ", " \n"])
@pytest.mark.parametrize(
    "around",
    [
        ("Париж", "конец"), ("Париж, 5", "конец"), ("Париж. Оценка", "конец"), ("Париж, ", "5"),
        ('{"answer": "a", "estimate": ', "x{"), ('{"answer": "a"', "x{"), ('{"estimate": 5', '"answer": "a'),
        ('{"answer": "a", "estimate": 5', "}"), ("Краткость", "5x"),
    ],
)  # fmt: skip
def test_long_runs_of_blanks_take_no_time(blank, around) -> None:
    said = (blank * 4000).join(around)
    start = time.process_time()
    for form in ("plain", "json"):
        read_estimate(said, form, RU)
    assert time.process_time() - start < 5


WORDS = {1: ("один", "одна", "единица", "one"), 2: ("два", "две", "двойка", "two"), 3: ("три", "тройка", "three"),
         4: ("четыре", "четв", "four"), 5: ("пять", "пят", "five")}  # fmt: skip
PIECES = st.sampled_from(
    [
        *READ_JSON, *READ_PLAIN, *(s for s in (*UNREAD_JSON, *UNREAD_PLAIN) if len(s) < 200),
        "{", "}", '"', "'", "\\", '\\"', "\\u0041", "\\ud800", ",", ":", "[", "]", "```", "\n", " ", "**", "Оценка",
        '{"answer": "', '", "estimate": ', '"answer"', '"estimate"', "Score: ", "5", "4,5", "0", "-1", "/5",
        "Ответ", "из пяти", "три", "Краткость: ", "x", "Ясность", "NaN", "1e400",
        "fıve", "fİve", "ᲂдин", ", ", "９", "٣", "\x00", "\ud800",
    ]
)  # fmt: skip
SHAPES = [*READ_JSON, *READ_PLAIN, *(said for said in (*UNREAD_JSON, *UNREAD_PLAIN) if len(said) < 200)]
MIXED = st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=12).map("".join)
SAID = st.one_of(st.sampled_from(SHAPES), st.sampled_from(SHAPES), MIXED, st.text())
FINISHED = st.sampled_from([True, True, False])


def mutated(draw: st.DrawFn) -> str:
    said = draw(SAID)
    start, length = draw(st.integers(0, len(said))), draw(st.integers(0, 6))
    return said[:start] + draw(st.text(max_size=3)) + said[start + length :]


@settings(max_examples=1500, deadline=None)
@given(
    st.composite(mutated)(), st.sampled_from(["plain", "json"]), st.sampled_from([RU, EN, ()]), st.booleans()
)
def test_never_a_crash_a_made_up_score_or_a_made_up_answer(said, form, criteria, finished) -> None:
    found = read_estimate(said, form, criteria, finished)
    if isinstance(found, Unreadable):
        assert found.reason in REASONS
        return
    assert len(found.scores) in (1, len(criteria))
    written = [float(number.replace(",", ".")) for number in re.findall(r"[0-9]+(?:[.,][0-9]+)?", said)]
    for score in found.scores:
        assert 1 <= score <= 5
        named = any(word in said.lower() for word in WORDS.get(int(score), ())) and score == int(score)
        assert score in written or named, (said, score)
    assert found.answer.strip()
    assert found.answer in said or found.answer in unescaped(said), (said, found.answer)
    found.answer.encode()


def unescaped(said: str) -> str:
    """The text with JSON's escapes undone, by JSON itself, one by one."""
    text = re.sub(
        r"(?:\\u[0-9a-fA-F]{4})+|\\[\"\\/bfnrt]",
        lambda found: json.loads(f'"{found[0]}"'),
        said.replace("\\'", "'"),
    )
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
