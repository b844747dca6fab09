"""Files of texts that are there already: one row for each text or each prompt, scored or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pairs.rewards import CountReward
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import build
from trainer.pairs.candidates import CandidateFile
from trainer.schema import UserError


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def row(prompt: str, completion: str, score: Any = None, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "score": score, **more}


ROWS = [
    row("p", "one", 1.0),
    row("q", "two", 5.0),
    row("p", "a b c", 2.5, finished=False),
    row("q", "x", -1.0),
]


def test_the_best_and_the_worst_by_the_file_s_scores(tmp_path) -> None:
    manifest = build(BestOfN(CandidateFile(write(tmp_path / "x.jsonl", *ROWS))), tmp_path / "out").manifest
    found = [(each["prompt"], each["chosen"], each["rejected"], each["chosen_score"], each["chosen_finished"])
             for each in pairs(tmp_path / "out")]  # fmt: skip
    assert found == [("p", "a b c", "one", 2.5, False), ("q", "two", "x", 5.0, True)]
    assert manifest["counts"]["candidates"] == 4
    assert manifest["scores"]["margin_mean"] == pytest.approx((1.5 + 6.0) / 2)


def test_a_reward_scores_them_anew_and_lengths_are_in_words(tmp_path) -> None:
    file = CandidateFile(write(tmp_path / "x.jsonl", *ROWS))
    build(BestOfN(file, reward=CountReward("ow")), tmp_path / "out")
    found = [(each["chosen"], each["rejected"], each["chosen_score"]) for each in pairs(tmp_path / "out")]
    assert found == [("one", "a b c", 1.0), ("two", "x", 2.0)]
    with pytest.raises(UserError, match=r"no pair is left.*dropped_short 2"):
        build(BestOfN(file, min_tokens=2), tmp_path / "short")


def test_what_tandem_made_is_read_again(tmp_path) -> None:
    first = build(BestOfN(CandidateFile(write(tmp_path / "x.jsonl", *ROWS))), tmp_path / "a").manifest
    again = build(BestOfN(CandidateFile(str(tmp_path / "a" / "candidates.jsonl"))), tmp_path / "b").manifest
    assert first["files"] == again["files"]


def test_other_names_keys_and_words_of_a_csv(tmp_path) -> None:
    (tmp_path / "x.csv").write_text(
        "q,a,points,finished,key\n,good,2,true,1\n,bad,1,FALSE,1\n,so,3,,2\n,la,1,,2\n"
    )
    columns = {"prompt": "q", "completion": "a", "score": "points"}
    build(BestOfN(CandidateFile(str(tmp_path / "x.csv"), columns)), tmp_path / "out")
    found = [
        (each["chosen"], each["rejected"], each["rejected_finished"]) for each in pairs(tmp_path / "out")
    ]
    assert found == [("good", "bad", False), ("so", "la", True)]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([row("p", "a"), row("p", "b")], {}, "has no scores; give a reward"),
        ([{"completion": "a"}], {}, r"no column 'prompt'; its columns are: completion"),
        ([{"prompt": "p", "text": "a"}], {}, "no column 'completion'"),
        ([row("p", "a", "much")], {}, r"x\.jsonl, row 1: column 'score' holds 'much'; .* finite number"),
        ([row("p", "a", True)], {}, "column 'score' holds True"),
        ([row("p", 3, 1.0)], {}, "column 'completion' holds 3; it should be text"),
        ([row("p", "a", 1.0, finished="maybe")], {}, "column 'finished' holds 'maybe'; it should be true or false"),
        ([row("p", "a", 1.0, key="k"), row("q", "a", 1.0, key="k")], {}, "key 'k' has another prompt"),
        ([{"prompt": "p", "candidates": "a"}], {}, "column 'candidates' holds no list"),
        ([{"prompt": "p", "candidates": ["a"]}], {}, r"row 1, candidate 1: is no object"),
        ([{"prompt": "p", "candidates": []}], {}, "has no text"),
        (ROWS, {"columns": {"answer": "completion"}}, r"columns maps \['answer'\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, rows, settings, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(BestOfN(CandidateFile(write(tmp_path / "x.jsonl", *rows), **settings)), tmp_path / "out")
    assert "x.jsonl" in str(caught.value)


def test_blank_and_invalid_texts_need_no_score(tmp_path) -> None:
    candidates = [
        {"text": " ", "score": None},
        {"text": "", "score": None, "tokens": 0, "invalid": "status 500"},
        {"text": "one", "score": 1.0},
        {"text": "two", "score": 2.0},
    ]
    path = write(tmp_path / "x.jsonl", {"prompt": "p", "candidates": candidates})
    manifest = build(BestOfN(CandidateFile(path)), tmp_path / "a").manifest
    assert [(each["chosen"], each["rejected"]) for each in pairs(tmp_path / "a")] == [("two", "one")]
    assert manifest["counts"]["candidates_invalid"] == manifest["counts"]["candidates_short"] == 1
    again = build(BestOfN(CandidateFile(str(tmp_path / "a" / "candidates.jsonl"))), tmp_path / "b").manifest
    assert again["files"] == manifest["files"]


def test_texts_of_which_only_some_have_a_score(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", *ROWS[:3], row("q", "none"), row("q", " "))
    with pytest.raises(UserError, match=r"x\.jsonl, row 4: has no score, and other texts have one"):
        build(BestOfN(CandidateFile(path)), tmp_path / "out")
    build(BestOfN(CandidateFile(path), reward=CountReward("ow")), tmp_path / "out")


def test_a_new_reward_leaves_no_old_score(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", *ROWS, row("r", " ", 3.0), row("r", "", 4.0))
    build(BestOfN(CandidateFile(path), reward=CountReward("ow")), tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert [each["score"] for each in rows[2]["candidates"]] == [None, None]
