"""Self-play's iterations as the report shows them: what came of each, against which opponent, with examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.report.texts import number, shown

_DIGITS = 12


def self_play_view(lineages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each loop's `title`, how it `ended`, its `rows` (one for each iteration) and `examples`."""
    return [
        {
            "title": name,
            "ended": lineage.get("ended") or "not ended yet",
            "rows": [_row(each) for each in lineage["iterations"]],
            "examples": _examples(lineage["iterations"]),
        }
        for name, lineage in lineages.items()
    ]


def headline(lineages: Mapping[str, Mapping[str, Any]]) -> str:
    """How often each loop's last player told real from generated answers, and how likely the real ones have become."""
    return "\n".join(filter(None, (_one_headline(lineage, name) for name, lineage in lineages.items())))


def _one_headline(lineage: Mapping[str, Any], name: str) -> str:
    iterations = lineage["iterations"]
    if not iterations:
        return ""
    first, last = (iterations[place]["validation"] for place in (0, -1))
    told = f"{name}: {len(iterations)} iteration{'s' * (len(iterations) != 1)} of self-play"
    accuracy = last.get("rewards/accuracies")
    if accuracy is not None:
        told += f", reward accuracy {100 * accuracy:.1f}\u00a0% at the last one"
    if first.get("nll") is not None and last.get("nll") is not None:
        before, now = number(first["nll"], 3), number(last["nll"], 3)
        told += f"; real answers at {before} nats a token after the first, {now} now"
    return told + "."


def _row(told: Mapping[str, Any]) -> dict[str, Any]:
    metrics, pairs = told["validation"], told["pairs"]
    train = pairs["counts"]["train"]
    return {
        "iteration": told["iteration"],
        "accuracy": metrics.get("rewards/accuracies"),
        "interval": told["accuracy_interval"],
        "margin": _number(metrics.get("rewards/margins")),
        "real": _number(metrics.get("logps/chosen")),
        "nll": _number(metrics.get("nll")),
        "generated": _number(metrics.get("logps/rejected")),
        "similarity": _number(pairs["similarity"].get("test", pairs["similarity"]["train"])),
        "pairs": f"{train['kept']:,} + {train['previous']:,}",
        "settings": f"lr {told['lr']:g}, beta {told['beta']:g}, {told['steps']:,} steps",
        "opponent": str(told["opponent"]["digest"])[:_DIGITS],
        "trained": str(told["adapter"]["digest"])[:_DIGITS],
    }


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.4g}"


def _examples(iterations: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each opponent answered to the same prompts, beside the real answer."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for told in iterations:
        for each in told.get("examples") or []:
            first = {"prompt": shown(each["prompt"]), "answers": [("real", shown(each["real"]))]}
            known = found.setdefault((each["prompt"], each["real"]), first)
            known["answers"].append((f"opponent {told['iteration']}", shown(each["generated"])))
    return list(found.values())
