"""A recipe's folder becomes JSON, Markdown and a page; what is missing or broken is left out or named."""

import json
import shutil
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.report.conftest import manifest, write_curves
from tests.report.page import Page
from trainer.data.homoglyphs import language, marked
from trainer.evaluation.letters import published_scores
from trainer.report.collect import collect, overlay, read_curves, write_report
from trainer.report.render import render_html, render_markdown
from trainer.report.runs import describe, duration
from trainer.report.view import headline, view
from trainer.schema import UserError


@pytest.fixture(scope="module")
def report(recipe_folder: Path) -> dict:
    return collect(recipe_folder, title="Letters", published=published_scores(), commands=["make demo"])


def test_json_holds_every_stage_in_order(report, recipe_folder):
    assert list(report["stages"]) == ["base", "sft", "sft_long", "dpo"]
    assert list(report["runs"]) == ["sft", "sft_long", "dpo"]
    dpo = report["stages"]["dpo"]
    assert {"substitution_rate", "keep_rate", "substitution_interval", "keep_interval", "examples"} <= set(
        dpo
    )
    assert report["curves"]["dpo"]["train/loss"][0][0] == 1
    assert len(report["curves"]["dpo"]["val/rewards/margins"]) == 8
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"git", "code", "versions"} == set(report["report"])
    assert not {"git", "code", "versions", "machine"} & set(report)


def test_page_is_whole_self_contained_and_says_the_figures(report):
    page = render_html(report)
    parsed = Page(page)
    dpo = report["stages"]["dpo"]
    assert f"After DPO the model swaps {100 * dpo['substitution_rate']:.1f}\u00a0%" in parsed.text
    for words in (
        "SFT loss",
        "Reward accuracy",
        "make demo",
        "3,200 of 1,376,160",
        "44.3\u00a0%",
        "82.9\u00a0%",
    ):
        assert words in parsed.text
    assert [address for address in parsed.addresses if not address.startswith("#")] == []
    assert "url(http" not in page
    assert "@import" not in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert page.count("<svg") == 5
    assert "#0a0b" not in page
    assert "с" in parsed.bold  # the Cyrillic letter in an English sentence
    assert page == render_html(report)


def test_markdown_has_the_same_figures(report):
    text = render_markdown(report)
    dpo = report["stages"]["dpo"]
    assert f"| DPO | {100 * dpo['substitution_rate']:.1f}\u00a0% |" in text
    assert "| Published DPO | 82.9\u00a0% |" in text
    assert "make demo" in text
    tables = [block.split("\n") for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) > 8
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines if line}) == 1


def test_written_files_read_back(report, tmp_path):
    paths = write_report(report, tmp_path / "new")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert json.loads(paths[0].read_text(encoding="utf-8")) == report
    assert collect(tmp_path / "new") == report


def test_marks_say_what_was_swapped_and_what_is_strange():
    assert marked("coat", "соxt") == [("со", "swapped"), ("x", "changed"), ("t", "")]
    assert marked("coat", "coat!") == [("coat", ""), ("!", "changed")]
    assert marked("coat", "") == []


def test_user_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>|*o*"
    folder = tmp_path / "run"
    folder.mkdir()
    rates = {"substitution_rate": 0.5, "keep_rate": 0.5, "sentences": 1}
    folder.joinpath("evaluation.json").write_text(
        json.dumps(rates | {"label": evil, "examples": [{"source": evil, "output": evil}]})
    )
    write_curves(folder, 8, preference=False)
    report = collect(folder, title=evil)
    page = render_html(report)
    assert "<script" not in page
    Page(page)
    assert "\\<script\\>alert(1)\\</script\\>\\|\\*o\\*" in render_markdown(report)


def test_a_run_that_failed_at_once_still_gives_a_page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.joinpath("manifest.json").write_text('{"status": "failed", "error": "UserError: no such file"}')
    page = render_html(collect(folder))
    assert "UserError: no such file" in page
    assert "1 run, none of them evaluated yet." in page
    assert "none of them evaluated" in render_markdown(collect(folder))


