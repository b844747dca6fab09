"""Jobs that are cut short on a real SLURM: each resumes, and ends with the adapter of an undisturbed run."""

from __future__ import annotations

import json
import time

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.jobs import STEPS, adapter

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.alone, pytest.mark.distributed]


def states_until(cluster, number: str, condition, seconds: float = 120) -> set[str]:
    """The job's states until `condition()`."""
    seen: set[str] = set()

    def look() -> bool:
        seen.add(cluster.job(number)["JobState"])
        return condition()

    try:
        wait_until(look, seconds, "the job's next state")
    except AssertionError as error:
        raise AssertionError(f"{error}; so far {seen}") from error
    return seen


def test_scontrol_requeue(jobs, undisturbed):
    """Of a job that was told to overwrite an old run: its second start must not overwrite its first."""
    jobs.run.mkdir()
    (jobs.run / "manifest.json").write_text('{"status": "finished"}')
    number = jobs.fit("--overwrite", jitter=0.5)
    jobs.reach(3)
    jobs.cluster.run("scontrol", "requeue", number)
    seen = states_until(jobs.cluster, number, lambda: "start 2," in jobs.said())
    assert "COMPLETED" not in seen
    jobs.finished(number, Restarts=1)
    assert "resumed from" in jobs.said()
    assert adapter(jobs.run) == undisturbed


def test_the_warning_before_the_time_limit(jobs, undisturbed):
    # SLURM looks at time limits every 30 s: the warning comes 21 to 29 s after the start.
    number = jobs.fit(jitter=3.5, options=("--time=1", "--signal=USR1@10"))
    seen = states_until(jobs.cluster, number, lambda: "start 2," in jobs.said())
    assert "COMPLETED" not in seen
    assert 0 < jobs.step() < STEPS
    # The rest fits into the time of the second start, or is warned again.
    states_until(jobs.cluster, number, lambda: jobs.cluster.job(number)["JobState"] == "COMPLETED", 240)
    assert int(jobs.cluster.job(number)["Restarts"]) >= 1
    assert adapter(jobs.run) == undisturbed


def test_a_node_that_fails(jobs, undisturbed):
    number = jobs.fit(jitter=0.5, options=("--nodes=2", "--ntasks-per-node=1"))
    jobs.reach(3)
    jobs.cluster.run("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    try:
        seen = states_until(jobs.cluster, number, lambda: jobs.cluster.job(number)["Restarts"] == "1")
    finally:
        # Its slurmd may have brought it back by itself.
        jobs.cluster.run("scontrol", "update", "nodename=n1", "state=resume", check=False)
    assert "COMPLETED" not in seen
    jobs.finished(number, Restarts=1)
    assert "resumed from" in jobs.said()
    assert adapter(jobs.run) == undisturbed


def test_scancel_is_a_clear_stop_that_another_job_goes_on_from(jobs, undisturbed):
    number = jobs.fit(jitter=0.5)
    jobs.reach(3)
    jobs.cluster.run("scancel", number)
    assert jobs.cluster.ended(number)["JobState"] == "CANCELLED"
    wait_until(
        lambda: "srun" not in jobs.cluster.run("squeue", "-h", "-s", "-j", number), 30, "the steps' end"
    )
    time.sleep(2)
    manifest = json.loads((jobs.run / "manifest.json").read_text())
    assert manifest["status"] in ("interrupted", "running")
    jobs.finished(jobs.fit("--resume", "auto"))
    assert adapter(jobs.run) == undisturbed


def test_an_array_of_runs_one_of_them_requeued(jobs, undisturbed):
    runs = [jobs.folder / f"run-{task}" for task in (0, 1)]
    log = f"--output={jobs.folder}/%A_%a.out"
    number = jobs.fit("--run", f"{jobs.folder}/run-%a", jitter=0.5, options=("--array=0-1", log))
    jobs.reach(3, runs[1])
    jobs.cluster.run("scontrol", "requeue", f"{number}_1")
    jobs.finished(f"{number}_0", Restarts=0)
    jobs.finished(f"{number}_1", Restarts=1)
    assert [adapter(run) for run in runs] == [undisturbed] * 2
