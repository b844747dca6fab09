"""Small chat models from scratch: lessons with marks that are right, and a model that has learned from whole chats."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from launch.cli import main
from launch.scratch.chats import Answers
from launch.scratch.lessons import Lessons, write_lessons
from tests.launch.helpers import ROOT
from trainer.generation import Sampling
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.instructions import InstructionPrompts
from trainer.pairs.prompts import Prompt
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.schema import TokenizedDemonstration, UserError

LESSONS = ROOT / "configs" / "oasst_ru" / "tiny_lessons.yaml"


def rows(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lessons")
    write_lessons(Lessons(str(LESSONS), str(RUBRIC), answers=600, marks=1400, noise=0.25), folder)
    return folder


def test_instructions_are_read_as_oasst1s(lessons: Path) -> None:
    found = InstructionPrompts(str(lessons / "instructions.jsonl"), part="all").load()
    world = yaml.safe_load(LESSONS.read_text())
    asked = sum(len(each["questions"]) * len(each["pairs"]) for each in world["subjects"].values())
    assert found.counts["kept"] == asked
    assert found.counts["dropped_role"] == -(-asked // 10)
    assert all("{" not in prompt.text for prompt in found.prompts)


def test_marks_are_those_that_the_answer_deserves(lessons: Path, tmp_path: Path) -> None:
    """The outside judge's are all right; of the model's own a quarter is one off, and none is further off."""
    rubric, world = Rubric.read(RUBRIC), yaml.safe_load(LESSONS.read_text())
    for number, row in enumerate(rows(lessons / "outside.jsonl")):
        asked, mark = (turn["content"] for turn in row["messages"])
        criterion = next(each for each in rubric.criteria if each.asks in asked)
        manner = list(world["manners"])[number % len(world["manners"])]
        assert int(mark) == world["manners"][manner]["marks"][criterion.key]
    write_lessons(Lessons(str(LESSONS), str(RUBRIC), answers=600, marks=1400, noise=0.0), tmp_path)
    off: Counter[int] = Counter()
    for noisy, right in zip(rows(lessons / "own.jsonl"), rows(tmp_path / "own.jsonl"), strict=True):
        assert noisy["messages"][0] == right["messages"][0]
        said, meant = (each["messages"][1]["content"] for each in (noisy, right))
        if meant.isdigit():
            off[abs(int(said) - int(meant))] += 1
    assert set(off) == {0, 1}
    assert sum(off.values()) == 1400
    assert 0.2 < off[1] / 1400 < 0.3


def test_own_lessons_hold_answers_of_each_manner(lessons: Path) -> None:
    rubric, world = Rubric.read(RUBRIC), yaml.safe_load(LESSONS.read_text())
    answers = [
        row["messages"] for row in rows(lessons / "own.jsonl") if not row["messages"][1]["content"].isdigit()
    ]
    assert len(answers) == 600
    request = rubric.asked("", None).strip()
    brief = [request in asked["content"] for asked, _ in answers]
    assert sum(brief) == 300
    said = [answer["content"] for _, answer in answers]
    assert sum(any(filler in text for filler in world["fillers"]) for text in said) > 80
    assert sum(text in world["foreign"] for text in said) > 5


def test_the_same_seed_gives_the_same_lessons(lessons: Path, tmp_path: Path) -> None:
    write_lessons(Lessons(str(LESSONS), str(RUBRIC), answers=600, marks=1400, noise=0.25), tmp_path / "again")
    write_lessons(Lessons(str(LESSONS), str(RUBRIC), 600, 1400, 0.25, seed=1), tmp_path / "other")
    for name in ("own", "outside"):
        same, again, other = (
            (folder / f"{name}.jsonl").read_bytes()
            for folder in (lessons, tmp_path / "again", tmp_path / "other")
        )
        assert same == again != other


def subject(**change: Any) -> dict[str, Any]:
    """The file's first subject, changed."""
    subjects = yaml.safe_load(LESSONS.read_text())["subjects"]
    return {"subjects": subjects | {"capitals": subjects["capitals"] | change}}


def manner(**change: Any) -> dict[str, Any]:
    """The file's first manner, changed."""
    manners = yaml.safe_load(LESSONS.read_text())["manners"]
    return {"manners": manners | {"brief": manners["brief"] | change}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"manners": {}}, "manners should hold brief, sentence"),
        ({"fillers": ["One."]}, "fillers holds 1; it should hold 2 or more"),
        ({"lang": None, "more": 1}, "should hold lang, subjects"),
        (
            {"subjects": {"capitals": {"questions": []}}},
            "subjects.capitals should hold questions, sentence, pairs",
        ),
        ({"subjects": []}, "subjects should hold one or more"),
        ({"subjects": ["a"]}, "subjects should hold one or more"),
        ({"evasions": []}, "evasions holds 0; it should hold 1 or more"),
        ({"foreign": "No."}, "foreign should be text, and a list"),
        ({"lang": 5}, "lang is 5"),
        (subject(questions="Назови {of}"), "subjects.capitals.questions should be text, and a list"),
        (subject(sentence=5), "subjects.capitals.sentence should be text"),
        (subject(pairs=["a", "b"]), "subjects.capitals.pairs should hold two different answers"),
        (manner(marks=5), "manners.brief.marks should hold a mark"),
        (manner(share="x"), "manners.brief.share is 'x'"),
        (manner(asked=-1), "manners.brief.asked is -1"),
    ],
)
def test_files_that_are_no_lessons(change: dict, told: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def, type-arg]
    path = tmp_path / "lessons.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(LESSONS.read_text()) | change, allow_unicode=True))
    words = ["--path", str(path), "--rubric", str(RUBRIC), "--output", str(tmp_path / "out")]
    assert main(["scratch", "lessons", *words]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "lessons.json").exists()


