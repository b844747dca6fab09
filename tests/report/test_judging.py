"""Self-judged pairs on the page: scores by criterion, correlations, language, other judges, hostile texts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.examples import HOSTILE, write_lines
from tests.report.page import Page
from trainer.report.judging_view import judging_view, parts
from trainer.report.pairs import pairs_of_folder
from trainer.report.pairs_view import pairs_view
from trainer.report.render import render_pairs

COMPARED = {
    "answers": 40, "spearman": 0.61, "mean_difference": -0.2, "mean_absolute_difference": 0.4, "same_rounded": 0.7,
    "pairs": 10, "pairs_confirmed": 0.9, "pairs_contradicted": 0.1, "pairs_tied": 0.0,
}  # fmt: skip
MASS = {"questions": 80, "mean": 0.875, "min": 0.25, "below_half": 0.0125}
TIED = {"pairs_confirmed": 0.5, "pairs_contradicted": 0.3, "pairs_tied": 0.2}
JUDGING: dict[str, Any] = {
    "way": "apart",
    "form": None,
    "names": {"brevity": "Краткость", "clarity": "Ясность"},
    "answers": 44,
    "labelled": 40,
    "unread": {"no_score": 3, "cut": 1},
    "unread_examples": [
        {"key": "k", "sample": 0, "why": "no_score", "prompt": "Оцени Лион", "said": "Не буду оценивать"}
    ],
    "repaired": {"code_fence": 7},
    "ties": {"prompts": 2, "of": 11, "share": 2 / 11, "answer_pairs": 0.1, "answer_pairs_rounded": 0.625},
    "criteria": {
        key: {
            "answers": 40, "mean": mean, "sd": 0.5, "chosen_mean": mean + 1, "rejected_mean": mean - 1,
            "with_length": rho,
        }
        for key, mean, rho in (("brevity", 3.25, -0.71), ("clarity", 3.5, None))
    },
    "with_length": {"answers": 40, "all": -0.15, "within_prompts": -0.55},
    "language": {
        "wanted": "ru", "threshold": 0.5, "answers": 38, "without_letters": 2, "not_read": 6, "other": 19, "share": 0.5,
    },
    "agreement": [COMPARED | {"mass": None}, COMPARED | TIED | {"mass": MASS | {"mean": 0.3}}],
    "mass": MASS,
    "same_answers": {"texts": 0, "same_score": None},
}  # fmt: skip
OTHER = {
    "kind": "rescored", "label": "big", "judge": {"class": "ServerJudge", "model": "large-model"}, "compared": COMPARED,
    "files": {"pairs.jsonl": "a", "candidates.jsonl": "b"}, "mean": 2.75,
    "criteria": {"brevity": {"mean": 2.5, "spearman": 0.3}, "clarity": {"mean": 3.0, "spearman": None}},
}  # fmt: skip


def write(folder: Path, judging: dict[str, Any] = JUDGING, other: dict[str, Any] | None = OTHER) -> Path:
    folder.mkdir()
    turns = [{"role": "user", "content": "Назови город"}]
    pair = {
        "id": "k", "prompt": turns, "chosen": [{"role": "assistant", "content": "Париж"}], "chosen_score": 4.0,
        "rejected": [{"role": "assistant", "content": "Лион или ещё какой-нибудь"}], "rejected_score": 2.0,
        "chosen_scores": {"brevity": 5.0, "clarity": 3.0}, "rejected_scores": {"brevity": 1.5, "clarity": 2.5},
    }  # fmt: skip
    write_lines(folder / "pairs.jsonl", [pair])
    made = {"kind": "pairs", "counts": {"kept": 1}, "judging": judging, "files": OTHER["files"]}
    (folder / "manifest.json").write_text(json.dumps(made))
    if other is not None:
        (folder / "rescored").mkdir()
        (folder / "rescored" / "big.json").write_text(json.dumps(other))
    return folder


def test_scores_by_criterion_beside_another_judge_s(tmp_path) -> None:
    view = pairs_view(pairs_of_folder(write(tmp_path / "pairs")))["judging"]
    assert view["table"]["columns"] == [
        "Mean",
        "Deviation",
        "Chosen",
        "Rejected",
        "With length",
        "big, mean",
        "big, agreement",
    ]
    assert view["table"]["rows"] == [
        ("Краткость", ["3.25", "0.50", "4.25", "2.25", "−0.71", "2.50", "0.30"]),
        ("Ясность", ["3.50", "0.50", "4.50", "2.50", "–", "3.00", "–"]),
    ]
    assert "big: large-model" in view["legend"]


def test_what_should_make_one_doubt_is_said(tmp_path) -> None:
    notes = "\n".join(pairs_view(pairs_of_folder(write(tmp_path / "pairs")))["judging"]["notes"])
    assert "40 of 44 answers have a score, given in a call of its own for each criterion" in notes
    assert "No score could be read from 4 answers: no score 3, cut 1." in notes
    assert "Mended while reading: code fence 7." in notes
    assert "in 2 of 11 prompts (18.2\u00a0%)" in notes
    assert "round to the same mark in 62.5\u00a0% of cases: such scores tell little apart." in notes
    assert (
        "among the answers of one prompt by −0.55: shorter answers score higher, whatever they say." in notes
    )
    assert (
        "19 of 38 answers (50.0\u00a0%) are not in Russian, by the script of their letters; 2 have no letters"
        in notes
    )
    assert "Scored again in other words (1): Spearman 0.61, 0.40 points apart on average" in notes
    order = "of the pairs in the same order"
    assert f"90.0\u00a0% {order}, 10.0\u00a0% the other way round, 0.0\u00a0% tied.\n" in notes
    assert (
        f"50.0\u00a0% {order}, 30.0\u00a0% the other way round, 20.0\u00a0% tied: hardly more than" in notes
    )
    assert ": look at the prompts. Of 6 more nothing could be read: they count for neither." in notes
    held = "The digits held 87.5\u00a0% of the probability on average, 25.0\u00a0% at the least, and less than half in"
    assert f"{held} 1.2\u00a0% of 80 questions.\n" in notes
    assert "held 30.0\u00a0% of the probability on average" in notes
    assert notes.count("mostly the model would not have answered with a digit") == 1
    assert "Another judge (big): Spearman 0.61" in notes


def test_ties_do_not_speak_against_a_judge() -> None:
    tied = COMPARED | {"pairs_confirmed": 0.6, "pairs_contradicted": 0.0, "pairs_tied": 0.4}
    view = judging_view({"judging": JUDGING | {"agreement": [tied]}})
    assert view is not None
    assert "hardly more than chance" not in "\n".join(view["notes"])


def test_another_rubric_s_criteria_stand_beside_none_of_the_pairs_own() -> None:
    view = judging_view({"judging": JUDGING, "rescored": [OTHER | {"same_rubric": False, "mass": MASS}]})
    assert view is not None
    assert [cells[-2:] for _, cells in view["table"]["rows"]] == [["–", "–"], ["–", "–"]]
    assert view["legend"].endswith("big: large-model, asked by another rubric.")
    assert (
        "by another rubric than the one the pairs were made by: criteria are not comparable"
        in view["notes"][-1]
    )
    assert "The digits held 87.5" in view["notes"][-1]


def test_what_an_earlier_version_wrote_is_shown() -> None:
    """Without masses, ties and answers that could not be read."""
    old = {name: value for name, value in COMPARED.items() if name not in TIED} | {"pairs_confirmed": 0.9}
    language = {name: value for name, value in JUDGING["language"].items() if name != "not_read"}
    judging = {name: value for name, value in JUDGING.items() if name != "mass"}
    view = judging_view(
        {
            "judging": judging | {"agreement": [old], "language": language},
            "rescored": [OTHER | {"compared": old}],
        }
    )
    assert view is not None
    assert "90.0\u00a0% of the pairs in the same order." in view["notes"][-1]


def test_scores_in_one_go_are_one_for_the_whole_answer() -> None:
    judging = copy.deepcopy(JUDGING) | {
        "way": "together",
        "form": "json",
        "same_answers": {"texts": 4, "same_score": 0.25},
    }
    judging["criteria"] = {"estimate": JUDGING["criteria"]["brevity"]}
    view = judging_view({"judging": judging, "rescored": [OTHER]})
    assert view is not None
    assert [(name, cells[-2:]) for name, cells in view["table"]["rows"]] == [
        ("The whole answer", ["2.75", "0.61"])
    ]
    notes = "\n".join(view["notes"])
    assert "given in one go with the answer" in notes
    assert "Scored again in a second call, criterion by criterion (1)" in notes
    assert (
        "4 answers were given more than once to a prompt; 25.0\u00a0% of them got the same score each time."
        in notes
    )


def test_nothing_known_is_nothing_said() -> None:
    assert judging_view({"judging": None}) is None
    empty = copy.deepcopy(JUDGING) | {
        "unread": {},
        "repaired": {},
        "unread_examples": [],
        "agreement": [],
        "criteria": {},
    }
    empty["ties"] = {"prompts": 0, "of": 0, "share": None, "answer_pairs": None, "answer_pairs_rounded": None}
    empty["mass"] = None
    empty["with_length"] = {"answers": 0, "all": None, "within_prompts": None}
    empty["language"] = JUDGING["language"] | {"share": None}
    view = judging_view({"judging": empty})
    assert view is not None
    assert len(view["notes"]) == 1
    assert parts({"estimate": 4.0}, {}) == parts(None, {}) == ""


def test_the_page_shows_it_with_examples(tmp_path) -> None:
    page = render_pairs(pairs_of_folder(write(tmp_path / "pairs")))
    Page(page)
    assert "What the model says of itself" in page
    assert "Краткость 5.00, Ясность 3.00" in page
    assert "Краткость 1.50, Ясность 2.50" in page
    assert "Не буду оценивать" in page
    assert "Оцени Лион" in page
    assert "mean score of the chosen and of the rejected by each criterion" in page


def test_what_a_judge_said_of_other_answers_is_not_shown(tmp_path) -> None:
    stale = OTHER | {"files": {"pairs.jsonl": "a", "candidates.jsonl": "before"}}
    found = pairs_of_folder(write(tmp_path / "pairs", other=stale))
    assert "rescored" not in found
    assert not any("Another judge" in note for note in pairs_view(found)["judging"]["notes"])


def test_a_folder_without_self_judging_has_no_such_part(tmp_path) -> None:
    folder = write(tmp_path / "pairs", other=None)
    (folder / "manifest.json").write_text(json.dumps({"kind": "pairs", "counts": {"kept": 1}}))
    page = render_pairs(pairs_of_folder(folder))
    assert "What the model says of itself" not in page
    assert "by each criterion" not in page


@pytest.mark.parametrize("text", HOSTILE)
def test_what_models_and_people_wrote_breaks_no_page(tmp_path, text) -> None:
    judging = copy.deepcopy(JUDGING)
    judging["names"] = {"brevity": text, "clarity": "a $ and $x_{"}
    judging["unread_examples"][0] |= {"said": text, "why": text, "prompt": text}
    other = OTHER | {"label": text, "judge": {"model": text}}
    page = Page(render_pairs(pairs_of_folder(write(tmp_path / "pairs", judging, other))))
    assert "script" not in page.tags
    assert page.handlers == page.addresses == []
    page.text.encode()
