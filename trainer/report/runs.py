"""A run's manifest in words: what was trained on what, with what, for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `48 s`, `2 min 5 s`, `3 h 12 min`; a dash for None."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe(run: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's `status`, `error`, `facts` ((name, value) pairs, as far as it tells) and data `hashes`."""
    model, data = run.get("model") or {}, run.get("data") or {}
    facts = [
        ("Trained", _parameters(model)),
        ("Base", str((model.get("policy") or {}).get("base") or "")),
        ("Start", _start(model)),
        ("Reference", _reference(run, model)),
        ("Objective", _settings(model.get("objective"))),
        ("Optimizer", _settings(model.get("optimizer"))),
        ("Schedule", _settings(model.get("schedule"))),
        *(
            (f"Data, {split}", _counts(counts))
            for split, counts in (data.get("counts") or {}).items()
            if isinstance(counts, Mapping)
        ),
        ("Batch", _batch(data, run)),
        ("Steps", _steps(run)),
        ("Time", duration(run.get("seconds_total", run.get("seconds")))),
        ("Speed", _speed(run)),
        ("Best checkpoint", _best(run)),
        ("Seed", str(run["seed"]) if run.get("seed") is not None else ""),
        ("Alarms", ", ".join((run.get("callbacks") or {}).get("Alarms") or {})),
    ]
    return {
        "status": run.get("status") or "unknown",
        "error": run.get("error") or "",
        "facts": [(key, value) for key, value in facts if value and value != "–"],
        "hashes": _flat(data.get("hashes")),
    }


def machine(run: Mapping[str, Any]) -> str:
    """`CPU, 2 cores`, as far as a manifest tells."""
    accelerator = str(run.get("accelerator") or "").replace("Accelerator", "")
    cores = f"{run['cpus']} CPU cores" if run.get("cpus") else ""
    ranks = f"{run['world_size']} ranks" if (run.get("world_size") or 1) > 1 else ""
    return ", ".join(part for part in (accelerator, cores, ranks) if part)


def provenance(
    runs: Mapping[str, Any], evaluations: Mapping[str, Any], report: Mapping[str, Any]
) -> list[dict[str, str]]:
    """`what`, `code` and `versions` of what made the results: a row for the stages that agree.

    Evaluations have a row only where their versions are others than those that trained. The last row is the
    report's own code.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, run in runs.items():
        found.setdefault((_code(run), _versions(run)), []).append(name)
    trained = {versions for _, versions in found}
    rows = [("Trained: " + "; ".join(names), *key) for key, names in found.items()]
    measured: dict[str, list[str]] = {}
    for name, evaluation in evaluations.items():
        if (versions := _versions(evaluation)) and versions not in trained:
            measured.setdefault(versions, []).append(name)
    rows += [("Evaluated: " + "; ".join(names), "", versions) for versions, names in measured.items()]
    if report:
        rows.append(("This report", _code(report), _versions(report)))
    return [{"what": what, "code": code, "versions": versions} for what, code, versions in rows]


def _code(made: Mapping[str, Any]) -> str:
    """The git revisions, those of earlier attempts first, and the hash of the code's files."""
    attempts = [*(made.get("attempts") or []), made]
    revisions = dict.fromkeys(str(attempt.get("git") or "not from a checkout") for attempt in attempts)
    files = f", files {str(made['code'])[:12]}" if made.get("code") else ""
    return f"git {', then '.join(revisions)}{files}"


def _versions(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items())


def _parameters(model: Mapping[str, Any]) -> str:
    counts, policy = model.get("parameters") or {}, model.get("policy") or {}
    if not counts:
        return ""
    adapter = policy.get("adapter") or {}
    kind = {"ia3": "IA³", "lora": "LoRA"}.get(str(adapter.get("kind")), "all weights") + " "
    preset = (
        f"({adapter['preset']} preset) " if adapter.get("kind") == "ia3" and adapter.get("preset") else ""
    )
    return f"{kind}{preset}{counts.get('trained', 0):,} of {counts.get('total', 0):,} parameters"


