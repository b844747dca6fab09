"""What is measured in which order: TRL's settings swept, operations counted, then all arms in turn, several times."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.bench.models import Shape
from trainer.schema import UserError

ARMS = ("tandem", "tandem_concatenated", "trl_defaults", "trl_fastest", "trl_leanest")
DTYPES = ("bfloat16", "float32")
TRL_DEFAULT_BATCH = 8

Chosen = Mapping[str, Any]
"""`trl_fastest` and `trl_leanest` -> the settings that the sweep found; `ranked` -> all, the fastest first."""

AGAIN = 3
"""So many of the sweep's fastest are tried twice: one that was disturbed would pass for a slow one."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `tandem bench` was asked for; a resumed run has to be asked for the same.

    Args:
        workloads: names of `launch.bench.workloads`.
        dtypes: of the frozen weights.
        arms: of `ARMS`.
        shape: the model.
        pairs: in each workload.
        batch_size: pairs for each optimizer step.
        epochs: after how many of them figures are taken; the last is the length of a run.
        repeats: of each arm.
        whole: sweep the live reference at each batch, too, and let TRL's defaults and leanest run as often and as
            long as the others.
        lr: AdamW's.
        seed: of the generated pairs.
        token_budget: tandem's, null for its default.
        threads: of the CPU, null for torch's default.
        device: cpu or cuda.
    """

    workloads: tuple[str, ...] = ("hh_like",)
    dtypes: tuple[str, ...] = DTYPES
    arms: tuple[str, ...] = ("tandem", "trl_defaults", "trl_fastest", "trl_leanest")
    shape: Shape = dataclasses.field(default_factory=Shape)
    pairs: int = 32
    batch_size: int = 16
    epochs: tuple[int, ...] = (1, 3)
    repeats: int = 3
    whole: bool = False
    lr: float = 1e-3
    seed: int = 0
    token_budget: int | None = None
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, known in (("dtypes", DTYPES), ("arms", ARMS)):
            for value in getattr(self, name):
                if value not in known:
                    raise UserError(f"--{name} {value}: not known; give some of {', '.join(known)}")
        for name in ("pairs", "batch_size", "repeats", *(["token_budget"] if self.token_budget else [])):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: is below 1")
        if self.pairs % self.batch_size:
            raise UserError(f"--pairs {self.pairs}: should be a multiple of --batch_size {self.batch_size}")
        if not self.epochs or min(self.epochs) < 1:
            raise UserError(f"--epochs {' '.join(map(str, self.epochs))}: should be 1 or more")

    @property
    def trl(self) -> bool:
        """Whether any arm needs TRL."""
        return any(arm.startswith("trl") for arm in self.arms)


@dataclasses.dataclass(frozen=True)
class Step:
    """One measurement: what it is for, of what, and (once earlier ones are known) the settings of its arm.

    `weight` is what it takes beside others, for the time left.
    """

    purpose: str
    workload: str
    dtype: str
    arm: str
    repeat: int
    weight: float
    job: Callable[[Chosen], dict[str, Any]]

    @property
    def after_sweep(self) -> bool:
        """Whether its settings are known only when others have been tried."""
        return self.arm in ("trl_fastest", "trl_leanest", "trl_live", "trl_again")

    def key(self, chosen: Chosen) -> str:
        """The same for two steps that measure the same: arms with equal settings are measured once."""
        what = self.job(chosen)
        return json.dumps([self.purpose, self.workload, self.dtype, self.repeat, what], sort_keys=True)


def steps(settings: Settings) -> list[Step]:
    """All measurements, in order; arms take turns within each repeat."""
    found: list[Step] = []
    for workload in settings.workloads:
        for dtype in settings.dtypes:
            found += _of_one(settings, workload, dtype)
    return found


def _of_one(settings: Settings, workload: str, dtype: str) -> list[Step]:
    found = []
    if {"trl_fastest", "trl_leanest"} & set(settings.arms):
        weight = settings.batch_size * 4
        for candidate in candidates(settings.batch_size, settings.whole):
            limited = _trl(candidate, 1, limit=settings.batch_size)
            found.append(Step("sweep", workload, dtype, "trl", 0, weight, _fixed(limited)))
        for place in range(min(AGAIN, len(candidates(settings.batch_size, settings.whole)))):
            found.append(
                Step("sweep", workload, dtype, "trl_again", place + 1, weight, _again(settings, place))
            )
        if not settings.whole:
            found.append(Step("sweep", workload, dtype, "trl_live", 0, weight, _live(settings)))
    for arm in settings.arms:
        counted = _arm(settings, arm, dtype, epochs=2 if arm.startswith("tandem") else 1)
        more = {"limit": settings.batch_size, "count": True}
        found.append(Step("count", workload, dtype, arm, 0, settings.batch_size * 2, _with(counted, more)))
    for repeat in range(settings.repeats):
        found.append(Step("rate", workload, dtype, "rate", repeat, 8, _fixed({"kind": "rate"})))
        for arm in settings.arms:
            epochs = run_epochs(settings, arm)
            if repeat > 1 and epochs < max(settings.epochs):
                continue
            weight = settings.pairs * epochs * (1 if arm.startswith("tandem") else 5)
            found.append(Step("run", workload, dtype, arm, repeat, weight, _run(settings, arm, dtype)))
    if "tandem" in settings.arms:
        sizes = sorted({max(settings.batch_size // 8, 1), settings.batch_size, settings.pairs})
        scaling = {"batch_sizes": sizes, "epochs": 2}
        job = _with(_arm(settings, "tandem", dtype, 2), scaling)
        found.append(Step("scaling", workload, dtype, "tandem", 0, settings.pairs * 4, job))
    return found


def run_epochs(settings: Settings, arm: str) -> int:
    """Epochs that an arm's runs last; what a shorter one would take for more is computed from its last epoch."""
    whole = settings.whole or arm.startswith("tandem") or arm == "trl_fastest"
    return max(settings.epochs) if whole else min(settings.epochs)


