"""A short soak, ranks that are lost, and processes that `tandem fit` starts itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.helpers import ROOT, fit_config
from tests.soak.lost import TIMEOUT

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.timeout(1200)
def test_ten_of_each_signal_at_random_moments(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak.soak", "--count", "10", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["TERM: 10 ok", "USR1: 10 ok"]


@pytest.mark.timeout(400)
def test_a_lost_rank_fails_the_job_within_the_set_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak.lost", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr[-3000:]
    for way, seen in json.loads(done.stdout.splitlines()[-1]).items():
        other, lines = 1 - seen["lost"], seen["log"].splitlines()
        told = [line for line in lines if line.startswith("tandem: error")]
        assert seen["codes"][other] == 1, (way, seen)
        assert any(f"rank {other} of 2 lost another one" in line for line in told), (way, seen["log"][-3000:])
        assert seen["seconds"] < (TIMEOUT + 5 if way.startswith("stopped") else 5), (way, seen)
        if way == "error":
            assert seen["codes"] == [1, 2]
            assert any("rank one cannot read its part of the data" in line for line in told)
        assert "Traceback" not in seen["log"]


def start(folder: Path, base: Path) -> subprocess.Popen:
    """`tandem fit` with two processes of its own, waited for until it trains."""
    jitter = {"class_path": "tests.soak.jitter.Jitter"}
    config = fit_config(folder, base, steps=2000, devices=2, strategy="ddp", callbacks=[jitter])
    command = [sys.executable, "-m", "launch", "fit", "--config", str(config), "--run", str(folder / "run")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(folder / "run" / "checkpoints" / "last", process)
    return process


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert path.exists(), "the run does not train"


def child_of(process: subprocess.Popen) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return next(pid for pid, name in names.items() if "launch" in name)


@pytest.mark.parametrize(
    ("number", "to", "status"),
    [
        (signal.SIGTERM, "rank zero", 143),
        (signal.SIGUSR1, "the other", 138),
        (signal.SIGINT, "all", 130),
        (signal.SIGKILL, "the other", 1),
    ],
)
def test_the_processes_that_fit_starts_itself_end_together(tmp_path, tiny_llama, number, to, status) -> None:
    process = start(tmp_path, tiny_llama)
    child = child_of(process)
    for pid in {"rank zero": [process.pid], "the other": [child], "all": [process.pid, child]}[to]:
        os.kill(pid, number)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == status, told
    assert time.monotonic() - began < 15
    assert not Path(f"/proc/{child}").exists()
    assert "Traceback" not in told
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    if number == signal.SIGKILL:
        assert f"(process {child}) ended with signal 9 (SIGKILL)" in told
        assert manifest["status"] == "failed"
    else:
        assert f"stopped at step {manifest['step']}; saved as" in told
        assert manifest["status"] == "interrupted"
        assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == f"step-{manifest['step']:08d}"


def torchrun(folder: Path, base: Path, env: dict[str, str]) -> subprocess.Popen:
    jitter = {"class_path": "tests.soak.jitter.Jitter"}
    config = fit_config(folder, base, steps=40, devices="auto", strategy="ddp", callbacks=[jitter])
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Not --run: Python 3.11 takes it for a part of torchrun's own --run-path.
    place = ["--trainer.default_root_dir", str(folder / "run")]
    words = ["launch/fit.py", "--config", str(config), *place, "--resume", "auto"]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [*agent, "--max-restarts", "1", *words], cwd=ROOT, env=env, stderr=log, stdout=log
        )


def test_torchrun_starts_a_run_that_was_told_to_stop_again_and_it_goes_on(tmp_path, tiny_llama) -> None:
    agent = torchrun(tmp_path, tiny_llama, {**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    wait_for(tmp_path / "run" / "checkpoints" / "last", agent)
    os.kill(child_of(agent), signal.SIGTERM)
    status = agent.wait(timeout=120)
    told = (tmp_path / "log").read_text()
    assert status == 0, told[-3000:]
    assert "SIGTERM: stopped at step" in told
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["step"]) == ("finished", 40)
    assert [attempt["status"] for attempt in manifest["attempts"]] == ["interrupted"]
    assert manifest["from_step"] == manifest["attempts"][0]["step"] > 0
