"""`tandem fit` and `validate` on a tiny model: the run's folder, refusals, resuming, and Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main
from launch.identity import differences
from launch.runs import Replaced, default_folder, made
from tests.launch.helpers import ROOT, fit_config
from trainer.checkpoint import verify
from trainer.schema import UserError


@pytest.fixture
def run(tmp_path, tiny_llama, capsys):
    """`run(*extra)`: fits the tiny config into one folder; (exit status, that folder, stderr)."""
    config = fit_config(tmp_path, tiny_llama)

    def go(*extra: str) -> tuple[int, Path, str]:
        status = main(["fit", "--config", str(config), "--run", str(tmp_path / "run"), *extra])
        return status, tmp_path / "run", capsys.readouterr().err

    return go


def steps(folder: Path) -> list[int]:
    events = EventAccumulator(str(folder)).Reload()
    return sorted({event.step for event in events.Scalars("train/loss")})


def test_a_run_leaves_its_folder_whole(run):
    status, folder, told = run()
    assert status == 0
    assert {"config.yaml", "manifest.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["step"] == 2
    assert (folder / "checkpoints" / "best" / "adapter_model.safetensors").is_file()
    assert "192 trained of" in told
    assert "best checkpoint" in told
    losses = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    assert losses[0].value == pytest.approx(math.log(2), abs=1e-6)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 2


def test_the_hyper_parameters_are_in_the_loggers(run):
    _, folder, _ = run()
    known = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert known["model"]["init_args"]["optimizer"]["lr"] == 0.01


def test_a_finished_folder_is_refused_and_overwritten_only_on_demand(run):
    _, folder, _ = run()
    (folder / "notes.txt").write_text("mine")
    before = (folder / "manifest.json").read_bytes()
    status, _, told = run()
    assert status == 2
    assert "holds a finished run" in told
    assert "--overwrite" in told
    assert (folder / "manifest.json").read_bytes() == before
    status, _, _ = run("--overwrite", "--trainer.max_steps", "1")
    assert status == 0
    assert json.loads((folder / "manifest.json").read_text())["step"] == 1
    # What no run wrote is left alone.
    assert (folder / "notes.txt").read_text() == "mine"
    assert steps(folder) == [0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "mistake",
    [
        ["--model.optimizer.lr", "0"],
        ["--data.max_length", "20"],
        ["--trainer.precision", "bf16-true"],
        ["--checkpoint.monitor", "val/loss"],
        ["--trainer.fast_dev_run", "1"],
    ],
)
def test_a_mistake_does_not_cost_the_run_that_was_to_be_replaced(run, mistake):
    _, folder, _ = run()
    before = contents(folder)
    status, _, told = run("--overwrite", *mistake)
    assert status == (0 if "fast_dev_run" in mistake[0] else 2), told
    assert contents(folder) == before
    assert (folder / "checkpoints" / "best").exists()


def test_a_run_cannot_start_from_what_it_replaces(run):
    _, folder, _ = run()
    before = contents(folder)
    for start in (folder, folder / "checkpoints" / "best"):
        status, _, told = run("--overwrite", "--model.policy.start", str(start))
        assert status == 2
        assert f"model.policy.start: {start} is what --overwrite replaces" in told
    assert contents(folder) == before


def test_what_is_replaced_is_aside_until_the_new_run_is_under_way(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last").write_text("old")
    (tmp_path / "manifest.json").write_text("old")
    before = contents(tmp_path)
    replaced = Replaced(tmp_path, made(tmp_path))
    (tmp_path / "events.out.tfevents.new").write_text("new")
    replaced.put_aside()
    (tmp_path / "manifest.json").write_text("new")
    replaced.put_back()
    assert contents(tmp_path) == before
    replaced.put_aside()
    (tmp_path / "manifest.json").write_text("new")
    replaced.drop()
    replaced.put_back()
    assert contents(tmp_path) == {"manifest.json": b"new"}


def test_resume_auto_refuses_a_run_whose_checkpoints_are_all_damaged(run):
    _, folder, _ = run()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        (checkpoint / "adapter_model.safetensors").write_bytes(b"x")
    before = contents(folder)
    status, _, told = run("--resume", "auto", "--trainer.max_steps", "4")
    assert status == 2
    assert "damaged (step-00000001, step-00000002)" in told
    assert "--overwrite" in told
    assert contents(folder) == before


def test_resume_goes_on_and_keeps_the_config(run):
    _, folder, _ = run()
    config = (folder / "config.yaml").read_bytes()
    status, _, told = run("--resume", "auto", "--trainer.max_steps", "4")
    assert status == 0
    assert "resuming with trainer.max_steps: 4 (was 2)" in told
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert manifest["from_step"] == 2
    assert (folder / "config.yaml").read_bytes() == config
    assert len(steps(folder)) == 4


def test_resume_auto_starts_anew_where_there_is_nothing(run):
    status, folder, _ = run("--resume", "auto")
    assert status == 0
    assert len(steps(folder)) == 2


def test_resume_into_another_folder_does_not_touch_a_run_there(run, tmp_path):
    _, folder, _ = run()
    other = tmp_path / "other"
    status, _, _ = run("--resume", str(folder), "--run", str(other), "--trainer.max_steps", "3")
    assert status == 0
    assert json.loads((other / "manifest.json").read_text())["from_step"] == 2
    status, _, told = run("--resume", str(folder), "--run", str(other), "--trainer.max_steps", "3")
    assert status == 2
    assert "holds a finished run" in told


def test_dpo_starts_from_a_run_and_validate_reads_its_weights(tmp_path, tiny_llama, capsys):
    sft, dpo = (fit_config(tmp_path, tiny_llama, kind=kind) for kind in ("demonstration", "preference"))
    assert main(["fit", "--config", str(sft), "--run", str(tmp_path / "sft")]) == 0
    start = ["--model.policy.start", str(tmp_path / "sft")]
    assert main(["fit", "--config", str(dpo), "--run", str(tmp_path / "dpo"), *start]) == 0
    capsys.readouterr()
    validate = ["validate", "--config", str(dpo), *start, "--trainer.limit_val_batches", "1.0"]
    validate += ["--data.source.validation_fraction", "0.5"]
    assert main(validate) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert main([*validate, "--weights", str(tmp_path / "dpo")]) == 0
    trained = json.loads(capsys.readouterr().out)
    # Where policy and reference are the same adapter the loss is ln 2, and training moved it.
    assert fresh["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trained["val/loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert not (Path(ROOT) / "runs" / tmp_path.name).exists()


def test_named_callbacks_and_more_of_them_stack(tmp_path, tiny_llama):
    config = fit_config(tmp_path, tiny_llama)
    more = tmp_path / "more.yaml"
    stopping = {
        "class_path": "callbacks.early_stopping.EarlyStopping",
        "init_args": {"monitor": "train/loss"},
    }
    more.write_text(yaml.safe_dump({"trainer": {"callbacks+": [stopping]}, "samples": {"prompts": ["coat"]}}))
    arguments = ["fit", "--config", str(config), "--config", str(more), "--run", str(tmp_path / "run")]
    assert main([*arguments, "--samples.sampling.max_new_tokens", "4"]) == 0
    names = json.loads((tmp_path / "run" / "manifest.json").read_text())["callbacks"]
    assert {"EarlyStopping", "ImprovedLossCheckpoint", "Throughput", "Alarms"} <= set(names)
    assert (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").count("coat") >= 2


def test_the_last_samples_are_of_the_last_step_s_weights(run, tmp_path, capsys):
    # The learning rate is the same at each step, so that the first checkpoint stays the best.
    more = tmp_path / "more.yaml"
    stopping = {
        "class_path": "callbacks.early_stopping.EarlyStopping",
        "init_args": {"monitor": "train/lr", "patience": 9, "every_n_steps": 1, "restore_best": True},
    }
    samples = {"prompts": ["coat"], "sampling": {"max_new_tokens": 12}}
    settings = {"trainer": {"callbacks+": [stopping]}, "samples": samples}
    more.write_text(yaml.safe_dump(settings))
    status, folder, _ = run(
        *["--config", str(more), "--checkpoint.monitor", "train/lr", "--model.optimizer.lr", "0.5"],
        *["--trainer.max_steps", "4"],
    )
    assert status == 0
    said = {}
    for name in ("best", "last"):
        adapter = ["--adapter", str(folder / "checkpoints" / name)]
        assert main(["generate", *adapter, "--prompt", "coat", "--max_new_tokens", "12"]) == 0
        said[name] = capsys.readouterr().out.removesuffix("\n")
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 4
    assert last["policy"] == said["last"] != said["best"]


def test_named_callbacks_stand_before_extra_ones(tmp_path, tiny_llama):
    from callbacks.early_stopping import EarlyStopping
    from callbacks.run_manifest import RunManifest
    from launch.fit import KeepConfig, TandemCLI

    config = fit_config(tmp_path, tiny_llama)
    extra = "[{class_path: callbacks.early_stopping.EarlyStopping}]"
    words = ["--config", str(config), "--run", str(tmp_path / "run"), "--trainer.callbacks", extra]
    kinds = [type(callback) for callback in TandemCLI(words, "fit").trainer.callbacks]
    assert kinds[0] is KeepConfig
    assert kinds.index(RunManifest) < kinds.index(EarlyStopping)


def test_loggers_by_config_alone(run, tmp_path):
    more = tmp_path / "more.yaml"
    place = {"save_dir": str(tmp_path / "run"), "name": "", "version": ""}
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": place}
        for name in ("CSVLogger", "TensorBoardLogger")
    ]
    more.write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    status, folder, _ = run("--config", str(more))
    assert status == 0
    assert "train/rewards/margins" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert len(steps(folder)) == 2
    status, _, _ = run("--overwrite", "--trainer.logger", "false")
    assert status == 0
    assert not list(folder.glob("events*"))
    assert not (folder / "metrics.csv").exists()


def test_a_long_validation_has_a_bar_on_stderr_and_stdout_stays_clean(
    tmp_path, tiny_llama, capsys, monkeypatch
):
    monkeypatch.setattr("launch.progress.VALIDATION_DELAY_SECONDS", 0.0)
    config = fit_config(tmp_path, tiny_llama, enable_progress_bar=True, limit_val_batches=3)
    words = ["--config", str(config), "--data.source.validation_fraction", "0.5"]
    assert main(["validate", *words]) == 0
    shown = capsys.readouterr()
    assert "val/loss" in json.loads(shown.out)
    assert "validation" in shown.err
    assert "/3 [" in shown.err
    assert main(["fit", *words, "--run", str(tmp_path / "run"), "--trainer.val_check_interval", "1"]) == 0
    shown = capsys.readouterr()
    assert "validation" in shown.err
    assert "training" in shown.err
    assert shown.out == ""


def test_ctrl_c_ends_with_130_and_can_be_resumed(tmp_path, tiny_llama):
    config = fit_config(tmp_path, tiny_llama, steps=100_000)
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "launch", "fit", "--config", str(config), "--run", str(folder)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 90
    while not (folder / "checkpoints" / "best").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    reached = json.loads((folder / "manifest.json").read_text())["step"]
    saved = (folder / "checkpoints" / "last").resolve()
    assert [line for line in told.splitlines() if "stopped" in line or "resume" in line] == [
        f"tandem: Ctrl-C: stopped at step {reached}; saved as {saved}, `--resume auto` goes on from there"
    ]
    assert saved.name == f"step-{reached:08d}"
    verify(folder / "checkpoints" / "last")
    verify(folder / "checkpoints" / "best")
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    resumed = [*command[3:], "--resume", "auto", "--trainer.max_steps", str(reached + 3)]
    assert main(resumed) == 0


def test_the_default_folder_follows_the_config():
    assert default_folder(["configs/letters/dpo.yaml", "x/y.yaml"]) == Path("runs/letters/dpo")
    with pytest.raises(UserError, match="--run FOLDER"):
        default_folder([])


def test_differences_leave_places_out():
    before = {"run": "a", "trainer": {"max_steps": 1, "default_root_dir": "a"}, "x": None}
    after = {"run": "b", "trainer": {"max_steps": 2, "default_root_dir": "b"}, "x": None}
    assert differences(before, after) == {"trainer.max_steps": (1, 2)}


@pytest.mark.parametrize("setting", ["policy.start", "policy.adapter", "init_args.reference.adapter"])
@pytest.mark.parametrize("form", ["--model.{} null", "--model.{}=null"])
def test_null_on_the_command_line_is_null(capsys, setting, form):
    words = form.format(setting).split()
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/letters/dpo.yaml", *words, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    for key in setting.removeprefix("init_args.").split("."):
        found = found[key]
    assert found is None
