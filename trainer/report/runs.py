"""A run's manifest in words: what was trained on what, with what, for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def duration(seconds: float | None) -> str:
    """`48 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"


def describe(run: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's `status`, `error`, `facts` ((name, value) pairs, as far as it tells) and data `hashes`."""
    model, data = run.get("model") or {}, run.get("data") or {}
    facts = [
        ("Trained", _parameters(model)),
        ("Start", _start(model)),
        ("Reference", _reference(run, model)),
        ("Objective", _settings(model.get("objective"))),
        ("Optimizer", _settings(model.get("optimizer"))),
        ("Schedule", _settings(model.get("schedule"))),
        ("Data", _counts(data)),
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
    policy = model.get("policy") or {}
    return " + ".join(str(policy[key]) for key in ("base", "start") if policy.get(key))


def _reference(run: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    kind = _settings(model.get("reference"))
    prints = run.get("reference") or {}
    if not kind and not prints.get("before"):
        return ""
    if prints.get("before") and prints.get("before") == prints.get("after"):
        kind += f"; unmoved, {str(prints['before'])[:12]}"
    return kind.lstrip("; ")


def _settings(found: Any) -> str:
    """`sigmoid, beta 0.1, nll_weight 1.0`: settings that are on, long hashes and nested parts left out."""
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
        parts.append(f"{value}" if key in ("name", "loss", "kind") else f"{key} {value}")
    return ", ".join(parts)


def _counts(data: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key.replace('_', ' ')} {value:,}" for key, value in _flat(data.get("counts")) if value
    )


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
    return f"{run['step']:,}" + (f" in {run['epoch']} epochs" if run.get("epoch") else "")


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
