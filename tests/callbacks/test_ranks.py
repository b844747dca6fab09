"""The callbacks on two real ranks: one set of files, one decision, one end when the disk is full."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.distributed
def test_a_full_disk_ends_both_ranks_with_the_same_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    command = [sys.executable, "-m", "tests.callbacks.ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-3000:]
    said = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "step-00000006: could not be saved: No space left on device" in said[0]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-00000002", "step-00000004", "best", "last"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["world_size"] == 2
    # Two ranks of ten tokens a step; five steps were counted before the one that failed, and it, too.
    assert manifest["callbacks"]["Throughput"]["tokens"] == 120
