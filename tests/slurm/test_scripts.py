"""The shipped job scripts on a real SLURM of two nodes: the same result as without it, and an honest status."""

from __future__ import annotations

import os

import pytest

from tests.slurm.jobs import SHARDS, adapter

pytestmark = pytest.mark.slurm


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [("--gpus-per-node=2",), ("--nodes=2", "--ntasks-per-node=1")],
    ids=["one-node", "two-nodes"],
)
def test_a_job_s_ranks_train_what_tandem_fit_s_own_do(jobs, undisturbed, options):
    number = jobs.fit(options=options)
    jobs.finished(number, Restarts=0)
    assert adapter(jobs.run) == undisturbed
    assert "start 1," in jobs.said()
    assert "ended with status 0," in jobs.said()


def test_a_mistake_reads_failed_and_the_log_says_why(jobs):
    number = jobs.fit("--trainer.devices", "4")
    job = jobs.cluster.ended(number)
    # Both ranks fail with 2; srun may have ended the slower one (143) before it came to that.
    assert (job["JobState"], job["ExitCode"] in ("2:0", "143:0")) == ("FAILED", True)
    assert "--trainer.devices 4 contradicts SLURM_NTASKS_PER_NODE=2 (--ntasks-per-node)" in jobs.said()
    assert not (jobs.run / "manifest.json").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--gpus-per-node=2", "--ntasks-per-node=1"), "2 GPUs on a node, but --ntasks-per-node=1"),
        (("--gpus-per-task=1", "--ntasks-per-node=2"), "give --gpus-per-node=N in place of --gpus-per-task"),
    ],
)
def test_gpus_that_do_not_fit_the_tasks_are_refused_before_anything_starts(jobs, asked, told):
    job = jobs.cluster.ended(jobs.fit(options=asked))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert told in jobs.said()


@pytest.fixture
def project(tmp_path):
    """A project's folder whose tandem writes down what it was asked; commands that take --shard do no more here."""
    tandem = tmp_path / ".venv" / "bin" / "tandem"
    tandem.parent.mkdir(parents=True)
    tandem.write_text('#!/bin/bash\necho "$@" > "asked-$SLURM_ARRAY_TASK_ID"\n[ "$2" != "fail" ]\n')
    tandem.chmod(0o755)
    return tmp_path


def shards(cluster, project, *words, array, **settings):
    options = (f"--array={array}", f"--chdir={project}", "--cpus-per-task=1")
    before = os.getcwd()
    os.chdir(project)
    try:
        return cluster.submit(SHARDS, *words, options=options, **settings)
    finally:
        os.chdir(before)


def test_an_array_hands_each_task_its_shard(cluster, project):
    number = shards(cluster, project, "pairs", "--out", "a b", array="0-3")
    for task in range(4):
        assert cluster.ended(f"{number}_{task}")["JobState"] == "COMPLETED"
        assert (project / f"asked-{task}").read_text() == f"pairs --out a b --shard {task}/4\n"
        assert "ended with status 0" in (project / f"tandem-{number}_{task}.out").read_text()


def test_single_shards_are_repeated_and_failures_read_failed(cluster, project):
    number = shards(cluster, project, "pairs", array="1,3", SHARDS="4")
    assert [cluster.ended(f"{number}_{task}")["JobState"] for task in (1, 3)] == ["COMPLETED"] * 2
    assert (project / "asked-3").read_text() == "pairs --shard 3/4\n"
    # 2 of 2 is not there: a number short of what --array says.
    number = shards(cluster, project, "pairs", array="1-2")
    assert [cluster.ended(f"{number}_{task}")["ExitCode"] for task in (1, 2)] == ["2:0"] * 2
    assert "number them from 0 (--array=0-1)" in (project / f"tandem-{number}_2.out").read_text()
    number = shards(cluster, project, "pairs", "fail", array="0-0")
    assert cluster.ended(f"{number}_0")["JobState"] == "FAILED"
