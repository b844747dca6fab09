"""An evaluation on two ranks, with the model whole on each or spread over both, is the evaluation on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.commands.evaluate_letters import letters, parser
from tests.launch.helpers import fit_config, tandem

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The cat saw your cosy coat", "Она сказала, что у неё всё хорошо", "o", "Only you", "сорок сорок"]


@pytest.mark.parametrize("sharded", [[], ["--sharded"]])
def test_two_ranks_answer_as_one(tmp_path, sharded) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    given = ["--texts", str(tmp_path / "texts.txt"), "--batch_size", "2", "--threads", "1"]
    letters(parser().parse_args([*given, "--output", str(tmp_path / "one.json")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "launch.cli", "evaluate", "letters", *given, *sharded]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "two.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("substituted:") == 1, "one rank speaks for both"
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["sentences"] == len(TEXTS)
    assert one == two


def test_validation_under_zero3_is_validation_on_one_device(tmp_path, tiny_llama) -> None:
    config = fit_config(tmp_path, tiny_llama, limit_val_batches=2)
    one = tandem(["validate", "--config", str(config)])
    more = ["--trainer.devices", "2", "--trainer.strategy", "zero3", "--rank_timeout", "60"]
    two = tandem(["validate", "--config", str(config), *more], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr[-3000:]
    assert "val/rewards/accuracies" in json.loads(one.stdout)
    assert json.loads(two.stdout) == pytest.approx(json.loads(one.stdout), abs=1e-5, rel=1e-6)