def _start(model: Mapping[str, Any]) -> str:
    """Where the adapter began: the very checkpoint that `checkpoints/best` was then, where that is known."""
    policy = model.get("policy") or {}
    start = (policy.get("fingerprint") or {}).get("start") or {}
    return str(start.get("path") or policy.get("start") or "") if isinstance(start, Mapping) else ""


def _reference(run: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    kind = _settings(model.get("reference"))
    prints = run.get("reference") or {}
    if not kind and not prints.get("before"):
        return ""
    if prints.get("before") and prints.get("before") == prints.get("after"):
        kind += f"; unmoved, {str(prints['before'])[:12]}"
    return kind.lstrip("; ")


def _settings(found: Any) -> str:
    """`sigmoid, beta 0.1, nll weight 1.0`: settings that are on, long hashes and nested parts left out."""
    if not isinstance(found, Mapping):
        return str(found or "")
    parts = []
    for key, value in found.items():
        if value in (None, False, 0, "", [], {}) or isinstance(value, Mapping) or len(str(value)) > 60:
            continue
        value = (
            ", ".join(map(str, value))
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
        )
        parts.append(f"{value}" if key in ("name", "loss", "kind") else f"{key.replace('_', ' ')} {value}")
    return ", ".join(parts)


def _counts(counts: Mapping[str, Any]) -> str:
    """`6,650 (ru 3,325, en 3,325); left out: 208 nothing to exchange; truncated prompts 3`."""
    found = {key: value for key, value in counts.items() if isinstance(value, int) and value}
    kept = [
        f"{key.removeprefix('kept_')} {value:,}" for key, value in found.items() if key.startswith("kept_")
    ]
    parts = [f"{found.get('kept', 0):,}" + (f" ({', '.join(kept)})" if kept else "")]
    dropped = [
        f"{value:,} {key.removeprefix('dropped_').replace('_', ' ')}"
        for key, value in found.items()
        if key.startswith("dropped_")
    ]
    parts += [f"left out: {', '.join(dropped)}"] if dropped else []
    parts += [f"{key.replace('_', ' ')} {value:,}" for key, value in found.items() if "truncated" in key]
    return "; ".join(parts)


def _flat(found: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested counts or hashes as (`train kept`, 800) pairs."""
    if not isinstance(found, Mapping):
        return []
    rows: list[tuple[str, Any]] = []
    for key, value in found.items():
        name = f"{prefix} {key}".strip()
        rows += _flat(value, name) if isinstance(value, Mapping) else [(name, value)]
    return rows


def _batch(data: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    if not data.get("batch_size"):
        return ""
    parts = [str(data["batch_size"])]
    if (run.get("accumulate_grad_batches") or 1) > 1:
        parts.append(f"in {run['accumulate_grad_batches']} accumulated parts")
    parts += [f"{run['world_size']} ranks"] if (run.get("world_size") or 1) > 1 else []
    parts += [f"precision {run['precision']}"] if run.get("precision") else []
    return ", ".join(parts)


def _steps(run: Mapping[str, Any]) -> str:
    if run.get("step") is None:
        return ""
    epochs = run.get("epoch")
    return f"{run['step']:,}" + (f" in {epochs} epoch{'s' * (epochs != 1)}" if epochs else "")


def _speed(run: Mapping[str, Any]) -> str:
    throughput = (run.get("callbacks") or {}).get("Throughput") or {}
    parts = []
    if throughput.get("tokens_per_second"):
        parts.append(f"{throughput['tokens_per_second']:,.0f} tokens/s")
    if throughput.get("peak_rss_gb"):
        parts.append(f"peak memory {throughput['peak_rss_gb']:.2f} GB")
    return ", ".join(parts)


def _best(run: Mapping[str, Any]) -> str:
    best = (run.get("callbacks") or {}).get("ImprovedLossCheckpoint") or {}
    if not best.get("best_checkpoint"):
        return ""
    value = f", {best['monitor']} {best['best']:.4f}" if isinstance(best.get("best"), float) else ""
    return f"{best['best_checkpoint']}{value}"
