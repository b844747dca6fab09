"""What lies in pairs: numbers worked out by hand, examples from both ends, any file of preferences, the page."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from launch.commands.pairs_show import main
from tests.report.examples import HOSTILE, write_lines, write_pairs
from tests.report.page import Page
from trainer.report.pairs import Pairs, histogram, pairs_of_file, pairs_of_folder
from trainer.report.pairs_view import pairs_view
from trainer.report.render import render_pairs
from trainer.schema import UserError


def rows(scores: list[tuple[float | None, float | None]]) -> list[dict]:
    return [
        {"prompt": f"p{n}", "chosen": "c" * (n + 1), "rejected": "rr", "chosen_score": c, "rejected_score": r}
        for n, (c, r) in enumerate(scores)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("made") / "pairs")


def test_the_numbers_are_those_of_the_rows(tmp_path):
    write_lines(tmp_path / "a.jsonl", rows([(3.0, 1.0), (5.0, 0.0), (None, None), (1.0, 0.5)]))
    found = pairs_of_file(Pairs(str(tmp_path / "a.jsonl")))
    assert found["pairs"] == 4
    assert found["counts"]["kept"] == 4
    assert found["scores"]["chosen"]["mean"] == pytest.approx(3.0)
    assert found["scores"]["rejected"]["mean"] == pytest.approx(0.5)
    assert found["margin"]["mean"] == pytest.approx((2 + 5 + 0.5) / 3)
    assert found["margin"]["median"] == pytest.approx(2.0)
    assert found["lengths"]["chosen"]["mean"] == pytest.approx(2.5)
    assert found["lengths"]["chosen_longer"] == pytest.approx(0.5)
    assert found["lengths"]["equally_long"] == pytest.approx(0.25)
    assert [example["prompt"] for example in found["examples"]["widest"]] == ["p1", "p0", "p3"]
    assert found["finished"] is None


def test_examples_come_from_both_ends_and_the_middle(tmp_path):
    margins = [7, 1, 30, 12, 25, 3, 18, 22, 9, 27, 5, 15, 20, 2, 28, 11]
    write_lines(tmp_path / "a.jsonl", rows([(float(margin), 0.0) for margin in margins]))
    found = pairs_of_file(Pairs(str(tmp_path / "a.jsonl")))["examples"]
    taken = {name: [example["chosen_score"] for example in examples] for name, examples in found.items()}
    assert taken["widest"] == [30, 28, 27, 25, 22, 20]
    assert taken["narrowest"] == [1, 2, 3, 5, 7, 9]
    assert set(taken["middle"]) <= {11, 12, 15, 18}


def test_rows_that_training_leaves_out_do_not_shift_the_scores(tmp_path):
    first, second, third = rows([(3.0, 1.0), (5.0, 0.0), (2.0, 1.5)])
    same = first | {"rejected": first["chosen"], "chosen_score": 100.0}
    write_lines(tmp_path / "a.jsonl", [same, first, first, second | {"chosen": " "}, third])
    found = pairs_of_file(Pairs(str(tmp_path / "a.jsonl")))
    assert found["pairs"] == 2
    assert found["scores"]["chosen"]["mean"] == pytest.approx(2.5)
    left = {row["name"]: row["count"] for row in pairs_view(found)["flow"]}
    assert left["Kept"] == "2"
    assert left["Left out: chosen and rejected the same"] == "1"
    assert left["Left out: an empty text"] == "1"


def test_a_histogram_counts_every_value_once():
    values = {"chosen": np.array([0.0, 1.0, 2.0, 2.0]), "rejected": np.array([-1.0])}
    found = histogram(values)
    assert found["edges"][0] == -1.0
    assert found["edges"][-1] == 2.0
    assert sum(found["counts"]["chosen"]) == 4
    assert found["outside"] == 0
    assert histogram({"chosen": np.array([])}) is None
    assert histogram({"chosen": np.array([3.0, 3.0])})["edges"][0] == 2.5


def test_a_few_far_values_do_not_press_a_histogram_together():
    values = np.concatenate([np.linspace(0, 1, 999), [1e9]])
    found = histogram({"chosen": values})
    assert found["edges"][-1] < 2
    assert found["outside"] == 1000 - sum(found["counts"]["chosen"]) > 0
    assert found["total"] == {"chosen": 1000}


def test_a_folder_tells_its_counts_its_candidates_and_how_it_was_made(folder):
    found = pairs_of_folder(folder)
    made = json.loads((folder / "manifest.json").read_text())
    assert found["counts"] == made["counts"]
    assert found["candidates"]["texts"] == 240
    assert sum(found["histograms"]["scores"]["counts"]["candidates"]) == 240
    view = pairs_view(found)
    assert view["headline"].startswith("60 pairs from 77 prompts: the chosen score ")
    assert [row["name"] for row in view["flow"]] == [
        "Kept",
        "Left out: margin too small",
        "Left out: too short",
    ]
    assert view["flow"][0]["share"] == pytest.approx(100 * 60 / 77)
    assert view["table"]["columns"] == ["Chosen", "Rejected", "All"]
    facts = dict(view["facts"])
    assert facts["generator base"] == "lvwerra/gpt2-imdb"
    assert facts["min margin"] == "0.5"
    assert facts["Time"] == "6 min 12 s"


def test_a_score_that_follows_length_is_said(tmp_path):
    found = {"candidates": {"texts": 9, "score_with_length": 0.61}, "lengths": None}
    assert pairs_view(found)["notes"] == [
        "Over all 9 candidates, scores and lengths in tokens correlate by 0.61: longer texts score higher, and a policy"
        " may learn just that."
    ]
    found["candidates"]["score_with_length"] = -0.05
    found["counts"] = {"candidates_short": 3, "candidates_duplicate": 0, "candidates_invalid": 1}
    assert pairs_view(found)["notes"] == [
        "Over all 9 candidates, scores and lengths in tokens correlate by −0.05.",
        "Of the candidates were left out: 3 too short, 1 without a finite score.",
    ]
    write_lines(tmp_path / "pairs.jsonl", rows([(2.0, 0.0)]))
    texts = [{"text": "x", "tokens": n, "finished": True, "score": -float(n)} for n in range(1, 9)]
    write_lines(tmp_path / "candidates.jsonl", [{"key": "p0", "prompt": "p0", "candidates": texts}])
    assert pairs_of_folder(tmp_path)["candidates"]["score_with_length"] == pytest.approx(-1)


def test_the_page_is_whole_harmless_and_says_the_figures(folder):
    found = pairs_of_folder(folder)
    page = render_pairs(found)
    parsed = Page(page)
    assert parsed.harmless
    assert page.count("<svg") == 3
    assert page == render_pairs(found)
    for words in (
        "Widest margins",
        "From the middle",
        "Narrowest margins",
        "margin too small",
        "lvwerra/gpt2-imdb",
    ):
        assert words in parsed.text
    for evil in (HOSTILE[0], HOSTILE[1]):
        assert evil in parsed.text
    assert "�right to left� ␀␛[31m" in parsed.text
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_command_writes_the_page_beside_the_pairs(folder, capsys):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'pairs.html'}\n"
    found = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    assert found["pairs"] == 60
    Page((folder / "pairs.html").read_text(encoding="utf-8"))


def test_any_preference_file_is_shown(tmp_path, capsys):
    dialogues = [
        {"chosen": f"\n\nHuman: {n}?\n\nAssistant: yes {n}", "rejected": f"\n\nHuman: {n}?\n\nAssistant: no"}
        for n in range(9)
    ]
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in dialogues)
    output = tmp_path / "shown"
    assert (
        main(
            [
                str(tmp_path / "hh.jsonl.gz"),
                "--prompt_ends",
                "\n\nAssistant:",
                "--limit",
                "5",
                "--output",
                str(output),
            ]
        )
        == 0
    )
    found = json.loads((output / "pairs.json").read_text())
    assert (found["pairs"], found["scores"], found["counts"]["dropped_over_limit"]) == (5, None, 4)
    assert found["histograms"]["scores"] is None
    assert len(found["examples"]["first"]) == 5
    page = Page((output / "pairs.html").read_text(encoding="utf-8"))
    assert "5 pairs." in page.text
    assert "yes 4" in page.text


def test_chats_and_other_columns_are_shown(tmp_path):
    def turns(answer: str) -> list[dict]:
        return [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]

    write_lines(
        tmp_path / "a.jsonl",
        [{"chosen": turns("Since."), "rejected": turns("No."), "score_chosen": 8, "score_rejected": 2}],
    )
    columns = {"chosen_score": "score_chosen", "rejected_score": "score_rejected"}
    found = pairs_of_file(Pairs(str(tmp_path / "a.jsonl"), columns=columns))
    assert found["margin"]["mean"] == 6
    assert found["lengths"]["chosen"]["mean"] == len("Since.")
    assert found["examples"]["widest"][0]["chosen"] == "assistant: Since."
    assert "user: Why?" in Page(render_pairs(found)).text


def test_mistakes_are_named(tmp_path, folder):
    write_lines(tmp_path / "pairs.json", rows([(1.0, 0.0)]))
    write_lines(
        tmp_path / "a.jsonl",
        [*rows([(1.0, 0.0)]), rows([(1, 2)])[0] | {"prompt": "q", "chosen_score": "high"}],
    )
    cases = (
        ([str(tmp_path)], "holds no pairs.jsonl"),
        ([str(tmp_path / "a.jsonl")], "give --output DIR, too"),
        (
            [str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")],
            r"row 2: holds the scores \('high', 2\)",
        ),
        ([str(tmp_path / "pairs.json"), "--output", str(tmp_path)], "give another folder"),
        ([str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "pairs.json")], "is a file"),
        ([str(tmp_path / "none.jsonl"), "--output", str(tmp_path)], "no such file"),
        ([str(folder), "--limit", "3"], "--limit 3: is for files"),
    )
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            main(words)


def test_broken_candidates_are_named(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", rows([(1.0, 0.0)]))
    (tmp_path / "candidates.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(UserError, match=r"candidates\.jsonl, line 1: is no row of candidates"):
        pairs_of_folder(tmp_path)


def test_a_folder_whose_pairs_were_removed_still_tells_its_counts(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 9, hostile=False)
    (folder / "pairs.jsonl").unlink()
    (folder / "candidates.jsonl").unlink()
    found = pairs_of_folder(folder)
    assert (found["pairs"], found["counts"]["kept"]) == (0, 9)
    Page(render_pairs(found))
