"""One measurement in a process of its own: `python -m launch.bench.arm JOB.json` reads what to do, writes a result.

A process of its own, because the peak memory of a process never falls again, and so that no arm warms up another.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

from trainer.provenance import write_json

KINDS = ("tandem", "trl", "rate", "model")


@dataclasses.dataclass(frozen=True)
class Job:
    """What an arm is told.

    Args:
        kind: `tandem`, `trl`, `rate` (the machine's matrix products) or `model` (make it).
        work: a folder for what the arm writes; it is fresh, so that no cache is there before.
        model: folder of weights and tokenizer.
        pairs: JSONL with prompt, chosen, rejected.
        dtype: of the frozen weights; adapters are float32.
        device: cpu or cuda.
        epochs: how often the pairs are seen.
        batch_size: pairs for each optimizer step.
        lr: AdamW's.
        limit: only so many pairs, spread over the lengths.
        count: count floating-point operations of the last epoch; times mean nothing then.
        batch_sizes: instead of one run, two epochs at each of these batch sizes, for the time of steps by tokens.
        threads: of the CPU; null takes what torch takes.
        settings: of the arm: `PreferenceData`'s for tandem, `DPOConfig`'s for trl, the `Shape` of a model.
    """

    kind: str
    work: str
    dtype: str
    model: str = ""
    pairs: str = ""
    device: str = "cpu"
    epochs: int = 1
    batch_size: int = 16
    lr: float = 1e-3
    limit: int | None = None
    count: bool = False
    batch_sizes: list[int] = dataclasses.field(default_factory=list)
    threads: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


class Clock:
    """Seconds of the parts of a run, by name; a part may come several times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def part(self, name: str) -> _Part:
        """`with clock.part("model"):` adds what the block takes."""
        return _Part(self, name)


class _Part:
    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        seconds = self.clock.seconds
        seconds[self.name] = seconds.get(self.name, 0.0) + time.perf_counter() - self.start


def memory(device: str) -> dict[str, int]:
    """Bytes now and at the peak: resident memory of this process, or what was allocated on the GPU."""
    if device == "cuda":
        import torch

        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"now": psutil.Process().memory_info().rss, "peak": peak}


def spread_over_lengths(path: str, limit: int, folder: str) -> str:
    """A file with `limit` of the pairs, of short, middling and long texts alike."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if limit >= len(lines):
        return path
    ordered = sorted(lines, key=len)
    chosen = [ordered[int((i + 0.5) * len(lines) / limit)] for i in range(limit)]
    out = Path(folder) / "fewer.jsonl"
    out.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return str(out)


def _end_with_the_bench(parent: int) -> None:
    """A bench that was killed leaves no arm behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main(path: str) -> None:
    """Run the job in the file, write `result.json` into its work folder."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    if job.limit is not None:
        job = dataclasses.replace(job, pairs=spread_over_lengths(job.pairs, job.limit, job.work))
    threading.Thread(target=_end_with_the_bench, args=(os.getppid(),), daemon=True).start()
    import torch
    import torch._dynamo  # optimizers import it in their first step, and imports are not what is measured

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    assert job.kind in KINDS
    result = importlib.import_module(f"launch.bench.{job.kind}_arm").run(job)
    result |= {"threads": torch.get_num_threads(), "peak_memory_bytes": memory(job.device)["peak"]}
    write_json(Path(job.work) / "result.json", result)


if __name__ == "__main__":
    main(sys.argv[1])
