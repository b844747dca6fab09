"""The recipe runner: names, repeats, what makes a stage run again, failures and interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from launch.cli import main
from launch.recipe import ending, manifest_hash, resumes
from launch.stages import changed, code_hash, fingerprint, load_recipe, plan, record, recorded
from tests.launch.helpers import ROOT, fit_config
from trainer.checkpoint import verify
from trainer.report.collect import collect
from trainer.schema import UserError


def write(folder: Path, stages: list[dict], **more) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "stages": stages, **more}, sort_keys=False))
    return path


def words(path: Path, **settings: str) -> list[list[str]]:
    return [list(step.words) for step in plan(load_recipe(path), settings, Path("out"))]


def test_names_are_replaced_and_flags_and_lists_written(tmp_path):
    arguments = {
        "base": "{base}",
        "texts": ["a.txt", "b.txt"],
        "full": None,
        "limit": 3,
        "output": "{folder}/e.json",
    }
    path = write(
        tmp_path,
        [
            {"name": "one", "command": "evaluate letters", "arguments": arguments},
            {
                "name": "two",
                "command": "fit",
                "config": ["two.yaml"],
                "arguments": {"model.policy.start": "{one}"},
            },
            {"name": "end", "command": "report {runs}"},
        ],
        names={"base": "some/model"},
    )
    one, two, end = words(path, base="other")
    assert one == [
        *["evaluate", "letters", "--base", "other", "--texts", "a.txt", "b.txt"],
        *["--full", "--limit", "3", "--output", "out/one/e.json"],
    ]
    assert two == [
        "fit",
        "--config",
        str(tmp_path / "two.yaml"),
        "--run",
        "out/two",
        "--model.policy.start",
        "out/one",
    ]
    assert end == ["report", "out"]


def test_a_name_may_stand_for_a_class(tmp_path):
    """Nothing is built of it: it goes on as JSON, whole or within other JSON."""
    judge = {"class_path": "trainer.judges.scored.TransformersJudge", "init_args": {"model": "owner/name"}}
    arguments = {"judge": "{judge}", "rewards": '{"outside": {"init_args": {"judge": {judge}}}}'}
    path = write(
        tmp_path,
        [{"name": "one", "command": "pairs rescore out", "arguments": arguments}],
        names={"judge": judge},
    )
    ((_, _, _, _, given, _, rewards),) = words(path)
    assert json.loads(given) == judge
    assert json.loads(rewards)["outside"]["init_args"]["judge"] == judge
    ((_, _, _, _, given, *_),) = words(path, judge="x.gguf")
    assert given == "x.gguf"


@pytest.mark.parametrize("names", [["a"], {1: "a"}, "a"])
def test_names_that_are_none(names, tmp_path):
    path = write(tmp_path, [{"name": "one", "command": "fit"}], names=names)
    with pytest.raises(UserError, match=r"recipe.yaml: names: .* it should hold values by their names"):
        load_recipe(path)


def test_paths_with_a_dot_are_relative_to_the_recipe(tmp_path):
    names = {"here": "./texts.yaml", "there": "../base", "hub": "owner/model"}
    path = write(tmp_path, [{"name": "one", "command": "x {here} {there} {hub}"}], names=names)
    assert words(path)[0][1:] == [str(tmp_path / "texts.yaml"), str(tmp_path.parent / "base"), "owner/model"]


def test_a_stage_repeats_from_the_one_before(tmp_path):
    stage = {"name": "spin", "command": "x {iteration} {previous}", "repeat": 3, "previous": "{base}"}
    path = write(tmp_path, [stage, {"name": "end", "command": "y {spin}"}], names={"base": "b"})
    assert words(path) == [
        ["x", "1", "b"],
        ["x", "2", "out/spin-1"],
        ["x", "3", "out/spin-2"],
        ["y", "out/spin-3"],
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"name": "a", "command": "x {bse}"}],
            r"recipe.yaml: stages.a: no name \{bse\} here; there are base",
        ),
        ([{"name": "a", "command": "x"}, {"name": "a", "command": "x"}], "the name `a` is used twice"),
        ([{"name": "base", "command": "x"}], "the name `base` is used twice"),
        ([{"name": "a", "command": "x", "repeat": 0}], "stages.a.repeat: 0 is below 1"),
        ([{"name": "a", "command": "x", "input": []}], "no such setting; did you mean `inputs`"),
        ([{"name": "a"}], "command"),
        ([], "has no stages"),
    ],
)
def test_mistakes_in_a_recipe(stages, message, tmp_path):
    path = write(tmp_path, stages, names={"base": "b"})
    with pytest.raises(UserError, match=message):
        plan(load_recipe(path), {})


def test_a_fingerprint_covers_config_inputs_and_what_configs_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/weights").write_text("1")
    Path("one.yaml").write_text("texts: texts.yaml\n")
    Path("texts.yaml").write_text("path: lines.txt\n")
    Path("lines.txt").write_text("a line\n")
    stage = {"name": "one", "command": "fit", "config": ["one.yaml"], "inputs": ["{base}"]}
    path = write(tmp_path, [stage], names={"base": "base"})

    def now(**settings: str) -> dict[str, str]:
        return fingerprint(plan(load_recipe(path), settings)[0])

    before = now()
    assert changed(before, now()) == ""
    for file in ("base/weights", "one.yaml", "texts.yaml", "lines.txt"):
        kept = Path(file).read_text()
        Path(file).write_text(kept + "# more\n")
        assert file.split("/")[0] in changed(before, now())
        Path(file).write_text(kept)
    assert "base" in changed(before, now(base="other/base"))
    assert changed(before, {**before, "code": "x"}) == "the code"


@pytest.fixture
def runner(tmp_path, monkeypatch, capfd):
    """`runner(stages, *flags)`: `tandem run` on a recipe of cheap stages; (exit status, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def go(stages: list[dict], *flags: str, **more) -> tuple[int, str, str]:
        path = write(tmp_path, stages, **more)
        status = main(["run", str(path), "--output", str(tmp_path / "out"), *flags])
        shown = capfd.readouterr()
        return status, shown.out, shown.err

    return go


VERSION = {"command": "--version"}


def test_what_is_done_is_skipped_and_said(runner, tmp_path):
    given = tmp_path / "given.txt"
    given.write_text("1")
    stages = [{"name": "one", **VERSION}, {"name": "two", **VERSION, "inputs": [str(given)]}]
    status, out, _ = runner(stages)
    assert status == 0
    assert "one: not done yet" in out
    assert "small: finished in" in out
    assert "two 0 s" in out
    assert runner(stages)[1].count("done before, skipped") == 2
    given.write_text("2")
    _, out, _ = runner(stages)
    assert "one: done before, skipped" in out
    assert "two: runs again, since" in out
    assert "given.txt changed" in out
    assert "one: forced" in runner(stages, "--force", "--only", "one")[1]
    _, out, _ = runner(stages, "--from", "two", "--force")
    assert "[1/1] two: forced" in out
    _, out, _ = runner(stages, "--dry_run", "--force")
    assert "tandem --version" in out
    assert "finished in" not in out


def test_a_failing_stage_ends_the_recipe_with_its_status(runner, tmp_path):
    stages = [{"name": "one", "command": "generate"}, {"name": "two", **VERSION}]
    status, out, err = runner(stages)
    assert status == 2
    assert "stage one ended with exit status 2" in out
    assert "[2/2]" not in out
    assert "tandem: error: --prompt" in err
    assert json.loads((tmp_path / "out" / "stages" / "one.stage.json").read_text())["status"] == "failed"
    assert "one: failed last time" in runner(stages)[1]


@pytest.mark.parametrize("name", ["reward", "manifest", "evaluation", "win_rate", "scratch"])
def test_a_stage_may_have_the_name_of_a_file_that_reports_read(runner, tmp_path, name):
    assert runner([{"name": name, **VERSION}])[0] == 0
    with pytest.raises(UserError, match="holds no run"):
        collect(tmp_path / "out")


def test_a_missing_input_and_a_missing_output_are_named(runner):
    status, _, err = runner([{"name": "one", **VERSION, "inputs": ["{runs}/none"]}])
    assert status == 2
    assert "stage one: its input" in err
    assert "none is missing" in err
    status, _, err = runner([{"name": "one", **VERSION, "outputs": ["{folder}/none"]}])
    assert status == 2
    assert "ended without an error, but" in err


@pytest.mark.slow
def test_an_interrupted_fit_goes_on_where_it_was(tmp_path, tiny_llama, capfd):
    config = fit_config(tmp_path, tiny_llama, steps=100_000)
    arguments = {"trainer.max_steps": "{steps}"}
    stage = {"name": "one", "command": "fit", "config": [config.name], "arguments": arguments}
    path = write(tmp_path, [stage], names={"steps": 100_000})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch", "run", str(path), "--output", str(out)]
    # A session of its own, so that SIGINT goes to runner and stage as a terminal sends it, and not to pytest.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while not (out / "one" / "checkpoints" / "best").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert told.count("tandem: Ctrl-C: stopped at step") == 1
    verify(out / "one" / "checkpoints" / "last")
    record = json.loads((out / "stages" / "one.stage.json").read_text())
    assert record["status"] == "interrupted"
    # A stage that stands as interrupted, with nothing changed since, is resumed. So is one whose runner was killed:
    # it saves and ends by itself.
    process = resumed(command, out / "one" / "manifest.json")
    (stage,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    stage.wait(60)
    process = resumed(command, out / "one" / "manifest.json")
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert "one: running last time" in told
    assert "resumed from" in told


def resumed(command: list[str], path: Path) -> subprocess.Popen:
    """The recipe's process, once its fit goes on from the step that it had reached."""
    reached = json.loads(path.read_text())["step"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        manifest = json.loads(path.read_text())
        if manifest["status"] == "running" and manifest.get("from_step"):
            break
        time.sleep(0.05)
    assert manifest["from_step"] in (reached, reached - 1)
    return process


def test_two_runs_at_once_in_one_folder_are_refused(runner, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        status, _, err = runner([{"name": "one", **VERSION}])
    assert status == 2
    assert "another `tandem run`" in err


def test_the_last_lines_name_times_and_report(tmp_path):
    path = write(tmp_path, [{"name": "one", "command": "report x", "outputs": ["{runs}/report.html"]}])
    recipe = load_recipe(path)
    told = ending(recipe, plan(recipe, {}), {"one": 48.0}, ["two"])
    assert told == [
        "\nsmall: finished in 48 s (one 48 s); done before: two",
        "report: runs/small/report.html",
    ]


def step_in(folder: Path):
    path = write(folder, [{"name": "one", "command": "fit", "config": []}])
    return plan(load_recipe(path), {}, folder / "out")[0]


def test_only_what_the_stopped_attempt_wrote_is_resumed(tmp_path):
    step, hashes = step_in(tmp_path), {"code": "1"}
    assert not resumes(step, None, hashes)
    step.folder.mkdir(parents=True)
    manifest = step.folder / "manifest.json"
    manifest.write_text('{"status": "finished"}')
    record(step, "interrupted", hashes, replaces=manifest_hash(step))
    # The attempt ended before its first batch: what lies there is the run that it was to replace.
    assert not resumes(step, recorded(step), hashes)
    manifest.write_text('{"status": "interrupted"}')
    assert resumes(step, recorded(step), hashes)
    assert not resumes(step, recorded(step), {"code": "2"})
    record(step, "finished", hashes)
    assert not resumes(step, recorded(step), hashes)


def test_an_argument_that_exists_only_later_is_an_input_all_the_same(tmp_path):
    stage = {"name": "one", "command": "x", "arguments": {"adapter": "{runs}/other/adapter"}}
    step = plan(load_recipe(write(tmp_path, [stage])), {}, tmp_path / "out")[0]
    adapter = tmp_path / "out" / "other" / "adapter"
    adapter.mkdir(parents=True)
    assert str(adapter) in fingerprint(step)


def test_a_report_is_stale_when_a_run_below_it_changed(tmp_path):
    path = write(tmp_path, [{"name": "end", "command": "report {runs}"}])
    step = plan(load_recipe(path), {}, tmp_path / "out")[0]
    run = tmp_path / "out" / "dpo"
    run.mkdir(parents=True)
    for name in ("manifest.json", "samples.jsonl", "metrics.csv", "events.out.tfevents.1"):
        before = fingerprint(step)
        (run / name).write_text("1")
        assert name in changed(before, fingerprint(step))


def test_the_code_s_hash_covers_templates_and_no_byte_code(tmp_path, monkeypatch):
    import launch.stages

    monkeypatch.setattr(launch.stages, "__file__", str(tmp_path / "launch" / "stages.py"))
    seen = {code_hash()}
    for name in ("trainer/report/report.css", "trainer/report/report.md.j2", "launch/cli.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        assert code_hash() not in seen
        seen.add(code_hash())
    cached = tmp_path / "launch" / "__pycache__" / "cli.cpython-311.pyc"
    cached.parent.mkdir()
    cached.write_text("1")
    assert code_hash() in seen
