"""Reward evaluations, win rates and pairs in a report: tables by what is there, headlines, hostile texts, curves."""

import json
import shutil
from pathlib import Path

import pytest

from launch.commands.report import main
from tests.report.examples import HOSTILE, win_rate, write_hh, write_imdb
from tests.report.page import Page
from trainer.report.collect import collect, overlay, write_report
from trainer.report.render import render_html, render_markdown
from trainer.report.reward_view import before, is_before, reward_view
from trainer.report.view import headline, view
from trainer.report.win_rate_view import win_rate_view
from trainer.schema import UserError


@pytest.fixture(scope="module")
def imdb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_imdb(tmp_path_factory.mktemp("runs") / "imdb")


@pytest.fixture(scope="module")
def imdb(imdb_folder: Path) -> dict:
    return collect(imdb_folder, title="imdb")


@pytest.fixture(scope="module")
def hh(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return collect(write_hh(tmp_path_factory.mktemp("runs") / "hh_rlhf"), title="hh_rlhf")


def test_each_part_is_what_its_files_say(imdb, hh):
    assert list(imdb["rewards"]) == ["base", "dpo", "dpo_without"]
    assert list(imdb["runs"]) == ["dpo", "dpo_without"]
    assert sorted(imdb["pairs"]) == ["pairs", "pairs_without"]
    assert imdb["made"]["generator"]["parameters"] == 1_204_480
    assert "win_rates" not in imdb
    assert list(hh["win_rates"]) == ["dpo"]
    assert not {"rewards", "pairs", "made"} & set(hh)


def test_a_report_of_letters_knows_nothing_of_the_others(recipe_folder):
    report = collect(recipe_folder)
    assert not {"rewards", "win_rates", "pairs", "made"} & set(report)
    page = render_html(report)
    for words in ("Rewards, before and after", "Who wins", "In numbers"):
        assert words not in page


def test_the_headline_says_the_rise_in_the_bases_deviations_and_what_it_cost(imdb):
    lines = headline(imdb).split("\n")
    assert lines[0] == (
        "DPO: mean reward 2.10 (95\u00a0% interval 1.97 to 2.23), 0.30 before training: a rise of 1.37 standard"
        " deviations; entropy −5.0\u00a0% and distinct‑2 −2.5\u00a0%."
    )
    assert lines[1].startswith("DPO without prompts: mean reward 0.90")
    assert round((2.1 - 0.3) / 1.31, 2) == 1.37


def test_the_headline_of_win_rates_counts(hh):
    found = hh["win_rates"]["dpo"]["against"]
    text = headline(hh)
    assert f"DPO: {found['base']['wins']} wins and {found['base']['losses']} losses against its base" in text
    assert f"{found['answers']['losses']} losses against the dataset's answers" in text


def test_a_report_with_pairs_alone_tells_of_them(imdb):
    assert headline({"pairs": {"pairs": imdb["pairs"]["pairs"]}}).startswith(
        "60 pairs from 77 prompts: the chosen"
    )
    assert headline({"runs": {"dpo": {}}}) == "1 run, none of them evaluated yet."


def test_a_loss_of_diversity_is_marked_where_it_is_large(imdb):
    found = view(imdb)["rewards"]
    assert found["columns"] == ["Before training", "DPO", "DPO without prompts"]
    worse = {row["name"]: [cell.worse for cell in row["cells"]] for row in found["measures"]}
    assert worse["Token entropy"] == [False, False, True]
    assert worse["Distinct-3"] == [False, False, False]
    assert worse["Self-similarity"] == [False, False, True], "growing alike is a loss"
    assert worse["Length"] == [False, False, False]
    changes = {row["name"]: [cell.change for cell in row["cells"]] for row in found["measures"]}
    assert changes["Token entropy"] == ["", "−5.0\u00a0%", "−31.0\u00a0%"]
    assert changes["KL to the reference"] == ["", "", ""]
    assert 'class="worse">−31.0' in render_html(imdb | {"curves": {}})


def test_every_reward_has_its_scale_with_all_stages_on_it(imdb):
    scales = view(imdb)["rewards"]["scales"]
    assert [scale.name for scale in scales] == ["distilbert-imdb", "second"]
    for scale in scales:
        assert [row.before for row in scale.rows] == [True, False, False]
        places = [row.place for row in scale.rows]
        assert places[0] < places[2] < places[1]
        for row in scale.rows:
            assert 0 < row.left < row.place < row.left + row.width < 100
        assert scale.zero is None, "no reward is near 0 here"
    crossing = reward_view(
        {
            "base": {"rewards": {"x": {"mean": -1.0}}},
            "dpo": {"rewards": {"x": {"mean": 1.0, "interval": None}}},
        },
        str,
    )
    assert crossing["scales"][0].zero == pytest.approx(50)
    assert crossing["scales"][0].rows[1].change == "a rise of 2.00"


def test_stages_are_compared_with_the_base_of_their_own_run():
    runs = {f"{run}/{stage}": {"mean": run} for run in ("a", "b") for stage in ("base", "dpo")}
    assert before("b/dpo", runs) == {"mean": "b"}
    assert before("b/base", runs) is None
    assert before("c/dpo", runs | {"c/dpo": {}}) is None, "two bases, and none its own"
    assert before("with", {"evaluate_base": {"mean": 1}, "with": {}}) == {"mean": 1}
    assert is_before("any", {"model": {"base": "gpt2", "adapter": None}})
    assert not is_before("dpo", {"model": {"base": "gpt2", "adapter": "runs/dpo"}})


def test_prompts_stand_with_every_models_text_and_rewards(imdb):
    found = view(imdb)["rewards"]
    assert len(found["prompts"]) == 4
    assert len(found["prompts"]) + len(found["more_prompts"]) == len(
        {e["prompt"] for e in imdb["rewards"]["dpo"]["examples"]}
    )
    for prompt in found["prompts"]:
        assert [answer["label"] for answer in prompt["answers"]] == [
            "Before training",
            "DPO",
            "DPO without prompts",
        ]
        assert [name for name, _ in prompt["answers"][0]["rewards"]] == ["distilbert-imdb", "second"]
    assert "no prompt: from the beginning of a text" in render_html(imdb | {"curves": {}})


def test_win_rates_stand_with_counts_bars_and_leanings(hh):
    found = view(hh)["win_rates"]
    base, answers = found["rows"]
    assert [(part.kind, part.count) for part in base.parts] == [
        ("wins", 22),
        ("ties", 8),
        ("losses", 8),
        ("invalid", 2),
    ]
    assert sum(part.share for part in base.parts) == pytest.approx(100)
    assert (base.winner, answers.winner) == ("DPO", "the dataset's answers")
    assert (base.sure, answers.sure) == ("p < 0.001", "p = 0.012")
    told = found["leanings"][0].told
    assert told[0] == "Both orders gave the same verdict in 71.0\u00a0% of the comparisons."
    assert told[1].endswith("(95\u00a0% interval 49.0–66.0\u00a0%): no leaning is certain.")
    assert told[2].startswith("It picked the longer answer in 64.0\u00a0% of 64 picks")
    assert told[2].endswith(": it leans to it.")
    assert {verdict.title for verdict in found["verdicts"][:2]} == {
        "DPO against its base",
        "DPO against the dataset's answers",
    }
    assert found["verdicts"][0].orders == "Standing first: win; standing second: win."


def test_a_tie_and_a_judge_that_stopped_are_said():
    evaluation = win_rate("DPO") | {"stopped": "the server is down"}
    evaluation["against"] = {"base": evaluation["against"]["base"] | {"winner": "Both", "identical": 3}}
    found = win_rate_view({"dpo": evaluation}, str)
    assert found["rows"][0].winner == "a tie"
    assert found["rows"][0].notes == "3 with the same text twice, 1 without an answer"
    page = Page(render_html({"win_rates": {"dpo": evaluation}}))
    assert "what was left is invalid: the server is down" in page.text
    assert "the server is down" in render_markdown({"win_rates": {"dpo": evaluation}})


def test_nothing_decided_is_a_dash_and_no_bar():
    nothing = {
        "wins": 0,
        "losses": 0,
        "ties": 0,
        "invalid": 5,
        "win_rate": None,
        "interval": None,
        "p_value": None,
    }
    report = {"win_rates": {"dpo": {"against": {"base": nothing, "answers": None}, "examples": None}}}
    page = Page(render_html(report))
    assert "0 wins and 0 losses against its base." in page.text
    assert "5 invalid" in page.text
    render_markdown(report)


@pytest.mark.parametrize("which", ["imdb", "hh"])
def test_hostile_texts_stay_texts(which, request):
    page = Page(render_html(request.getfixturevalue(which)))
    assert page.harmless
    assert "<script>alert(1)</script>" in page.text
    for char in "\x00\x1b\u202e\u2066\ud800":
        assert char not in page.text
    assert "\u0301" * 5 not in page.text
    assert "<script" not in render_markdown(request.getfixturevalue(which)).replace("\\<script", "")


def test_hostile_names_stay_texts():
    for evil in HOSTILE[:4]:
        evaluation = {
            "label": evil,
            "rewards": {evil: {"mean": 1.0, "interval": [0.5, 1.5], "sd": 1.0}},
            "examples": [{"prompt": evil, "completion": evil, "rewards": {evil: 1.0}}],
            "sampling": {evil: 1.0},
        }
        judged = win_rate("DPO") | {"judge": {evil: evil}, "verdicts": evil, "label": evil}
        judged["against"] = {evil: judged["against"]["base"] | {"test": evil, "winner": evil}}
        report = {
            "curves": {evil: {f"reward/{evil}": [[0, 1.0], [1, 2.0]]}},
            "rewards": {evil: evaluation},
            "win_rates": {evil: judged},
            "made": {evil: {"kind": evil, evil: evil}},
        }
        assert Page(render_html(report)).harmless
        render_markdown(report)


def test_files_are_written_whatever_the_texts_hold(imdb, hh, tmp_path):
    for name, report in {"imdb": imdb, "hh": hh}.items():
        paths = write_report(report, tmp_path / name)
        assert json.loads(paths[0].read_text(encoding="utf-8")) == report
        assert collect(tmp_path / name) == report


def test_curves_of_sampled_rewards_lie_over_each_other(imdb):
    page = render_html(imdb)
    for title in (
        "Reward: second",
        "Mean reward",
        "Token entropy",
        "KL to the reference",
        "Distinct n-grams",
        "Self-similarity",
        "Length",
    ):
        assert f'aria-label="{title}: ' in page
    with_pairs = 4 + 7 + 2 * 3
    assert page.count("<svg") == with_pairs
    assert page.count("DPO without prompts</li>") == 4 + 7
    alone = render_html(
        imdb | {"pairs": {}, "curves": {"dpo": {"reward/mean": [[0, 0.3], [10, None], [20, 2.0]]}}}
    )
    assert alone.count("<svg") == 1


def test_missing_parts_do_not_break_it(imdb, hh):
    for report in (imdb, hh):
        small = report | {"curves": {}}
        for part in ("rewards", "win_rates"):
            for stage, evaluation in (report.get(part) or {}).items():
                for key in evaluation:
                    less = {name: value for name, value in evaluation.items() if name != key}
                    changed = small | {part: small[part] | {stage: less}, "pairs": {}}
                    Page(render_html(changed))
                    render_markdown(changed)
        for summary in (report.get("pairs") or {}).values():
            for key in summary:
                less = {name: value for name, value in summary.items() if name not in (key, "histograms")}
                Page(render_html({"pairs": {"pairs": less}}))
                render_markdown({"pairs": {"pairs": less}})


def test_samples_that_do_not_repeat_their_prompt_are_not_marked(imdb):
    assert [(sample["label"], len(sample["steps"])) for sample in view(imdb)["samples"]] == [
        ("DPO", 5),
        ("DPO without prompts", 5),
    ], "of samples.jsonl, and without it of the reward evaluations"
    for sample in view(imdb)["samples"]:
        for _, runs in sample["steps"]:
            assert [kind for _, kind in runs] == [""]


def test_the_published_comparison_is_one_overlaid_report(imdb_folder, tmp_path):
    other = tmp_path / "again" / "imdb"
    shutil.copytree(imdb_folder, other)
    both = overlay([collect(imdb_folder), collect(other)], ["with prompts", "without"])
    assert list(both["rewards"])[:2] == ["with prompts/base", "with prompts/dpo"]
    assert view(both)["pairs"][0]["title"] == "with prompts/Pairs"
    text = headline(both)
    assert "with prompts/DPO: mean reward" in text
    assert "without/DPO: mean reward" in text
    page = Page(render_html(both))
    assert page.harmless
    assert "without/Before training" in page.text
    stages = [collect(imdb_folder / stage) for stage in ("base", "dpo", "dpo_without")]
    laid = overlay(stages, ["before", "with", "without"])
    assert list(laid["rewards"]) == ["before", "with", "without"]
    assert headline(laid).count("standard deviations") == 2


def test_the_command_gives_runs_their_names(imdb_folder, tmp_path, capsys):
    runs = [str(imdb_folder / stage) for stage in ("base", "dpo", "dpo_without")]
    names = ["before", "with prompts", "without"]
    assert main(["--names", *names, "--output", str(tmp_path), *runs]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["rewards"]) == names
    for words in (["--names", "one", "--output", str(tmp_path), *runs], [runs[0], "--names", "one"]):
        with pytest.raises(UserError, match=r"--names .*one.* should be one name for each"):
            main(words)
