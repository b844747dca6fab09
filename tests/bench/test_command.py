"""`tandem bench` as a user starts it: a whole toy run, resumed, shown again; and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.commands.bench import main
from tests.bench.test_workloads import dialogues
from trainer.schema import UserError

FIELDS = {
    "arm", "workload", "dtype", "epochs", "pairs_per_second", "peak_memory_bytes", "model_flops_share", "flops_ratio",
    "setup_seconds", "settings", "repeats",
}  # fmt: skip


def bench(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.cli", "bench", "--threads", "1", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The quick run of two workloads with tandem and TRL's fastest."""
    folder = tmp_path_factory.mktemp("whole")
    out, rows = folder / "out.json", dialogues(folder / "rows.jsonl", 30)
    words = ("--quick", "--workloads", f"hh_rlhf={rows}", "--output", out, "--picture", folder / "out.png")
    return out, bench(*words)


@pytest.mark.slow
@pytest.mark.alone
def test_a_whole_toy_run(whole):
    out, done = whole
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert not [each for each in found["measurements"] if "error" in each]
    assert [(row["arm"], row["epochs"]) for row in found["rows"]] == [
        ("tandem", 1), ("tandem", 3), ("trl_fastest", 1), ("trl_fastest", 3),
    ]  # fmt: skip
    for row in found["rows"]:
        assert set(row) >= FIELDS
        assert row["workload"] == "hh_rlhf"
        for name in ("pairs_per_second", "peak_memory_bytes", "model_flops_share"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
    assert {"command", "machine", "versions", "date", "fits", "chosen"} <= set(found)
    assert len([m for m in found["measurements"] if m["purpose"] == "sweep"]) == 7
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "TRL, fastest" in done.stdout
    assert "trl 1." in done.stdout


@pytest.mark.slow
@pytest.mark.alone
def test_what_is_there_is_not_measured_again(whole, tmp_path):
    found, out = json.loads(whole[0].read_text()), tmp_path / "out.json"
    lost = found["measurements"].pop()
    kept = [each["result"] for each in found["measurements"]]
    out.write_text(json.dumps(found))
    words = ["--quick", "--workloads", *found["settings"]["workloads"], "--output", str(out)]
    start = time.monotonic()
    done = bench(*words, "--resume")
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text())
    assert [each["result"] for each in again["measurements"][: len(kept)]] == kept
    assert [each["key"] for each in again["measurements"][len(kept) :]] == [lost["key"]]
    assert time.monotonic() - start < 120
    assert bench(*words).returncode == 2
    done = bench(*words, "--resume", "--seed", "1")
    assert done.returncode == 2
    assert "--seed 1" in done.stderr
    assert "was begun with 0" in done.stderr


@pytest.mark.slow
@pytest.mark.alone
def test_results_are_shown_again(whole, tmp_path, capsys):
    out, done = whole
    assert main(["--show", str(out), "--picture", str(tmp_path / "again.svg")]) == 0
    assert capsys.readouterr().out.split() == done.stdout.split()
    assert "<svg" in (tmp_path / "again.svg").read_text()


@pytest.mark.slow
@pytest.mark.alone
def test_a_kill_leaves_no_arm_behind_and_whole_results(tmp_path):
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "bench",
        "--quick",
        "--arms",
        "tandem",
        "--output",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not out.exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert out.exists(), "nothing was measured"
    time.sleep(2.0)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    arms = [int(word) for word in children.stdout.split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(json.loads(out.read_text())["measurements"]) >= 1
    until = time.monotonic() + 20
    while any(Path(f"/proc/{arm}").exists() for arm in arms) and time.monotonic() < until:
        time.sleep(0.2)
    assert arms
    assert not any(Path(f"/proc/{arm}").exists() for arm in arms)


def test_without_trl_it_says_how_to_get_it(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else real(name, *rest)
    )
    with pytest.raises(UserError, match=r"TRL is not installed; pip install 'tandem\[bench\]'"):
        main(["--output", str(tmp_path / "out.json")])


def test_trl_is_imported_only_where_it_runs(tmp_path):
    words = (
        "import sys, launch.commands.bench as b; b.parser(); import launch.bench.run, launch.bench.tandem_arm"
    )
    check = f"{words}; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], env={**os.environ}).returncode == 0


def test_what_cannot_be_shown_is_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        main(["--show", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match=r"should end with \.png"):
        main(["--picture", "out.gif"])
    out = tmp_path / "out.json"
    out.write_text("{}")
    with pytest.raises(UserError, match="is there already; give --resume"):
        main(["--output", str(out)])
