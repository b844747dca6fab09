"""A process that loads a model, trains it with DPO and says by how much it grew: `python -m tests.planning.growth`.

Arguments: a JSON file with the settings of `growth`, which prints one JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from tests.planning.real import job_for
from trainer.data.layout import concatenated, prefix_shared
from trainer.module import PreferenceModule
from trainer.optimization import build_optimizer
from trainer.policy.reference import ReferenceConfig
from trainer.schema import StepShare, TokenizedPreference


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def growth(settings: dict[str, Any]) -> dict[str, int]:
    """Bytes by which a process, or a GPU's memory, grows at its most: from before the model is there to after steps."""
    job = job_for(
        Path(settings.pop("base")), reference=ReferenceConfig(kind=settings.pop("kind")), **settings
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = [_pair(job.tokens - job.completion - (row % 2), job.completion) for row in range(job.batch_size)]
    lay = prefix_shared if job.layout == "prefix_shared" else concatenated
    batch = lay(pairs, 0, StepShare(1.0, 1.0, True))
    before = resident()
    module = PreferenceModule(job.policy, reference=job.reference, optimizer=job.optimizer)
    module.configure_model()
    module.to(device)
    loaded = peak(device) - before
    for name, value in vars(batch.rows).items():
        if isinstance(value, torch.Tensor):
            setattr(batch.rows, name, value.to(device))
    optimizer = build_optimizer(job.optimizer, [p for p in module.parameters() if p.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = module.losses(batch)
        loss.backward()
        optimizer.step()
    # A GPU's memory before the model is empty but for CUDA's context.
    return {"loaded": loaded, "grown": peak(device) - (before if device == "cpu" else 0)}


def peak(device: str) -> int:
    """Bytes at the most until now."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pair(prompt: int, completion: int) -> TokenizedPreference:
    return TokenizedPreference([1] + [7] * (prompt - 1), [8] * completion, [9] * completion, "pair")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(growth(json.loads(Path(sys.argv[1]).read_text()))))
