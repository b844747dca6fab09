"""Signals to `tandem fit`, what a run goes on from, and what it is: in this process, on a tiny model."""

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
import torch
import yaml

from launch.cli import main
from launch.identity import refuse_another_run
from launch.launchers import launched
from tests.launch.helpers import ROOT, fit_config, tandem
from trainer.schema import UserError

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def words(tmp_path, tiny_llama) -> list[str]:
    config = fit_config(tmp_path, tiny_llama, steps=4)
    return ["fit", "--config", str(config), "--run", str(tmp_path / "run")]


@pytest.fixture
def while_loading(monkeypatch):
    """`while_loading(number)`: this process gets the signal as the next run loads its model."""
    import trainer.module

    load = trainer.module.load_policy

    def signalled(number: int) -> None:
        def load_policy(*args):
            monkeypatch.setattr(trainer.module, "load_policy", load)
            os.kill(os.getpid(), number)
            return load(*args)

        monkeypatch.setattr(trainer.module, "load_policy", load_policy)

    return signalled


ENDS = """
import os, signal, sys
from launch.cli import main
sys.argv = ["tandem", *sys.argv[1:]]
status = main()
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(status)
"""


def test_a_warning_that_comes_after_the_end_does_not_fail_the_job(words) -> None:
    """Python takes a second to end once torch is loaded, and SLURM does not know that the run is over."""
    done = subprocess.run([sys.executable, "-c", ENDS, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_while_loading_is_not_lost(tmp_path, words, while_loading, capsys, number, status) -> None:
    before = [signal.getsignal(each) for each in HANDLED]
    while_loading(number)
    assert main(words) == status
    told = capsys.readouterr().err
    assert f"tandem: {number.name}: stopped at step 1; saved as" in told
    assert "finished" not in told
    assert manifest(tmp_path / "run")["status"] == "interrupted"
    assert manifest(tmp_path / "run")["step"] == 1
    assert [signal.getsignal(each) for each in HANDLED] == before
    assert main([*words, "--resume", "auto"]) == 0
    assert manifest(tmp_path / "run")["step"] == 4


def test_ctrl_c_while_loading_ends_at_once(tmp_path, words, while_loading, capsys) -> None:
    while_loading(signal.SIGINT)
    assert main(words) == 130
    assert "tandem: interrupted" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert main([*words, "--resume", "auto"]) == 0


def test_the_second_ctrl_c_ends_at_once(tmp_path, words, monkeypatch, capfd) -> None:
    import trainer.module

    step = trainer.module.PreferenceModule.training_step

    def impatient(self, *args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(trainer.module.PreferenceModule, "training_step", impatient)
    assert main(words) == 130
    told = capfd.readouterr().err
    assert "saving at the end of this step; again to end at once" in told
    assert "tandem: interrupted; nothing was saved yet" in told
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_the_loader_s_workers_outlive_the_signal(tmp_path, words, monkeypatch, capfd, number) -> None:
    """SLURM and a terminal signal every process; the step that runs may still need what the workers lay."""
    import trainer.module

    step, signalled = trainer.module.PreferenceModule.training_step, []
    others = {child.pid for child in psutil.Process().children()}  # of tests before this one

    def group(self, *args):
        if not signalled:
            signalled.extend(child.pid for child in psutil.Process().children() if child.pid not in others)
            for pid in [*signalled, os.getpid()]:
                os.kill(pid, number)
            time.sleep(0.2)
        return step(self, *args)

    monkeypatch.setattr(trainer.module.PreferenceModule, "training_step", group)
    more = ["--data.workers", "2", "--data.batch_size", "8", "--trainer.accumulate_grad_batches", "8"]
    assert main([*words, *more]) == 128 + number
    told = capfd.readouterr().err
    assert len(signalled) == 2
    assert "stopped at step 1; saved as" in told
    assert "Traceback" not in told
    assert not any(psutil.pid_exists(pid) for pid in signalled)


def test_an_old_job_s_checkpoint_is_not_picked_up(tmp_path, words, monkeypatch) -> None:
    """Lightning, in a job of SLURM, would load it in place of a fresh start."""
    for name in ("NTASKS", "JOB_ID", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID", "STEP_ID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    (tmp_path / "run").mkdir()
    torch.save({"old": "job"}, tmp_path / "run" / "hpc_ckpt_1.ckpt")
    assert main(words) == 0
    assert manifest(tmp_path / "run")["from_step"] == 0
    weights = ["--weights", str(tmp_path / "run")]
    validation = ["--trainer.limit_val_batches", "1.0", "--data.source.validation_fraction", "0.1"]
    assert main(["validate", *words[1:], *validation, *weights]) == 0
    assert main(["validate", *words[1:], *validation]) == 0


def test_a_run_cut_off_after_its_last_step_is_finished_by_the_next_attempt(tmp_path, words) -> None:
    """A job killed while its end is sampled, say: nothing is left to train, and the manifest must say so."""
    assert main(words) == 0
    path = tmp_path / "run" / "manifest.json"
    path.write_text(json.dumps(manifest(path.parent) | {"status": "running", "step": 0, "ended": None}))
    assert main([*words, "--resume", "auto"]) == 0
    after = manifest(path.parent)
    assert (after["status"], after["step"], after["from_step"]) == ("finished", 4, 0)


def test_resume_auto_is_for_the_same_run_only(tmp_path, words, capsys) -> None:
    assert main(words) == 0
    folder, longer = tmp_path / "run", ["--trainer.max_steps", "5"]
    for change, told in {
        "--model.policy.adapter.kind lora": "model.policy.adapter.kind is lora, was ia3",
        "--model.objective.beta 0.3": "model.objective.beta is 0.3, was 0.1",
        "--data.batch_size 3": "data.batch_size is 3, was 2",
        "--model.policy.adapter null": "model.policy.adapter",
    }.items():
        before = (folder / "manifest.json").read_bytes()
        assert main([*words, "--resume", "auto", *longer, *change.split()]) == 2
        line = capsys.readouterr().err
        assert f"holds another run ({told}" in line
        assert f"--resume {folder}" in line
        assert (folder / "manifest.json").read_bytes() == before
    same = ["--model.policy.offline", "true", "--data.workers", "1", "--checkpoint.save_steps", "2"]
    assert main([*words, "--resume", "auto", *longer, *same]) == 0
    # By name it goes on all the same, and says what differs.
    capsys.readouterr()
    assert (
        main([*words, "--resume", str(folder), "--trainer.max_steps", "6", "--model.objective.beta", "0.3"])
        == 0
    )
    assert "resuming with model.init_args.objective.beta: 0.3 (was 0.1)" in capsys.readouterr().err


def test_a_setting_that_an_older_version_did_not_have_is_no_difference() -> None:
    old = {"model": {"init_args": {"policy": {"base": "x", "adapter": None}}}, "trainer": {"max_steps": 1}}
    new = {
        "model": {"init_args": {"policy": {"base": "x", "adapter": None, "new": 1}}},
        "trainer": {"max_steps": 2},
    }
    refuse_another_run(Path("run"), old, new)
    new["model"]["init_args"]["policy"]["adapter"] = {"kind": "ia3"}
    with pytest.raises(UserError, match="adapter"):
        refuse_another_run(Path("run"), old, new)


def test_torchrun_s_restarts_that_cannot_work_are_refused() -> None:
    env = {
        "TORCHELASTIC_RUN_ID": "a",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }
    assert launched({**env, "TORCHELASTIC_USE_AGENT_STORE": "False"})["devices"].value == 2
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        launched({**env, "TORCHELASTIC_USE_AGENT_STORE": "True"})


@pytest.mark.slow
@pytest.mark.alone
def test_a_recipe_passes_the_warning_on_and_goes_on_later(tmp_path, tiny_llama) -> None:
    """`tandem run` in a job that is warned of its time limit."""
    config = fit_config(
        tmp_path, tiny_llama, steps=60, callbacks=[{"class_path": "tests.soak.jitter.Jitter"}]
    )
    recipe = tmp_path / "recipe.yaml"
    stage = {"name": "dpo", "command": "fit", "config": [config.name], "arguments": {"data.seed": 0}}
    stage |= {"inputs": [], "outputs": ["{folder}/checkpoints"]}
    recipe.write_text(yaml.safe_dump({"name": "soak", "title": "Soak", "names": {}, "stages": [stage]}))
    command = [sys.executable, "-m", "launch", "run", str(recipe), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 90
    while not list(tmp_path.glob("out/*/checkpoints/last")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 138, told
    assert "SIGUSR1: stopped at step" in told
    done = tandem(command[3:])
    assert done.returncode == 0, done.stderr
    assert "interrupted last time" in done.stdout
