"""Rubrics: the shipped ones, what a model is asked by them, and what a broken one says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.pairs.opinionated import short_rubric
from trainer.pairs.judging import script_share
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.schema import UserError

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "published" / "003_4b499ef22b43a147.txt"


@pytest.mark.parametrize("language", ["ru", "en"])
def test_the_shipped_ones_ask_for_the_same_in_two_languages(language) -> None:
    rubric = Rubric.read(RUBRIC.with_name(f"rubric_{language}.yaml"))
    assert rubric.language == language
    assert [each.key for each in rubric.criteria] == [
        "brevity",
        "helpfulness",
        "accuracy",
        "clarity",
        "conciseness",
    ]
    assert len(rubric.score) == 3
    texts = [*rubric.prompts.values(), *rubric.score, *(each.name + each.asks for each in rubric.criteria)]
    for text in texts:
        share = script_share(text.replace("{instruction}", "").replace("{answer}", ""), language)
        assert share > 0.6 if language == "ru" else share == 1, text


def test_what_is_asked(tmp_path) -> None:
    rubric = Rubric.read(short_rubric(tmp_path))
    assert rubric.asked("Why?", None) == "Answer: Why?"
    assert rubric.asked("Why {answer}?", "json") == (
        'As {"answer": "...", "estimate": 1}, by\n- Brevity: is it brevity?\n- Clarity: is it clarity?\nWhy {answer}?'
    )
    question = rubric.question("k", "Why {answer}?", "So {criterion}", rubric.criteria[1], 0)
    assert question.text == "Why {answer}? -> So {criterion}\nClarity: is it clarity? 1 to 5?"
    assert question.choices == ("1", "2", "3", "4", "5")
    assert question.judged == ("Why {answer}?", "So {criterion}")


def test_rows_follow_from_every_word_of_it(tmp_path) -> None:
    path = short_rubric(tmp_path)
    before = Rubric.read(path).describe()
    assert Rubric.read(short_rubric(tmp_path / "copy")).describe() == before
    (tmp_path / "two.txt").write_text((tmp_path / "two.txt").read_text() + " Please.")
    assert Rubric.read(path).describe() != before


def changed(path: Path, **changes: object) -> Path:
    content = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "de"}, "language is 'de'; it should be ru or en"),
        ({"language": None}, "holds criteria, prompts; it should hold language, criteria, prompts"),
        ({"criteria": {}}, "criteria holds nothing; it should have at least one"),
        ({"criteria": {"a": {"name": "A"}}}, r"criteria\.a: holds name; it should hold name, asks"),
        ({"criteria": {"a": {"name": "A", "asks": 3}}}, r"criteria\.a\.asks is 3; it should be text"),
        ({"criteria": {x: {"name": "A", "asks": "b"} for x in "ab"}}, "two criteria have one name"),
        (
            {"prompts": {"answer": "answer.txt"}},
            "prompts: holds answer; it should hold answer, plain, json, score",
        ),
    ],
)
def test_a_broken_one_is_named(tmp_path, changes, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Rubric.read(changed(short_rubric(tmp_path), **changes))
    assert "rubric.yaml" in str(caught.value)


def test_its_files_are_named_too(tmp_path) -> None:
    path = short_rubric(tmp_path)
    (tmp_path / "one.txt").write_text("{instruction} {answer}")
    with pytest.raises(
        UserError, match=r"one.txt: holds \{answer\}, \{instruction\}; it should hold .*\{criterion\}"
    ):
        Rubric.read(path)
    (tmp_path / "one.txt").unlink()
    with pytest.raises(UserError, match=r"prompts\.score, number 1: .*one.txt cannot be read"):
        Rubric.read(path)
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read"):
        Rubric.read(tmp_path / "nowhere.yaml")
    path.write_text("a: [")
    with pytest.raises(UserError, match=r"rubric.yaml: cannot be read"):
        Rubric.read(path)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the published system is not at {PUBLISHED}")
def test_no_sentence_is_the_published_system_s() -> None:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = "".join(char.lower() if char.isalnum() else " " for char in text).split()
        return {tuple(words[place : place + 6]) for place in range(len(words) - 5)}

    published = runs(PUBLISHED.read_text(encoding="utf-8"))
    for path in (*RUBRIC.parent.rglob("*.yaml"), *RUBRIC.parent.rglob("*.txt")):
        assert not runs(path.read_text(encoding="utf-8")) & published, path
