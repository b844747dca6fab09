"""A job's claim on a run's folder: a lock that keeps two jobs from writing one folder.

`<run>/.lock` names its holder. On one host the kernel keeps it (`flock`), and lets go when the process dies. Across
hosts, and where a network file system has no `flock`, the file's time of change is the sign of life: the holder
touches it, and who wants the folder watches for a minute whether it moves (two hosts' clocks are never compared).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from trainer.schema import UserError

LOCK = ".lock"
BEAT_SECONDS, DEAD_SECONDS = 10.0, 60.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a folder. `attempt` counts the restarts of `job`; a later one takes over from an earlier one."""

    host: str
    pid: int
    job: str | None
    attempt: list[int]
    nonce: str
    since: str

    def follows(self, other: Holder) -> bool:
        """Whether this is a later start of the same job, whose older processes may still be alive."""
        return self.job is not None and self.job == other.job and self.attempt > other.attempt

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return f"{self.job} ({process})" if self.job else process


def this_process(environment: Mapping[str, str] = os.environ) -> Holder:
    """This process, with the job that its launcher's environment names."""
    job = None
    if number := environment.get("SLURM_JOB_ID"):
        array = environment.get("SLURM_ARRAY_JOB_ID")
        job = (
            f"SLURM job {array}_{environment.get('SLURM_ARRAY_TASK_ID')}" if array else f"SLURM job {number}"
        )
    # torchrun calls every job `none` that was not given a name (--rdzv-id).
    elif (run := environment.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        job = f"torchrun job {run}"
    restarts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return Holder(
        host=platform.node(),
        pid=os.getpid(),
        job=job,
        attempt=[int(environment.get(name) or 0) for name in restarts],
        nonce=secrets.token_hex(8),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class Lease:
    """This process's hold on a run's folder, from `Lease(folder)` to `release()`.

    Args:
        folder: the run's folder; made if it is not there.
        me: who takes it.
        beat: seconds between signs of life.
        dead: seconds without a sign of life after which another host's holder counts as dead.

    Raises:
        UserError: naming who holds the folder, since when, and what to do.
    """

    def __init__(
        self, folder: Path, me: Holder | None = None, beat: float = BEAT_SECONDS, dead: float = DEAD_SECONDS
    ) -> None:
        self.folder, self.path, self.me, self.beat = folder, folder / LOCK, me or this_process(), beat
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd: int | None = self._take(dead)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(
                f"--run {folder}: cannot be used ({error.strerror}: {error.filename}); give another folder"
            ) from error
        # A data loader's worker that outlives this process must not keep the lock.
        os.register_at_fork(after_in_child=self._close)
        self._done = threading.Event()
        threading.Thread(target=self._live, daemon=True, name="lease").start()

    def check(self) -> None:
        """Call before anything is written.

        Raises:
            UserError: if another job has taken the folder over; what it writes must not be touched.
        """
        holder = _read(self.path)
        if holder is None:
            raise UserError(
                f"{self.path}: is gone, so another job may own the folder; this one writes nothing more"
            )
        if holder.nonce != self.me.nonce:
            raise UserError(
                f"{self.folder}: taken over by {holder} at {holder.since}; this process writes nothing more"
            )

    def release(self) -> None:
        """Let go of the folder, and leave no trace in it. May be called twice."""
        if self._fd is None:
            return
        self._done.set()
        holder = _read(self.path)
        if holder is not None and holder.nonce == self.me.nonce:
            self.path.unlink(missing_ok=True)
            if self._made:
                # Only an empty folder goes.
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def _live(self) -> None:
        while not self._done.wait(self.beat):
            fd, holder = self._fd, _read(self.path)
            # Who was taken over must not give signs of life for its successor.
            if fd is not None and holder is not None and holder.nonce == self.me.nonce:
                with contextlib.suppress(OSError):
                    os.utime(fd)

    def _take(self, dead: float) -> int:
        patience = time.monotonic() + 5
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked, holder = _flock(fd), _read(self.path)
                # Not the same file: released in between. Locked without a name: it is about to write it.
                if _same_file(fd, self.path) and (holder is not None or locked is not False):
                    self._refuse(holder, locked, dead)
                    if locked:
                        self._sign(fd)
                        return os.dup(fd)
                    return self._replace()
                if time.monotonic() > patience:
                    raise UserError(f"{self.path}: locked by a process that gives no name; end it")
            finally:
                os.close(fd)
            time.sleep(0.05)

    def _refuse(self, holder: Holder | None, locked: bool | None, dead: float) -> None:
        """Return if the folder may be taken."""
        if holder is None or self.me.follows(holder):
            return
        if locked and holder.host == self.me.host:
            return  # The kernel would not have given the lock if it lived.
        if locked is False or self._shows_life(holder, dead):
            how = f"scancel {holder.job.split()[-1]}" if holder.job and "SLURM" in holder.job else "end it"
            raise UserError(
                f"{self.folder}: in use by {holder} since {holder.since}; wait until it ends, {how}, or give"
                " another --run FOLDER"
            )

    def _shows_life(self, holder: Holder, dead: float) -> bool:
        print(
            f"tandem: {self.folder} was held by {holder}; watching {dead:.0f} s for a sign of life",
            file=sys.stderr,
        )
        before, until = _changed(self.path), time.monotonic() + dead
        while time.monotonic() < until:
            time.sleep(min(1.0, dead / 20))
            if _changed(self.path) != before:
                return True
        return False

    def _sign(self, fd: int) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(dataclasses.asdict(self.me)).encode(), 0)
        os.fsync(fd)

    def _replace(self) -> int:
        """Put a file of our own in place of one whose holder may live on; what it locks and touches is the old."""
        mine = self.path.with_name(f"{LOCK}.{self.me.nonce}")
        fd = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._sign(fd)
        _flock(fd)
        os.replace(mine, self.path)
        time.sleep(0.2)  # Two may have found the folder free: the last one in has it.
        self.check()
        return fd


def _flock(fd: int) -> bool | None:
    """Whether the lock was free; None on a file system without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> Holder | None:
    """The holder that the file names; None if there is none, or it is only half written."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _changed(path: Path) -> int:
    # Opened, not looked up: that makes NFS ask its server.
    try:
        with open(path, "rb") as stream:
            return os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0