def test_missing_parts_and_empty_rates_do_not_break_it(report):
    for part in list(report):
        # Drawing is the slow part and has its own tests.
        less = {key: value for key, value in report.items() if key != part} | {"curves": {}}
        Page(render_html(less))
        render_markdown(less)
    empty = {
        "stages": {"base": {"substitution_rate": None, "keep_rate": None}, "sft": None},
        "runs": {"sft": {}},
    }
    assert "counted nothing" in headline(empty)
    Page(render_html(empty))
    Page(render_html({}))


def test_values_that_are_not_finite_become_gaps(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in enumerate([0.5, float("nan"), float("inf"), 0.25], start=1):
            writer.add_scalar("train/loss", value, step)
    report = collect(tmp_path)
    assert report["curves"][tmp_path.name]["train/loss"] == [[1, 0.5], [2, None], [3, None], [4, 0.25]]
    json.dumps(report, allow_nan=False)
    assert "SFT loss" in render_html(report)


def test_curves_of_a_resumed_run_and_of_csv(tmp_path):
    for values in ([(1, 1.0), (2, 2.0), (3, 3.0)], [(3, 30.0), (4, 40.0)]):
        with SummaryWriter(str(tmp_path)) as writer:
            for step, value in values:
                writer.add_scalar("train/loss", value, step)
    assert read_curves(tmp_path)["train/loss"] == [[1, 1.0], [2, 2.0], [3, 30.0], [4, 40.0]]
    other = tmp_path / "csv" / "version_0"
    other.mkdir(parents=True)
    other.joinpath("metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,1,0.5,\n0,2,,0.25\n")
    assert read_curves(other.parent) == {"train/loss": [[1, 0.5]], "val/loss": [[2, 0.25]]}


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    lines = "".join(f"{step},{step}\n" for step in range(1, 3502))
    tmp_path.joinpath("metrics.csv").write_text("step,train/loss\n" + lines)
    line = read_curves(tmp_path)["train/loss"]
    assert len(line) <= 1001
    assert line[0] == [1, 1.0]
    assert line[-1] == [3501, 3501.0]


def test_overlay_lays_runs_over_each_other(recipe_folder, tmp_path):
    other = tmp_path / "other" / recipe_folder.name
    shutil.copytree(recipe_folder, other)
    single = tmp_path / "alone"
    single.mkdir()
    single.joinpath("manifest.json").write_text(json.dumps(manifest(8, 3.0, preference=True)))
    write_curves(single, 8, preference=True)
    both = overlay([collect(folder) for folder in (recipe_folder, other, single)])
    assert list(both["curves"])[-1] == "alone"
    assert "letters (1)/dpo" in both["stages"]
    assert "letters (2)/dpo" in both["stages"]
    assert len(both["stages"]) == 8
    page = render_html(both)
    assert page.count("<svg") == 5
    assert headline(both).startswith("Swapped and kept: letters (1)/DPO")
    Page(page)
    render_markdown(both)


def test_a_folder_without_runs_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        collect(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run"):
        collect(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    run.joinpath("evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON"):
        collect(tmp_path)
    run.joinpath("evaluation.json").unlink()
    run.joinpath("samples.jsonl").write_text('{"step": 1}\nbroken\n{"step"')
    with pytest.raises(UserError, match=r"samples\.jsonl, line 2: not valid JSON"):
        collect(tmp_path)
    run.joinpath("samples.jsonl").write_text('{"step": 1, "prompt": "a", "policy": "b"}\n{"step"')
    assert collect(tmp_path)["samples"] == {"run": [{"step": 1, "prompt": "a", "policy": "b"}]}


def test_the_first_sentences_of_each_language_are_shown_by_turns(report):
    found = view(report)
    assert len(found["examples"]) == 6
    assert len(found["examples"]) + len(found["more_examples"]) == 16
    shown = [sentence.source for sentence in found["examples"][::2]]
    sources = [row["source"] for row in report["stages"]["base"]["examples"]]
    assert shown == [source for source in sources if language(source) == "ru"][:3]


def test_what_made_the_results_is_told_by_the_runs_and_not_by_this_report(report):
    (trained, this) = view(report)["provenance"]
    assert trained["what"] == "Trained: SFT; SFT, same total steps; DPO"
    assert trained["code"] == f"git {'1' * 40}, files {'9' * 12}"
    assert trained["versions"] == "python 3.11.7, torch 2.13.0"
    assert this["what"] == "This report"
    assert this["code"].endswith(report["report"]["code"][:12])
    assert view(report)["machine"] == "CPU, 2 CPU cores"


def test_stages_that_were_made_differently_are_told_apart(report):
    dpo = report["runs"]["dpo"] | {"git": "2" * 40, "attempts": [{"git": "1" * 40}], "cpus": 64}
    evaluated = report["stages"]["dpo"] | {"versions": {"torch": "3.0"}}
    changed = report | {
        "runs": report["runs"] | {"dpo": dpo},
        "stages": report["stages"] | {"dpo": evaluated},
        "curves": {},
    }
    rows = view(changed)["provenance"]
    assert [row["what"] for row in rows] == [
        "Trained: SFT; SFT, same total steps",
        "Trained: DPO",
        "Evaluated: DPO",
        "This report",
    ]
    assert rows[1]["code"].startswith(f"git {'1' * 40}, then {'2' * 40}")
    assert rows[2]["versions"] == "torch 3.0"
    assert view(changed)["machine"] == "CPU, 2 CPU cores; CPU, 64 CPU cores"
    for text in (Page(render_html(changed)).text, render_markdown(changed)):
        assert "2" * 40 in text


def test_the_published_stand_beside_ours(report):
    found = view(report)
    labels = [row.label for row in found["published"]]
    assert labels[:4] == ["Before training", "Published, before training", "SFT", "Published SFT"]
    assert labels[-2:] == ["DPO", "Published DPO"]
    answers = found["published_sentences"][0].answers
    ours = [answer.label for answer in answers if not answer.published]
    theirs = [answer.label for answer in answers if answer.published]
    assert dict(zip(ours, theirs, strict=True)) == {
        "Before training": "Published, before training",
        "SFT": "Published SFT",
        "SFT, same total steps": "",
        "DPO": "Published DPO",
    }


def test_capitals_are_said_to_be_counted_with_lower_case_and_alone(report):
    table = next(each for each in view(report)["closer"] if "apitals" in each["title"])
    assert table["title"] == "Capitals and lower case together"
    capitals, lower = report["stages"]["dpo"]["capitals"], report["stages"]["dpo"]
    alone = capitals["eligible"] - lower["eligible"]
    assert alone > 0
    assert f"DPO: {capitals['substituted'] - lower['substituted']} of {alone}." in table["note"]
    assert table["note"] in Page(render_html(report | {"curves": {}})).text
    assert table["note"] in render_markdown(report)


def test_whole_lines_say_what_was_left_out(report):
    def note(counts: dict) -> str:
        stages = {
            name: stage | {"whole_lines": stage["whole_lines"] | {"dropped_overlong": counts.get(name, 0)}}
            for name, stage in report["stages"].items()
        }
        tables = view(report | {"stages": stages})["closer"]
        return next(each["note"] for each in tables if "Whole" in each["title"])

    assert note({}) == ""
    assert note(dict.fromkeys(report["stages"], 3)).startswith("3 lines")
    assert "SFT: 0; SFT, same total steps: 0; DPO: 2." in note({"dpo": 2})


def test_a_runs_facts(report):
    run = report["runs"]["dpo"]
    start = {"path": "runs/letters/sft/checkpoints/step-00000200"}
    policy = run["model"]["policy"] | {"fingerprint": {"start": start}}
    changed = run | {"model": run["model"] | {"policy": policy}, "epoch": 1}
    facts = dict(describe(changed)["facts"])
    assert facts["Base"] == "configs/models/tiny_letters"
    assert facts["Start"] == start["path"]
    assert facts["Data, train"] == "3,200 (ru 1,600, en 1,600); left out: 14 blank"
    assert facts["Data, validation"] == "160"
    assert facts["Objective"] == "sigmoid, beta 0.1, nll weight 1.0"
    assert facts["Steps"] == "160 in 1 epoch"
    assert facts["Time"] == "2 min 7 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.4, "0 s"), (59.7, "1 min 0 s"), (125, "2 min 5 s"), (11_520, "3 h 12 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
