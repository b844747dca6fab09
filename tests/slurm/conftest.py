"""One SLURM of two nodes for the session, and the run that every disturbed job must equal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.launch.helpers import ROOT, fit_config
from tests.slurm.cluster import Cluster, sweep, why_not
from tests.slurm.jobs import STEPS, Jobs, adapter

PREFIX = "tandem-slurm-"


@pytest.fixture(scope="session")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    # Sockets' paths are short: pytest's own folders are not.
    parent = Path(tempfile.gettempdir())
    sweep(parent, PREFIX)
    cluster = Cluster(parent / f"{PREFIX}{os.getpid()}")
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def config(tmp_path_factory, models) -> Path:
    """Some steps on a tiny model, a checkpoint at each; how many devices is left to the launcher."""
    folder = tmp_path_factory.mktemp("slurm")
    jitter = {"class_path": "tests.slurm.jitter.Jitter"}
    return fit_config(
        folder, models("llama"), steps=STEPS, devices="auto", strategy="ddp", **{"callbacks+": [jitter]}
    )


@pytest.fixture(scope="session")
def undisturbed(config, tmp_path_factory) -> bytes:
    """The adapter that two ranks train without SLURM: `tandem fit` starts them itself."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    words = ["fit", "--config", str(config), "--run", str(run), "--threads", "1", "--trainer.devices", "2"]
    subprocess.run(
        [sys.executable, "-m", "launch", *words],
        cwd=ROOT,
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return adapter(run)


@pytest.fixture
def jobs(cluster, config, tmp_path) -> Jobs:
    return Jobs(cluster, config, tmp_path)
