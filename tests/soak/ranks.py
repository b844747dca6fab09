"""Ranks of one `tandem fit`, forked from a process that has imported everything: a start costs about a second."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

LISTENS = (signal.SIGTERM, signal.SIGUSR1)


def warm_up() -> None:
    """Import what a fit imports; starts no thread and no process group, so that forking stays safe."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import launch.fit  # noqa: F401
    import trainer.data.datamodule
    import trainer.module
    import trainer.pairs.substitution  # noqa: F401

    torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The ranks of one attempt, each a process of its own, started at once; what they say goes to `log`."""

    def __init__(
        self, arguments: Sequence[str], log: Path, world: int = 2, env: Mapping[str, str] = {}
    ) -> None:
        shared = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
        self.codes: list[int | None] = [None] * world
        self.pids = [
            self._fork(arguments, log, {**shared, "LOCAL_RANK": str(rank)}, rank) for rank in range(world)
        ]

    def _fork(self, arguments: Sequence[str], log: Path, env: dict[str, str], rank: int) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            os.environ.update(env)
            from lightning.pytorch.utilities.rank_zero import rank_zero_only

            from launch.cli import main

            rank_zero_only.rank = rank
            status = main(["fit", *arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def listen(self, timeout: float = 30.0) -> None:
        """Wait until every rank handles signals itself."""
        wanted = sum(1 << (number - 1) for number in LISTENS)
        until = time.monotonic() + timeout
        for pid in self.pids:
            while _caught(pid) & wanted != wanted:
                assert time.monotonic() < until, f"process {pid} does not listen"
                time.sleep(0.002)

    def send(self, number: int, ranks: Sequence[int], stagger: float = 0.0) -> None:
        """Signal these ranks, `stagger` seconds apart at most."""
        for rank in ranks:
            if self.codes[rank] is None:
                os.kill(self.pids[rank], number)  # not reaped yet, so the id is still its own
            time.sleep(random.uniform(0, stagger))

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None not in self.codes

    def wait(self, seconds: float) -> bool:
        """Whether all ended within so many seconds; what did not is killed."""
        until = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < until:
            time.sleep(0.01)
        in_time = self.poll()
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return in_time


def _caught(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
