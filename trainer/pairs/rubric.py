"""A rubric: what answers are scored by, and the texts with which a model is asked; files in any language.

A rubric is a YAML file: `language` (ru or en: what answers should be written in), `criteria` (key -> `name` and `asks`)
and `prompts`: text files beside it. `answer` holds {instruction}; `plain` and `json` hold {instruction} and {criteria};
each of `score` holds {instruction}, {answer}, {criterion} and {description}.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from trainer.judges import Question
from trainer.pairs.estimates import Form
from trainer.provenance import sha256_text
from trainer.schema import UserError

RUBRIC = Path(__file__).resolve().parents[2] / "configs" / "oasst_ru" / "rubric_ru.yaml"
RECORDED = "rubric.json"
"""What a folder of pairs that were made by a rubric keeps it in."""
SCORES = ("1", "2", "3", "4", "5")
Language = Literal["ru", "en"]

_PLACE = re.compile(r"\{(instruction|criteria|answer|criterion|description)\}")
_PLACES = {
    "answer": {"instruction"},
    "plain": {"instruction", "criteria"},
    "json": {"instruction", "criteria"},
    "score": {"instruction", "answer", "criterion", "description"},
}


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One quality: its key in files, its name, and what it asks."""

    key: str
    name: str
    asks: str


@dataclasses.dataclass(frozen=True)
class Rubric:
    """`prompts`: how the instruction is put (`answer`, `plain`, `json`); `score`: wordings of the scoring question."""

    language: Language
    criteria: tuple[Criterion, ...]
    prompts: Mapping[str, str]
    score: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> Rubric:
        """Raises `UserError` that names the file, the field, and what it should be."""
        path = Path(path)
        found = _mapping(_yaml(path), str(path), "language", "criteria", "prompts")
        language = found["language"]
        if language not in get_args(Language):
            raise UserError(
                f"{path}: language is {language!r}; it should be {' or '.join(get_args(Language))}"
            )
        if not isinstance(found["criteria"], Mapping) or not found["criteria"]:
            raise UserError(
                f"{path}: criteria holds nothing; it should have at least one, with name and asks"
            )
        criteria = tuple(_criterion(str(key), each, path) for key, each in found["criteria"].items())
        if len({each.name.casefold() for each in criteria}) < len(criteria):
            raise UserError(f"{path}: two criteria have one name; each should have its own")
        prompts = _mapping(found["prompts"], f"{path}: prompts", *_PLACES)
        score = prompts.pop("score")
        if not isinstance(score, list) or not score:
            raise UserError(f"{path}: prompts.score is {score!r}; it should be a list of text files")
        texts = {name: _text(path, name, file, f"prompts.{name}") for name, file in prompts.items()}
        wordings = [
            _text(path, "score", file, f"prompts.score, number {n}") for n, file in enumerate(score, start=1)
        ]
        return cls(language, criteria, texts, tuple(wordings))

    @classmethod
    def of_json(cls, path: str | Path) -> Rubric:
        """What `as_json` gave. Raises `UserError` for a file that holds anything else."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            criteria = tuple(Criterion(**each) for each in found.pop("criteria"))
            return cls(criteria=criteria, score=tuple(found.pop("score")), **found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: holds no rubric ({reason}); give one by --rubric FILE") from error

    def as_json(self) -> str:
        """All of it, texts too, for a folder that should need no other file."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2) + "\n"

    def asked(self, instruction: str, form: Form | None) -> str:
        """What the model is asked for an answer; with a form, for its score, too."""
        told = "\n".join(f"- {each.name}: {each.asks}" for each in self.criteria)
        return _filled(self.prompts[form or "answer"], instruction=instruction, criteria=told)

    def question(
        self, key: str, instruction: str, answer: str, criterion: Criterion, wording: int
    ) -> Question:
        """The scoring question in one of its wordings."""
        text = _filled(
            self.score[wording],
            instruction=instruction,
            answer=answer,
            criterion=criterion.name,
            description=criterion.asks,
        )
        return Question(key, text, SCORES, (instruction, answer))

    def describe(self) -> dict[str, Any]:
        """For rows: all of the criteria and texts, as one hash, and what can be told in words."""
        told = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False)
        return {
            "language": self.language,
            "criteria": [each.key for each in self.criteria],
            "sha256": sha256_text(told),
        }


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"rubric {path}: cannot be read ({reason}); give the YAML file of a rubric"
        ) from error


def _mapping(value: Any, where: str, *names: str) -> dict[str, Any]:
    """A mapping with just these keys."""
    if not isinstance(value, Mapping) or set(value) != set(names):
        has = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
        raise UserError(f"{where}: holds {has}; it should hold {', '.join(names)}")
    return dict(value)


def _criterion(key: str, value: Any, path: Path) -> Criterion:
    each = _mapping(value, f"{path}: criteria.{key}", "name", "asks")
    for name, text in each.items():
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: criteria.{key}.{name} is {text!r}; it should be text")
    return Criterion(key, each["name"].strip(), each["asks"].strip())


def _text(rubric: Path, name: str, file: Any, field: str) -> str:
    """The text of a prompt's file, which holds its places."""
    path = rubric.parent / str(file)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{rubric}: {field}: {path} cannot be read as UTF-8 text ({error})") from error
    there, wanted = set(_PLACE.findall(text)), _PLACES[name]
    if there != wanted:
        told = ", ".join(f"{{{place}}}" for place in sorted(wanted))
        raise UserError(
            f"{path}: holds {', '.join(f'{{{place}}}' for place in sorted(there)) or 'no place'}; it should hold {told}"
        )
    return text


def _filled(text: str, **values: str) -> str:
    """The text with its places filled, once: what stands in a value stays as it is."""
    return _PLACE.sub(lambda found: values[found[1]], text)
