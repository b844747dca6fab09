"""Reference log-probs that two ranks compute once and both know: the numbers of one device with a live reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.ending import leave_together
from tests.distributed.ranks import made, run_on_ranks
from tests.launch.helpers import fit_config
from trainer.policy.reference_cache import ReferenceCache
from trainer.policy.reference_files import RECORD, CacheFolder, merged
from trainer.schema import PairLogps, UserError

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 3  # of 3 steps of two forwards each


@pytest.fixture(scope="module")
def seen(tiny_llama, tmp_path_factory):
    """What one device with a live reference saw, and what two ranks of each strategy did."""
    folder = tmp_path_factory.mktemp("cached")
    settings = {
        "task": "dpo", "base": str(tiny_llama), "epochs": EPOCHS, "accumulate": 2, "counted": True,
        "optimizer": {"name": "adamw", "lr": 1e-2},
    }  # fmt: skip
    plans = {}
    for strategy in ("ddp", "zero3"):
        here = {**settings, "strategy": strategy}
        run, kept = str(folder / f"{strategy}-run"), str(folder / "kept")
        plans |= {
            f"{strategy}-memory": here,
            f"{strategy}-run": {**here, "run": run, "save": {"4": f"{strategy}-4"}},
            f"{strategy}-resumed": {**here, "run": run, "resume": str(folder / f"{strategy}-4")},
            # The first of them fills the folder, and the others need no reference weights.
            f"{strategy}-kept": {**here, "reference": "sharded", "cache": kept},
            f"{strategy}-again": {**here, "reference": "sharded", "cache": kept},
        }
    out = run_on_ranks(folder, 2, plans)
    return {"live": made({**settings, "cache": None}, 1, folder), **out}


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("how", ["memory", "run", "kept", "again"])
def test_two_ranks_equal_one_with_a_live_reference(seen, strategy, how) -> None:
    run = seen[f"{strategy}-{how}"]
    assert len(run["steps"]) == 3 * EPOCHS
    for mine, theirs in zip(run["steps"], seen["live"]["steps"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert run["validation"] == pytest.approx(seen["live"]["validation"], abs=1e-5)
    assert run["log_probs"]["entries"] == 27


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_reference_forwards_are_made_in_the_first_epoch_only(seen, strategy) -> None:
    first = seen[f"{strategy}-memory"]["forwards"]
    assert first > 0
    assert seen["live"]["forwards"] % EPOCHS == 0
    assert seen[f"{strategy}-run"]["forwards"] == first
    assert seen[f"{strategy}-resumed"]["forwards"] == 0
    assert seen[f"{strategy}-again"]["forwards"] == 0
    assert seen[f"{strategy}-again"]["shares"]["reference"] == [0, 0], "no weights were loaded"


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_run_resumed_in_its_second_epoch_is_the_run_that_was_not_cut(seen, strategy) -> None:
    assert seen[f"{strategy}-resumed"]["losses"] == seen[f"{strategy}-run"]["losses"][4:]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [[], ["--sharded"]])
def test_two_ranks_build_the_cache_of_one(tmp_path, tiny_llama, sharded) -> None:
    from tests.launch.test_cache_reference import built, content

    config = fit_config(tmp_path, tiny_llama)
    built(config, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "launch.cli", "cache-reference", "--config", str(config), *sharded]
    command += ["--data.token_budget", "300", "--threads", "1"]
    for new in ("146 new", "0 new"):
        done = subprocess.run(
            [*command, "--output", str(tmp_path / "two")],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("pairs (") == 1, "one rank speaks for both"
        assert new in done.stdout
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert (one["key"] == two["key"]).all()
    assert one["chosen"] == pytest.approx(two["chosen"], abs=1e-4)
    assert len(merged(one)) == 146


def _on_disks_of_their_own(rank: int, folder: str) -> None:
    """A rank that sees another disk than the others: what each call says goes into a file."""
    import torch

    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=2)
    said = []
    for name in ("kept", "nowhere"):
        cache = ReferenceCache({"base": "a"})
        try:
            cache.attach(CacheFolder(Path(folder) / f"disk{rank}" / name, cache.identity), strict=True)
            said.append(f"{len(cache)} known")
        except UserError as error:
            said.append(str(error))
    Path(folder, f"said{rank}").write_text("\n".join(said))
    leave_together()


def test_a_folder_is_asked_for_by_the_first_rank_alone(tmp_path) -> None:
    import torch

    table = np.zeros(3, RECORD)
    table["key"] = [bytes([i]) * 16 for i in range(1, 4)]
    kept = CacheFolder(tmp_path / "disk0" / "kept", {"base": "a"})
    kept.append(table)
    kept.close()
    torch.multiprocessing.spawn(_on_disks_of_their_own, (str(tmp_path),), nprocs=2)
    first, second = ((tmp_path / f"said{rank}").read_text().splitlines() for rank in range(2))
    assert first == second
    assert first[0] == "3 known"
    assert "disk0/nowhere: no such folder" in first[1]


def _without_room(rank: int, folder: str) -> None:
    import errno
    from types import SimpleNamespace

    import torch

    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", rank=rank, world_size=2)
    cache = ReferenceCache({"base": "a"})
    cache.attach(CacheFolder(Path(folder) / "kept", cache.identity))
    cache.must_write = True

    def full(records: np.ndarray) -> None:
        raise OSError(errno.EDQUOT, "full")

    cache.folder.append = full
    one = torch.ones(1)
    batch = SimpleNamespace(keys=[bytes([rank + 1]) * 16])
    cache.record(batch, PairLogps(one, one, one.long(), one.long()))
    with pytest.raises(UserError, match="no room"):
        cache.share()
    assert len(cache) == 2
    leave_together()


def test_a_full_disk_ends_all_ranks_of_a_build(tmp_path) -> None:
    import torch

    torch.multiprocessing.spawn(_without_room, (str(tmp_path),), nprocs=2)
