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
from launch.fit import differences
from launch.runs import default_folder
from tests.launch.helpers import ROOT, fit_config
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
    assert "tandem: interrupted" in told
    assert "--resume auto" in told
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    reached = json.loads((folder / "manifest.json").read_text())["step"]
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
