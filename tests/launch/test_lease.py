"""The lock of a run's folder: one writer, taken over from the dead and from a job's earlier starts only."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launch.cli import main
from launch.lease import LOCK, Holder, Lease, this_process
from tests.launch.helpers import fit_config
from trainer.checkpoint import PortableCheckpointIO
from trainer.schema import UserError


def someone(**settings) -> Holder:
    """Another process; its nonce differs each time."""
    return dataclasses.replace(this_process({}), pid=1234567, **settings)


def leave(folder: Path, holder: Holder) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(holder)))
    return folder / LOCK


def hold(folder: Path, held, environment: dict[str, str]) -> None:
    Lease(folder, this_process(environment))
    held.set()
    time.sleep(60)


@pytest.fixture
def holding(tmp_path):
    """`holding(**environment)`: a live process that holds `tmp_path / "run"`."""
    started = []

    def start(**environment: str):
        context = multiprocessing.get_context("fork")
        held = context.Event()
        process = context.Process(target=hold, args=(tmp_path / "run", held, environment), daemon=True)
        process.start()
        assert held.wait(20)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_job_is_refused_in_one_line_and_a_dead_one_is_forgotten_at_once(tmp_path, holding) -> None:
    process = holding(SLURM_JOB_ID="41")
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        Lease(tmp_path / "run", dead=30)
    told = str(refused.value)
    assert f"in use by SLURM job 41 (process {process.pid} on " in told
    assert "scancel 41" in told
    assert "\n" not in told
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lease = Lease(tmp_path / "run", dead=30)
    assert time.monotonic() - began < 5
    lease.check()
    lease.release()
    assert not list((tmp_path / "run").iterdir())
    Lease(tmp_path / "new").release()
    assert not (tmp_path / "new").exists()  # made for the lock alone


def test_a_forked_child_does_not_keep_the_lock(tmp_path) -> None:
    lease = Lease(tmp_path)
    pid = os.fork()
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    lease.release()
    Lease(tmp_path, dead=30).release()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
        (
            {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            {
                "SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_RESTART_COUNT": "2",
            },
        ),
        (
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"},
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"},
        ),
    ],
)  # fmt: skip
def test_a_restarted_job_takes_over_from_its_own_older_rank(tmp_path, holding, first, second) -> None:
    """The older rank lives on (a node that lost its network): it must not write any more."""
    old = holding(**first)
    # Of the same start, or of another job, it would be just another process.
    for environment in (first, {**second, "SLURM_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "9"}):
        with pytest.raises(UserError, match="in use by"):
            Lease(tmp_path / "run", this_process(environment))
    lease = Lease(tmp_path / "run", this_process(second))
    lease.check()
    assert old.is_alive()
    with pytest.raises(UserError, match="in use by"):
        Lease(tmp_path / "run", this_process(first))
    lease.release()


def test_who_was_taken_over_writes_nothing_more(tmp_path) -> None:
    before = this_process({"SLURM_JOB_ID": "7"})
    old = Lease(tmp_path, before, beat=0.05)
    new = Lease(tmp_path, this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}))
    with pytest.raises(UserError, match=r"taken over by SLURM job 7 \(process .*writes nothing more"):
        old.check()
    changed = (tmp_path / LOCK).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / LOCK).stat().st_mtime_ns == changed  # no sign of life for its successor
    old.release()
    new.check()
    new.release()
    with pytest.raises(UserError, match="is gone"):
        old.check()


def test_a_torchrun_without_a_name_is_no_job() -> None:
    assert this_process({"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "3"}).job is None
    assert this_process({}).job is None


def test_another_host_s_holder_is_dead_when_its_lock_does_not_change(tmp_path, capsys) -> None:
    # A clock that runs ahead must not make it young: only change counts.
    lock = leave(tmp_path, someone(host="n2"))
    os.utime(lock, (time.time() + 9999, time.time() + 9999))
    Lease(tmp_path, dead=0.5).release()
    assert "was held by process 1234567 on n2; watching" in capsys.readouterr().err


def test_another_host_s_holder_that_gives_signs_of_life_is_left_alone(tmp_path) -> None:
    lock, over = leave(tmp_path, someone(host="n2")), threading.Event()

    def live() -> None:
        while not over.wait(0.3):
            os.utime(lock)

    threading.Thread(target=live).start()
    try:
        with pytest.raises(UserError, match="in use by process 1234567 on n2 since"):
            Lease(tmp_path, dead=20)
    finally:
        over.set()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_the_heartbeat_decides(tmp_path, monkeypatch, number) -> None:
    """A file system that refuses the call is not at hand: only the call's answer is made up."""

    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = Lease(tmp_path, beat=0.1)
    with pytest.raises(UserError, match="in use by"):
        Lease(tmp_path, dead=20)
    first._done.set()  # as if it had died
    time.sleep(0.3)
    second = Lease(tmp_path, dead=0.5)
    second.check()
    with pytest.raises(UserError, match="taken over by"):
        first.check()
    second.release()


def test_of_two_that_start_at_once_one_has_it(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    got = context.Queue()

    def take() -> None:
        try:
            lease = Lease(tmp_path / "run")
            got.put("held")
            time.sleep(1.5)
            lease.release()
        except UserError:
            got.put("refused")

    processes = [context.Process(target=take) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(got.get(timeout=20) for _ in processes) == ["held", "refused", "refused", "refused"]
    for process in processes:
        process.join()


def test_a_fit_is_refused_while_another_job_holds_its_folder_and_leaves_no_lock(
    tmp_path, tiny_llama, holding, capsys
) -> None:
    config = fit_config(tmp_path, tiny_llama)
    words = ["fit", "--config", str(config), "--run", str(tmp_path / "run")]
    process = holding()
    assert main(words) == 2
    assert f"in use by process {process.pid}" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK}
    process.kill()
    process.join()
    assert main([*words, "--model.optimizer.lr", "0"]) == 2
    assert "lr" in capsys.readouterr().err
    assert main(words) == 0
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_checkpoint_is_not_written_once_the_folder_is_another_job_s(tmp_path, tiny_llama, capsys) -> None:
    """The newer start takes over in the middle of the run: no file of the run's folder changes after that."""
    from launch.fit import TandemCLI

    config = fit_config(tmp_path, tiny_llama, steps=4)
    cli = TandemCLI(["--config", str(config), "--run", str(tmp_path / "run")], "fit")
    assert cli.lease is not None
    seen = {}

    def take_over(trainer, *args) -> None:
        if trainer.global_step == 2 and not seen:
            leave(tmp_path / "run", someone(job="SLURM job 7"))
            seen.update({p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()})

    cli.trainer.callbacks[0].on_train_batch_end = take_over
    try:
        with pytest.raises(
            UserError, match=r"step-00000002: could not be saved: .*taken over by SLURM job 7"
        ):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    finally:
        cli.release()
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    ours = {path: content for path, content in after.items() if "events" not in path.name}
    assert ours == {path: content for path, content in seen.items() if "events" not in path.name}
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "running"
    assert (
        PortableCheckpointIO().load_checkpoint(tmp_path / "run" / "checkpoints" / "last")["global_step"] == 1
    )
