"""Loads models under ZeRO-3 and compares them with models loaded whole: `python -m tests.distributed.loading PLAN`."""

from __future__ import annotations

import json
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch

from launch.ending import leave_together
from trainer.policy.load import PolicyConfig, load_frozen
from trainer.policy.sharded import is_sharded, read_whole, sharding
from trainer.strategy import Zero3


def main(plan: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    # The largest first: what it needed is the peak.
    seen = {"grown": grown(plan["large"])} if "large" in plan else {}
    seen |= {
        f"{name}.{dtype}": compared(name, dtype)
        for name in plan["models"]
        for dtype in ("float32", "bfloat16")
    }
    if torch.distributed.get_rank() == 0:
        Path(plan["out"]).write_text(json.dumps(seen))
    leave_together()


def loaded(base: str, dtype: str, zero3: dict[str, Any] | None) -> Any:
    config = PolicyConfig(base, None, dtype=dtype)
    if zero3 is None:
        return load_frozen(config)
    with sharding(Zero3(param_persistence_threshold=0, **zero3).config):
        return load_frozen(config)


def compared(base: str, dtype: str) -> dict[str, Any]:
    """Whether each parameter and buffer is that of the model loaded whole, for each way of sharding."""
    whole = loaded(base, dtype, None)
    out = {}
    ways = {"plain": {}, "secondary": {"hpz_partition_size": 2}}
    if whole.config.model_type == "mixtral":
        del ways["secondary"]  # its files hold experts one by one, and transformers puts them together
    for name, zero3 in ways.items():
        model = loaded(base, dtype, zero3)
        parameters = dict(whole.named_parameters())
        same = [torch.equal(read_whole(p), parameters[n]) for n, p in model.named_parameters()]
        same += [torch.equal(a, b) for a, b in zip(model.buffers(), whole.buffers(), strict=True)]
        out[name] = {
            "same": all(same) and len(same) == len(parameters) + len(list(whole.buffers())),
            "sharded": all(is_sharded(parameter) for parameter in model.parameters()),
            "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
            "stops": model.generation_config.eos_token_id == whole.generation_config.eos_token_id,
        }
    return out


def grown(base: str) -> list[float]:
    """By how much loading made this process's memory grow at its peak, as a share of the model's bytes, on each rank.

    Pages of the files themselves, which the system can drop at any time, are not counted.
    """
    before, peak, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = loaded(base, "float32", {})
    over.set()
    watcher.join()
    size = sum(parameter.ds_numel * parameter.element_size() for parameter in model.parameters())
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, (peak[0] - before) / size)
    return shares


def anonymous() -> int:
    """Bytes of this process's memory that are no file's pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