def candidates(batch_size: int, whole: bool) -> list[dict[str, Any]]:
    """TRL's settings that are tried: each per-device batch from 1 to the whole, the reference precomputed.

    `whole`: with the live reference, too. It costs each epoch the forward that precomputing costs once, so that one
    trial, at the best batch, is enough to see it.
    """
    sizes = [size for size in range(1, batch_size + 1) if batch_size % size == 0 and _power_of_two(size)]
    if batch_size not in sizes:
        sizes.append(batch_size)
    found = [
        {"per_device_train_batch_size": size, "precompute_ref_log_probs": precomputed}
        for precomputed in ((True, False) if whole else (True,))
        for size in sizes
    ]
    plain = [{**each, "gradient_checkpointing": False, "bf16": False} for each in found]
    # Not among the fastest by far, but it may well be the leanest.
    return [*plain, {**plain[0], "gradient_checkpointing": True}]


def _again(settings: Settings, place: int) -> Callable[[Chosen], dict[str, Any]]:
    return lambda chosen: _trl(
        chosen["ranked"][min(place, len(chosen["ranked"]) - 1)], 1, settings.batch_size
    )


def _live(settings: Settings) -> Callable[[Chosen], dict[str, Any]]:
    """The fastest so far, with a live reference."""

    def job(chosen: Chosen) -> dict[str, Any]:
        live = {**chosen["trl_fastest"], "precompute_ref_log_probs": False}
        return _trl(live, 1, limit=settings.batch_size)

    return job


def _power_of_two(size: int) -> bool:
    return size & (size - 1) == 0


def _run(settings: Settings, arm: str, dtype: str) -> Callable[[Chosen], dict[str, Any]]:
    """The job of an arm's runs; where TRL's leanest is its fastest, too, both are one job."""

    def job(chosen: Chosen) -> dict[str, Any]:
        same = (
            arm == "trl_leanest" and chosen[arm] == chosen["trl_fastest"] and "trl_fastest" in settings.arms
        )
        return _arm(settings, arm, dtype, run_epochs(settings, "trl_fastest" if same else arm))(chosen)

    return job


def _arm(settings: Settings, arm: str, dtype: str, epochs: int) -> Callable[[Chosen], dict[str, Any]]:
    if arm.startswith("tandem"):
        data: dict[str, Any] = {"layout": "concatenated"} if arm == "tandem_concatenated" else {}
        if settings.token_budget is not None:
            data["token_budget"] = settings.token_budget
        return _fixed({"kind": "tandem", "epochs": epochs, "settings": data})
    if arm == "trl_defaults":
        # DPOConfig's own defaults but for the batch, which is everyone's: 8 a device, checkpointing, live reference,
        # and bfloat16 autocast where the precision allows it.
        each = min(TRL_DEFAULT_BATCH, settings.batch_size)
        return _fixed(_trl({"per_device_train_batch_size": each, "bf16": dtype == "bfloat16"}, epochs))

    return lambda chosen: _trl(chosen[arm], epochs)


def _trl(settings: dict[str, Any], epochs: int, limit: int | None = None) -> dict[str, Any]:
    return {"kind": "trl", "epochs": epochs, "settings": settings, **({"limit": limit} if limit else {})}


def _fixed(job: dict[str, Any]) -> Callable[[Chosen], dict[str, Any]]:
    return lambda chosen: job


def _with(
    job: Callable[[Chosen], dict[str, Any]], more: dict[str, Any]
) -> Callable[[Chosen], dict[str, Any]]:
    return lambda chosen: {**job(chosen), **more}


def choose(swept: Sequence[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """The fastest and the leanest settings of a sweep's measurements, and all ranked; empty where none of them ran."""
    tried: dict[str, list[dict[str, Any]]] = {}
    for each in swept:
        if "result" in each:
            tried.setdefault(json.dumps(each["job"]["settings"], sort_keys=True), []).append(each)
    if not tried:
        return {}
    times = {name: min(seconds(each["result"], epochs) for each in some) for name, some in tried.items()}
    peaks = {name: max(each["result"]["peak_memory_bytes"] for each in some) for name, some in tried.items()}
    # Within two percent it is chance, and the faster one serves its user better.
    lean = [name for name, peak in peaks.items() if peak <= 1.02 * min(peaks.values())]
    # Ranked by the candidates' first trials alone (not by second ones, nor by the live reference that was tried after
    # them), so that a resumed run tries the same ones again.
    first = {
        name: seconds(some[0]["result"], epochs) for name, some in tried.items() if some[0]["arm"] == "trl"
    }
    return {
        "trl_fastest": json.loads(min(times, key=times.__getitem__)),
        "trl_leanest": json.loads(min(lean, key=times.__getitem__)),
        "ranked": [json.loads(name) for name in sorted(first, key=first.__getitem__)],
    }


def seconds(result: Mapping[str, Any], epochs: int) -> float:
    """What so many epochs take, preparation counted; those that were not run as long as the last one that was."""
    ends = result["epoch_seconds"]
    if epochs <= len(ends):
        return float(ends[epochs - 1])
    before = ends[-2] if len(ends) > 1 else result["setup_seconds"] + (result["reference_seconds"] or 0.0)
    return float(ends[-1] + (epochs - len(ends)) * (ends[-1] - before))