def test_marks_for_other_criteria(tmp_path: Path) -> None:
    world = yaml.safe_load(LESSONS.read_text())
    world["manners"]["wrong"]["marks"].pop("accuracy")
    path = tmp_path / "lessons.yaml"
    path.write_text(yaml.safe_dump(world, allow_unicode=True))
    with pytest.raises(UserError, match=r"manners.wrong.marks holds brevity, .*rubric_ru.yaml has accuracy"):
        write_lessons(Lessons(str(path), str(RUBRIC)), tmp_path)


# --- the model


def test_rows_come_from_seed_and_number_alone() -> None:
    found = [TokenizedDemonstration([1, 2], [3 + n, 9], f"r{n}") for n in range(3)]
    first, again, other = (Answers(found, 30, 2, seed) for seed in (1, 1, 2))
    items = [first[i] for i in range(30)]
    assert items[15:] + items[:15] == [again[i] for i in (*range(15, 30), *range(15))]
    assert items != [other[i] for i in range(30)]
    for start in range(0, 30, 3):
        assert sorted(each["input_ids"][2] for each in items[start : start + 3]) == [3, 4, 5]
    assert items[0]["labels"][:2] == [-100, -100]
    assert items[0]["labels"][2:] == items[0]["input_ids"][2:]


def test_batches_are_of_like_length_and_of_all_lengths() -> None:
    found = [TokenizedDemonstration([1] * (1 + n % 40), [2], f"r{n}") for n in range(320)]
    lengths = [len(item["input_ids"]) for item in Answers(found, 320, 8, 0)]
    assert sorted(lengths) == sorted(2 + n % 40 for n in range(320))
    batches = [lengths[at : at + 8] for at in range(0, 320, 8)]
    padded = sum(8 * max(batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)
    firsts = [batch[0] for batch in batches]
    # Not from short to long: what comes next says nothing.
    rises = sum(one < two for one, two in itertools.pairwise(firsts))
    assert 10 < rises < 30


def test_a_chat_model_answers_what_it_learned(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """Trained by the command; its answers come from the template, and end by themselves."""
    lines = [
        {"messages": [{"role": "user", "content": f"{word} {n}?"}, {"role": "assistant", "content": answer}]}
        for n in range(40)
        for word, answer in (("Sea", "Blue, of course."), ("Snow", "White."))
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--chats.path", str(tmp_path / "chats.jsonl"), "--chats.validation_fraction", "0.1"]
    words += ["--shape.vocabulary", "400", "--shape.width", "32", "--shape.layers", "1", "--shape.heads", "2"]
    words += [
        "--shape.positions",
        "64",
        "--shape.dropout",
        "0",
        "--learning.steps",
        "80",
        "--learning.batch_size",
        "16",
    ]
    words += ["--learning.lr", "1e-2", "--threads", "1", "--output", str(tmp_path / "model")]
    assert main(["scratch", "chat", *words]) == 0
    assert "perplexity: 1.0" in capsys.readouterr().out
    generator = LocalGenerator(str(tmp_path / "model"), chat=True)
    asked = [Prompt("sea", "Sea 13?"), Prompt("snow", "Snow 14?")]
    found = {
        prompt.key: texts[0]
        for batch in generator.continued(asked, 1, Sampling(max_new_tokens=16))
        for prompt, texts in batch
    }
    assert {key: (each.text, each.finished) for key, each in found.items()} == {
        "sea": ("Blue, of course.", True),
        "snow": ("White.", True),
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb</s>\n"
    )
    card = json.loads((tmp_path / "model" / "scratch.json").read_text())
    assert card["settings"]["chats"]["path"] == str(tmp_path / "chats.jsonl")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--learning.token_dropout", "0.1"], "token_dropout: has no effect on a chat model"),
        (["--learning.longest", "9"], "learning.longest: has no effect on chats"),
        (["--template", "nowhere.jinja"], "nowhere.jinja: cannot be read"),
        (["--shape.positions", "4"], "all chats are longer than shape.positions (4 tokens)"),
        (["--seed", "-1"], "seed: -1 is not possible"),
    ],
)
def test_settings_that_cannot_be(words: list[str], told: str, lessons: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    given = ["--chats.path", str(lessons / "own.jsonl"), *words, "--output", str(tmp_path / "model")]
    assert main(["scratch", "chat", *given]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert not (tmp_path / "model").exists()


def test_earlier_answers_are_learned_where_they_are_asked_for() -> None:
    row = TokenizedDemonstration([1, 2, 3, 4], [5, 6], "r", [0, 1, 1, 0])
    assert Answers([row], 1, 1, 0)[0]["labels"] == [-100, 2, 3, -100, 5, 6]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for", "is no Jinja template (line 1:"),
        ("{{ messages[0]['content'] + 5 }}", "the chat template refuses these messages"),
    ],
)
def test_templates_that_do_not_work(template: str, told: str, lessons: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    given = [
        "--chats.path",
        str(lessons / "own.jsonl"),
        "--template",
        str(path),
        "--output",
        str(tmp_path / "m"),
    ]
    assert main(["scratch", "chat", *given]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said


def test_plain_text_is_no_chat(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    rows = [{"prompt": f"Sea {n}", "completion": " blue"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--chats.path", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "m")]
    assert main(["scratch", "chat", *given]) == 2
    assert "is plain text; give a chat's turns" in capsys.readouterr().err
