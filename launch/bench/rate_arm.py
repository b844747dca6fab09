"""The machine's own speed: the best of several big matrix products."""

from __future__ import annotations

from typing import Any

from launch.bench.arm import Job
from launch.bench.flops import matmul_rate


def run(job: Job) -> dict[str, Any]:
    """FLOP/s in the job's dtype, on its device."""
    return {"flops_per_second": matmul_rate(job.dtype, job.device)}
