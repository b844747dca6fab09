"""A real SLURM on this machine: munged, slurmctld and one slurmd for each of its nodes, all in one folder.

`python -m tests.slurm.cluster FOLDER` brings one up, says how to use it, and takes it down on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start once the credential of its last start has expired: by default two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# The nodes have as many cores as we say, not as the machine has.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
PropagateResourceLimits=NONE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PriorityType=priority/basic
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=10
BatchStartTimeout=10
UnkillableStepTimeout=30
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
NODE = (
    "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Boards=1 SocketsPerBoard=1"
    " CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
)


def why_not() -> str | None:
    """What keeps a SLURM from running here; None if nothing does."""
    missing = [program for program in PROGRAMS if _program(program) is None]
    if missing:
        return f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root here"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; after `seconds` an AssertionError that says what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for: {what}"
        time.sleep(0.1)


class Cluster:
    """`nodes` nodes called n1, n2, ... on this machine.

    Args:
        folder: its configuration, state and logs; ends with the cluster. Its path must be short: of sockets.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes, self.jobs = folder, nodes, list[str]()
        self.daemons: list[subprocess.Popen[bytes]] = []
        # No variable of a job that we may run in ourselves, nor of a launcher's.
        foreign = (
            "SLURM",
            "SRUN",
            "SBATCH",
            "TORCHELASTIC",
            "LT_",
            "MASTER_",
            "RANK",
            "WORLD_SIZE",
            "LOCAL_",
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        self.env = {
            **kept,
            "SLURM_CONF": str(folder / "slurm.conf"),
            # All nodes are this machine: their names do not resolve.
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def up(self) -> None:
        """Start the daemons, and wait until all nodes are idle."""
        for part in ("munge", "state", "spool", "log"):
            (self.folder / part).mkdir(parents=True)
        (self.folder / "state").chmod(0o700)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._configure()
        munge = self.folder / "munge"
        places = {
            "key": "key-file",
            "socket": "socket",
            "pid": "pid-file",
            "log": "log-file",
            "seed": "seed-file",
        }
        options = [f"--{option}={munge / name}" for name, option in places.items()]
        self._start("munged", "--foreground", "--num-threads=2", *options)
        wait_until((munge / "socket").exists, 10, "munged's socket")
        self._start("slurmctld", "-D", "-i")
        for number in range(1, self.nodes + 1):
            self._start("slurmd", "-D", "-N", f"n{number}")
        wait_until(lambda: self.states() == ["idle"] * self.nodes, 30, f"idle nodes ({self.folder}/log)")

    def _configure(self) -> None:
        host, port = socket.gethostname().partition(".")[0], free_ports(self.nodes + 1)
        nodes = [NODE.format(number=i, host=host, port=port + i) for i in range(1, self.nodes + 1)]
        content = CONFIG.format(host=host, port=port, folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(content)
        # GPUs that can be asked for and counted; nothing is behind them.
        for number in range(2):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        # Named, so that SLURM does not look for a cgroup mount or systemd.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start(self, name: str, *words: str) -> None:
        program = _program(name)
        assert program is not None
        log = (self.folder / "log" / f"{name}.{len(self.daemons)}.out").open("wb")
        self.daemons.append(
            subprocess.Popen([program, *words], env=self.env, stdout=log, stderr=log, start_new_session=True)
        )

    def down(self) -> None:
        """Cancel what runs, end the daemons, and end what a job may have left."""
        try:
            if self.jobs:
                self.run("scancel", *self.jobs, check=False)
                wait_until(lambda: not self.run("squeue", "-h", check=False).strip(), 20, "an empty queue")
        except (AssertionError, subprocess.TimeoutExpired) as slow:
            print(f"slurm tests: {slow}", file=sys.stderr)
        # Steps first, for slurmd would wait for them.
        daemons = {daemon.pid for daemon in self.daemons}
        end({pid for pid, of_job in processes(self.folder) if of_job} - daemons)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **settings: str) -> str:
        """One of SLURM's commands; returns what it prints."""
        env = {**self.env, **settings}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def states(self) -> list[str]:
        """The nodes' states."""
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def submit(self, script: Path, *words: str, options: tuple[str, ...] = (), **settings: str) -> str:
        """`sbatch OPTIONS SCRIPT WORDS`; the job's number."""
        number = self.run("sbatch", "--parsable", *options, str(script), *words, **settings).strip()
        self.jobs.append(number)
        return number

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by its own names: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def ended(self, number: str, seconds: float = 150) -> dict[str, str]:
        """Wait until a job has ended."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        wait_until(lambda: self.job(number)["JobState"] in over, seconds, f"the end of job {number}")
        return self.job(number)


def processes(folder: Path) -> Iterator[tuple[int, bool]]:
    """The processes of a folder's cluster, and whether a job has left them (its ranks, or a step's daemon)."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "environ").read_bytes().split(b"\0")
            name = (place / "comm").read_text().strip()
        except OSError:
            continue
        if f"SLURM_CONF={folder}/slurm.conf".encode() in words:
            of_job = any(word.startswith(b"SLURM_JOB_ID=") for word in words)
            yield int(place.name), of_job or name.startswith("slurmstepd")


def end(pids: Iterable[int]) -> None:
    """Kill processes, whether they are still there or not."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def sweep(parent: Path, prefix: str) -> None:
    """Take down clusters in `parent / <prefix><pid>` whose tests were killed."""
    for folder in parent.glob(f"{prefix}*"):
        if not Path("/proc", folder.name.removeprefix(prefix)).exists():
            end(pid for pid, _ in processes(folder))
            shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens at, below those that the kernel hands out."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports between 21000 and 32000")


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).resolve())
    try:
        cluster.up()
        print(f"export SLURM_CONF={cluster.env['SLURM_CONF']} MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo")
        signal.pause()
    except KeyboardInterrupt:
        print("taking it down")
    finally:
        cluster.down()
