"""The same run from every launcher, and ranks that end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from launch.lightning_run import free_port
from tests.launch.helpers import ROOT, fit_config
from tests.slurm.cluster import wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]

BIN = Path(sys.executable).parent


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """A command of this environment's, with its output in a file."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "JITTER": "0.05"}
    with (folder / "said").open("w") as said:
        command = [str(BIN / words[0]), *words[1:]]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT, text=True)


def commands(config: Path, folder: Path) -> dict[str, list[str]]:
    ours = ["--config", str(config), "--threads", "1"]
    flags = ["--accelerator=cpu", "--devices=2", "--num-nodes=1", "--strategy=ddp", "--precision=32-true"]
    # Python 3.11's torchrun takes our --run for its --run-path, if no `--` stands before the script.
    port = str(free_port())
    root = "--trainer.default_root_dir"
    return {
        "tandem": ["tandem", "fit", *ours, "--run", f"{folder}/tandem", "--trainer.devices", "2"],
        "lightning": ["lightning", "run", "launch/fit.py", *flags, *ours, "--run", f"{folder}/lightning"],
        "fabric": [*["fabric", "run", *flags, "--main-port", port, "launch/fit.py", *ours], root, f"{folder}/fabric"],
        "torchrun": [
            *["torchrun", "--nproc-per-node=2", "--master-port", str(free_port()), "--", "launch/fit.py"],
            *[*ours, "--run", f"{folder}/torchrun"],
        ],
    }  # fmt: skip


def test_every_launcher_trains_the_same_adapter(tmp_path, tiny_llama):
    """`srun` is compared with `tandem fit` in tests/slurm/test_scripts.py."""
    config = fit_config(tmp_path, tiny_llama, steps=4, devices="auto")
    adapters = {}
    for name, words in commands(config, tmp_path).items():
        process = start(words, tmp_path)
        assert process.wait(120) == 0, (name, (tmp_path / "said").read_text())
        adapters[name] = (tmp_path / name / "checkpoints" / "last" / "adapter_model.safetensors").read_bytes()
        assert (tmp_path / "said").read_text().count("finished at step 4") == 1
    assert set(adapters.values()) == {adapters["tandem"]}


def test_the_config_for_many_nodes_trains(tmp_path, tiny_llama):
    """ZeRO-3 with a second copy of the weights on each node; here a node of two CPU ranks."""
    config = fit_config(tmp_path, tiny_llama, devices="auto")
    ours = [
        "--config",
        str(config),
        "--config",
        "configs/hardware/many_nodes.yaml",
        "--run",
        f"{tmp_path}/run",
    ]
    here = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
        "--trainer.strategy.hpz_partition_size",
        "2",
    ]
    process = start(["tandem", "fit", *ours, *here, "--rank_timeout", "100", "--threads", "1"], tmp_path)
    assert process.wait(150) == 0, (tmp_path / "said").read_text()
    strategy = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["strategy"]
    assert strategy["class_path"] == "trainer.strategy.Zero3"
    assert (strategy["init_args"]["hpz_partition_size"], strategy["init_args"]["timeout"]) == (2, 100)


@pytest.fixture
def running(tmp_path, tiny_llama):
    """A run of two ranks that `tandem fit` has started, under way: the process, and its child."""
    jitter = {"class_path": "tests.slurm.jitter.Jitter"}
    config = fit_config(tmp_path, tiny_llama, steps=100_000, devices="auto", **{"callbacks+": [jitter]})
    process = start(commands(config, tmp_path)["tandem"], tmp_path)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "tandem" / "checkpoints" / "last").exists():
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)
        (child,) = psutil.Process(process.pid).children()
        yield process, child
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_dies_ends_the_run_within_seconds(running):
    process, child = running
    child.send_signal(signal.SIGKILL)
    assert process.wait(20) != 0


def test_a_rank_does_not_outlive_rank_zero(running):
    process, child = running
    process.kill()
    process.wait(10)
    child.wait(20)


CHILD = """
import time
from launch.following import follow_parent
follow_parent(grace=0.5)
print("following", flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys
from launch.following import follow_parent
follow_parent()
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env={{**os.environ, "LOCAL_RANK": "1"}})
print(child.pid, flush=True)
child.wait()
"""


def test_a_rank_that_waits_elsewhere_does_not_either():
    """gloo's ranks see a closed connection; one that loads a model, or waits in NCCL, does not."""
    env = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "TANDEM_PARENT")}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "following\n"
    parent.kill()
    parent.wait()
    child.wait(10)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_to_the_launcher_reaches_its_ranks(tmp_path, tiny_llama, number):
    """SLURM warns the launcher too; killed, it leaves no ranks that go on without it."""
    config = fit_config(tmp_path, tiny_llama, steps=100_000, devices="auto")
    process = start(commands(config, tmp_path)["lightning"], tmp_path)
    last = tmp_path / "lightning" / "checkpoints" / "last"
    wait_until(last.exists, 90, "the first checkpoint")
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    process.send_signal(number)
    assert process.wait(60) != 0
    psutil.wait_procs(ranks, 30)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    told = (tmp_path / "said").read_text()
    assert ("SIGUSR1: stopped at step" in told) == (number == signal.SIGUSR1), told


def waiting_signals(process: subprocess.Popen[str]) -> int:
    """The signals that a process has wait for later, one bit for each."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("SigBlk:")[1].split()[0], 16)


def test_a_warning_while_libraries_are_imported_waits(tmp_path, tiny_llama):
    """SLURM's warning may come at any time; unhandled, USR1 would end the process and lose the job."""
    config = fit_config(tmp_path, tiny_llama, steps=100_000)
    process = start(["tandem", "fit", "--config", str(config), "--run", f"{tmp_path}/run"], tmp_path)
    held = 1 << signal.SIGUSR1 - 1 | 1 << signal.SIGTERM - 1
    wait_until(lambda: waiting_signals(process) == held, 30, "Python's start")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(90) == 128 + signal.SIGUSR1, (tmp_path / "said").read_text()
    assert "SIGUSR1: stopped at step 1;" in (tmp_path / "said").read_text()
