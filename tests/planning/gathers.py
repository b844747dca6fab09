"""Watches what DeepSpeed gathers in each forward and backward, on ranks that torchrun starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed.ranks import made


class Watch:
    """Bytes gathered, and whole at once at the most, for each micro-batch.

    Names of DeepSpeed 0.19.8's `PartitionedParameterCoordinator`; only the test of the plan needs them.
    """

    def __init__(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator as Kind,
        )

        self.seen: list[dict[str, Any]] = []
        self.known: dict[int, Any] = {}
        gather, fetch = Kind._PartitionedParameterCoordinator__all_gather_params_, Kind._fetch_sub_module_impl
        reset = Kind.reset_step

        def gathered(coordinator: Any, params: Any, *args: Any, **kwargs: Any) -> None:
            for p in params:
                self.known[p.ds_id] = p
                if p.ds_status == ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist:
                    self.seen[-1]["bytes"] += p.ds_numel * p.element_size()
            gather(coordinator, params, *args, **kwargs)

        def fetched(coordinator: Any, *args: Any, **kwargs: Any) -> None:
            fetch(coordinator, *args, **kwargs)
            whole = [
                p.ds_numel * p.element_size()
                for p in self.known.values()
                if p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not p.ds_persist
            ]
            self.seen[-1]["peak"] = max(self.seen[-1]["peak"], sum(whole))

        def started(coordinator: Any) -> None:
            reset(coordinator)
            self.seen.append({"bytes": 0, "peak": 0})

        Kind._PartitionedParameterCoordinator__all_gather_params_ = gathered
        Kind._fetch_sub_module_impl, Kind.reset_step = fetched, started


def main(plan: dict[str, Any]) -> None:
    watch = Watch()
    for name, settings in plan["runs"].items():
        watch.seen[:] = [{"bytes": 0, "peak": 0}]  # the trial of packed rows, ahead of the first step
        watch.known.clear()
        run = made(settings, plan["ranks"], Path(plan["folder"]))
        if run is not None:
            found = {"gathered": watch.seen, "shares": run["shares"]}
            (Path(plan["folder"]) / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
