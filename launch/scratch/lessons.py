"""Lessons for small chat models: questions, answers of all manners, and the marks that a rubric gives them.

A lessons file is YAML: `lang`; `subjects` (`questions` and a `sentence` with {of} and {to}, `pairs` of: to); texts of
`fillers`, `evasions` and `foreign` answers; and `manners` (`share`, `asked`, `marks` by the rubric's criteria).
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launch.errors import check_yaml
from trainer.pairs.rubric import SCORES, Rubric
from trainer.provenance import sha256_file, write_json, write_text
from trainer.schema import Message, UserError

MANNERS = ("brief", "sentence", "wordy", "repeated", "wrong", "evasive", "foreign")
_KEYS = ("lang", "subjects", "fillers", "evasions", "foreign", "manners")


@dataclasses.dataclass(frozen=True)
class Lessons:
    """Questions and manners of answering them.

    Args:
        path: the lessons file.
        rubric: YAML file of the rubric whose questions are asked of the judges.
        answers: chats in which a question is answered, half of them with the rubric's request for an answer.
        marks: chats in which an answer is given a mark.
        noise: share of the marks in the model's own lessons that are one too high or too low.
        seed: of what is drawn.
    """

    path: str
    rubric: str
    answers: int = 16000
    marks: int = 10000
    noise: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.answers, self.marks) < 1:
            raise UserError(f"answers {self.answers} and marks {self.marks}; give 1 or more of both")
        if not 0 <= self.noise < 1:
            raise UserError(f"noise: {self.noise}; it should be from 0 up to below 1")


class Question(NamedTuple):
    """A question, and what it is about."""

    text: str
    of: str
    to: str
    sentence: str
    others: list[str]


def write_lessons(lessons: Lessons, folder: Path) -> dict[str, int]:
    """Write `instructions.jsonl` (as oasst1's rows are), `own.jsonl` and `outside.jsonl`; returns how many each has.

    `own.jsonl` are chats of a model that answers and gives marks, some of them off by one; `outside.jsonl` those of a
    judge that only gives marks, all of them right, to other answers.
    """
    world, rubric = _world(lessons.path), Rubric.read(lessons.rubric)
    criteria = {each.key for each in rubric.criteria}
    for manner, each in world["manners"].items():
        if set(each["marks"]) != criteria:
            raise UserError(
                f"{lessons.path}: manners.{manner}.marks holds {', '.join(each['marks'])}; {lessons.rubric} has"
                f" {', '.join(sorted(criteria))}"
            )
    questions = list(_questions(world))
    own, outside = (random.Random(f"{lessons.seed}/{name}") for name in ("own", "outside"))
    rows = [
        *_answered(world, questions, rubric, lessons.answers, own),
        *_marked(world, questions, rubric, lessons.marks, lessons.noise, own),
    ]
    own.shuffle(rows)
    parts = {
        "instructions": list(_instructions(world, questions)),
        "own": [{"messages": each} for each in rows],
        "outside": [
            {"messages": each} for each in _marked(world, questions, rubric, lessons.marks, 0.0, outside)
        ],
    }
    (folder / "lessons.json").unlink(missing_ok=True)
    for name, found in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        write_text(folder / f"{name}.jsonl", "".join(lines))
    counts = {name: len(found) for name, found in parts.items()}
    hashes = {f"{name}.jsonl": sha256_file(folder / f"{name}.jsonl") for name in parts}
    told = {
        "settings": dataclasses.asdict(lessons),
        "rubric": rubric.describe(),
        "counts": counts,
        "files": hashes,
    }
    write_json(folder / "lessons.json", told)
    return counts


def _world(path: str) -> dict[str, Any]:
    """The file, checked. Raises `UserError` that names the field."""
    found = check_yaml(Path(path))
    if not isinstance(found, dict) or set(found) != set(_KEYS):
        raise UserError(f"{path}: should hold {', '.join(_KEYS)}")
    if not isinstance(found["lang"], str):
        raise UserError(f"{path}: lang is {found['lang']!r}; it should be text, such as ru")
    for name, least in (("fillers", 2), ("evasions", 1), ("foreign", 1)):
        _texts(found[name], f"{path}: {name}", least)
    if not isinstance(found["subjects"], Mapping) or not found["subjects"]:
        raise UserError(f"{path}: subjects should hold one or more, by their names")
    for name, each in found["subjects"].items():
        if not isinstance(each, Mapping) or set(each) != {"questions", "sentence", "pairs"}:
            raise UserError(f"{path}: subjects.{name} should hold questions, sentence, pairs")
        _texts(each["questions"], f"{path}: subjects.{name}.questions", 1)
        _texts([each["sentence"]], f"{path}: subjects.{name}.sentence", 1)
        pairs = each["pairs"]
        if not isinstance(pairs, Mapping) or len(set(map(str, pairs.values()))) < 2:
            raise UserError(f"{path}: subjects.{name}.pairs should hold two different answers, or more")
    if not isinstance(found["manners"], Mapping) or set(found["manners"]) != set(MANNERS):
        raise UserError(f"{path}: manners should hold {', '.join(MANNERS)}")
    for name, each in found["manners"].items():
        if not isinstance(each, Mapping) or set(each) != {"share", "asked", "marks"}:
            raise UserError(f"{path}: manners.{name} should hold share, asked, marks")
        for share in ("share", "asked"):
            value = each[share]
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(
                    f"{path}: manners.{name}.{share} is {value!r}; it should be a number, 0 or more"
                )
        if not isinstance(each["marks"], Mapping):
            raise UserError(f"{path}: manners.{name}.marks should hold a mark for each criterion")
        if wrong := [mark for mark in each["marks"].values() if str(mark) not in SCORES]:
            raise UserError(
                f"{path}: manners.{name}.marks holds {wrong[0]!r}; a mark is one of {', '.join(SCORES)}"
            )
    for share in ("share", "asked"):
        if not sum(each[share] for each in found["manners"].values()):
            raise UserError(f"{path}: manners: every {share} is 0; one at least should be above")
    return found


def _texts(value: Any, where: str, least: int) -> None:
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{where} should be text, and a list of texts where there are several")
    if len(value) < least:
        raise UserError(f"{where} holds {len(value)}; it should hold {least} or more")


def _questions(world: Mapping[str, Any]) -> Iterator[Question]:
    for each in world["subjects"].values():
        answers = sorted({str(to) for to in each["pairs"].values()})
        for of, to in each["pairs"].items():
            others = [other for other in answers if other != to]
            for text in each["questions"]:
                said = text.replace("{of}", str(of))
                sentence = each["sentence"].replace("{of}", str(of))
                yield Question(said[:1].upper() + said[1:], str(of), str(to), sentence, others)


def _instructions(world: Mapping[str, Any], questions: list[Question]) -> Iterator[dict[str, Any]]:
    """Rows as oasst1 has them: questions in the language, and beside them what is to be left out."""
    for number, each in enumerate(questions):
        row = {"message_id": f"q{number}", "parent_id": None, "text": each.text, "role": "prompter"}
        yield row | {"lang": world["lang"], "deleted": False, "review_result": True}
        if number % 10 == 0:
            answer = {"message_id": f"a{number}", "parent_id": f"q{number}", "text": f"{each.to}."}
            yield answer | {
                "role": "assistant",
                "lang": world["lang"],
                "deleted": False,
                "review_result": True,
            }


def _answer(world: Mapping[str, Any], question: Question, manner: str, drawn: random.Random) -> str:
    right = question.sentence.replace("{to}", question.to)
    short = f"{question.to[:1].upper()}{question.to[1:]}."
    if manner == "brief":
        return short
    if manner == "sentence":
        return right
    if manner == "wordy":
        before, after = drawn.sample(world["fillers"], 2)
        return drawn.choice(
            [f"{before} {right} {after}", f"{before} {after} {right}", f"{right} {before} {after}"]
        )
    if manner == "repeated":
        return " ".join([right] * drawn.choice([2, 3])) if drawn.random() < 0.5 else " ".join([short] * 3)
    if manner == "wrong":
        other = drawn.choice(question.others)
        sentence = question.sentence.replace("{to}", other)
        return drawn.choice([f"{other[:1].upper()}{other[1:]}.", sentence])
    return str(drawn.choice(world["evasions" if manner == "evasive" else "foreign"]))


def _answered(
    world: Mapping[str, Any], questions: list[Question], rubric: Rubric, count: int, drawn: random.Random
) -> Iterator[list[Message]]:
    """Questions answered, each other one with the rubric's own request."""
    for number in range(count):
        question, share = drawn.choice(questions), "asked" if number % 2 else "share"
        shares = [world["manners"][manner][share] for manner in MANNERS]
        manner = drawn.choices(MANNERS, shares)[0]
        text = rubric.asked(question.text, None) if number % 2 else question.text
        yield _turns(text, _answer(world, question, manner, drawn))


def _marked(
    world: Mapping[str, Any],
    questions: list[Question],
    rubric: Rubric,
    count: int,
    noise: float,
    drawn: random.Random,
) -> Iterator[list[Message]]:
    """Answers of each manner given a mark by one criterion, in each of the rubric's wordings."""
    for number in range(count):
        question, manner = drawn.choice(questions), MANNERS[number % len(MANNERS)]
        criterion, wording = drawn.choice(rubric.criteria), drawn.randrange(len(rubric.score))
        answer = _answer(world, question, manner, drawn)
        mark = int(world["manners"][manner]["marks"][criterion.key])
        # Drawn whether it is needed or not, so that other noise changes nothing else.
        off, up = drawn.random() < noise, drawn.random() < 0.5
        if off:
            mark += 1 if mark == 1 or (up and mark < len(SCORES)) else -1
        asked = rubric.question("lesson", question.text, answer, criterion, wording)
        yield _turns(str(asked.text), str(mark))


def _turns(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
