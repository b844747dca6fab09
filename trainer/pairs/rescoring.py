"""The same answers scored by another judge: does it think of them what their model did?"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.judges import Judge
from trainer.ledger import Ledger, Row
from trainer.pairs.building import CANDIDATES, MANIFEST, PAIRS, read_about
from trainer.pairs.judging import compared, spearman
from trainer.pairs.rubric import RECORDED, RUBRIC, Rubric
from trainer.pairs.scoring import marks, told_of
from trainer.provenance import git_revision, read_json, sha256_file, versions, write_json
from trainer.schema import UserError

FOLDER = "rescored"
_LABEL = re.compile(r"[\w.-]+")


def rescore(
    folder: str | Path,
    judge: Judge,
    rubric: Rubric | None = None,
    label: str = "outside",
    progress: bool = False,
) -> dict[str, Any]:
    """Have a judge score every labelled answer of a folder of pairs; returns what `rescored/LABEL.json` then says.

    The rubric's first wording is asked for each criterion; a judge that gives no probabilities is taken at its word.
    Scores are kept prompt by prompt: a rerun asks what is missing. Without a `rubric` it is that of the pairs
    (`rubric_of`); by another one `same_rubric` is false, and criteria are not compared.

    Raises:
        UserError: no merged pairs in the folder, a label that is no name, a judge that stopped answering, or other
            settings than those of the scores that are there.
    """
    folder = Path(folder)
    if not _LABEL.fullmatch(label) or set(label) == {"."}:
        raise UserError(f"--label {label}: should be a name of letters, digits, dots and dashes")
    check_merged(folder)
    rubric = rubric_of(folder) if rubric is None else rubric
    own = _recorded(folder)
    same = None if own is None else own == rubric.describe()["sha256"]
    rows, pairs = _lines(folder / CANDIDATES), _lines(folder / PAIRS)
    settings = {
        # Where a server stands makes no other scores.
        "judge": {name: value for name, value in judge.describe().items() if name != "url"},
        "rubric": rubric.describe(),
        "candidates": sha256_file(folder / CANDIDATES),
    }
    place = folder / FOLDER / label
    try:
        ledger = Ledger(place, settings)
    except UserError as error:
        raise UserError(str(error).replace("give another folder", "give another --label")) from error
    with ledger:
        left = set(ledger.missing(row["key"] for row in rows))
        bar = tqdm(
            total=len(rows),
            initial=len(rows) - len(left),
            desc="scoring",
            unit="prompt",
            disable=not progress,
        )
        with bar:
            for row in rows:
                if row["key"] in left:
                    ledger.add([_scored(row, judge, rubric)])
                    bar.update()
        scored = [ledger.rows[row["key"]] for row in rows]
    found = {"kind": "rescored", "label": label, **settings, "same_rubric": same}
    found |= _findings(rows, scored, pairs, rubric, same is not False)
    files = {name: sha256_file(folder / name) for name in (PAIRS, CANDIDATES)}
    found |= {"files": files, "versions": versions(), "git": git_revision()}
    write_json(folder / FOLDER / f"{label}.json", found)
    return found


def check_merged(folder: Path) -> None:
    """Raise `UserError` for a folder that `tandem pairs` did not begin, or whose shards were not put together."""
    read_about(folder)
    for name in (CANDIDATES, PAIRS, MANIFEST):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}; give a folder that `tandem pairs` merged")


def rubric_of(folder: Path) -> Rubric:
    """The rubric that a folder's pairs were made by; the shipped one where they were made by none.

    Raises:
        UserError: the folder was not begun, or its rubric is not to be had any more, or is another by now.
    """
    own = _recorded(folder)
    if own is None:
        return Rubric.read(RUBRIC)
    if (folder / RECORDED).is_file():
        found, where = Rubric.of_json(folder / RECORDED), folder / RECORDED
    else:
        # Pairs of a version that kept the rubric's path only.
        named = ((read_about(folder)["settings"] or {}).get("init_args") or {}).get("rubric")
        if named is None:
            raise UserError(
                f"{folder}: does not hold the rubric that its pairs were made by; give --rubric FILE"
            )
        found, where = Rubric.read(named), Path(named)
    if found.describe()["sha256"] != own:
        raise UserError(
            f"{where}: is not the rubric that the pairs were made by; give that one by --rubric FILE"
        )
    return found


def _recorded(folder: Path) -> str | None:
    """The hash of the rubric that pairs were made by; None where there was none."""
    builder = read_json(folder / MANIFEST).get("builder") or {}
    rubric = builder.get("rubric")
    return rubric.get("sha256") if isinstance(rubric, Mapping) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _scored(row: Row, judge: Judge, rubric: Rubric) -> Row:
    """A prompt's row of scores: text -> criterion -> score, or why there is none; and the digits' probability."""
    texts = list(dict.fromkeys(each["text"] for each in row["candidates"] if each.get("score") is not None))
    places = [(text, criterion) for text in texts for criterion in rubric.criteria]
    questions = [
        rubric.question(f"{row['key']}/{number:06d}", row["prompt"], text, criterion, 0)
        for number, (text, criterion) in enumerate(places)
    ]
    given = marks(judge, questions, in_words=True)
    scores: dict[str, dict[str, Any]] = {text: {"text": text, "by": {}, "mass": {}} for text in texts}
    for question, (text, criterion) in zip(questions, places, strict=True):
        mark = given[question.key]
        scores[text]["by"][criterion.key], scores[text]["mass"][criterion.key] = mark.score, mark.mass
    return {"key": row["key"], "scores": list(scores.values())}


def _findings(
    rows: Sequence[Row],
    scored: Sequence[Row],
    pairs: Sequence[Mapping[str, Any]],
    rubric: Rubric,
    comparable: bool,
) -> dict[str, Any]:
    by_text = {(row["key"], each["text"]): each["by"] for row in scored for each in row["scores"]}
    labelled = [
        (row["key"], each) for row in rows for each in row["candidates"] if each.get("score") is not None
    ]
    own = [(each, by_text[key, each["text"]]) for key, each in labelled]
    whole = [(each, _mean(by)) for each, by in own]
    known = [(each, score) for each, score in whole if score is not None]
    ends = [
        [_mean(by_text[pair["id"], _words(pair[side])]) for side in ("chosen", "rejected")] for pair in pairs
    ]
    scores = [score for _, score in known]
    return {
        "compared": compared(whole, [(chosen, rejected) for chosen, rejected in ends]),
        "mean": statistics.fmean(scores) if scores else None,
        "sd": statistics.pstdev(scores) if scores else None,
        "with_length": spearman([(score, len(each["text"])) for each, score in known]),
        "criteria": {each.key: _criterion(each.key, own, comparable) for each in rubric.criteria},
        "mass": told_of(
            mass for row in scored for each in row["scores"] for mass in (each.get("mass") or {}).values()
        ),
        "unscored": dict(
            Counter(
                str(why).partition(" (")[0] for _, by in own for why in by.values() if isinstance(why, str)
            )
        ),
    }


def _criterion(
    key: str, own: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], comparable: bool
) -> dict[str, Any]:
    """The other judge's mean of a criterion, and its correlation with the model's own, where it scored that.

    Criteria of two rubrics are not the same, whatever their keys.
    """
    values = [by[key] for _, by in own if not isinstance(by[key], str)]
    both = [
        (each["scores"][key], by[key])
        for each, by in own
        if comparable and key in (each.get("scores") or {}) and not isinstance(by[key], str)
    ]
    return {"mean": statistics.fmean(values) if values else None, "spearman": spearman(both)}


def _mean(by: Mapping[str, float | str]) -> float | None:
    """The mean of all criteria; None where one is missing."""
    values = [value for value in by.values() if not isinstance(value, str)]
    return math.fsum(values) / len(values) if len(values) == len(by) else None


def _words(text: Any) -> str:
    """What a side of a pair says, be it text or one turn."""
    return text if isinstance(text, str) else str(text[0]["content"])
