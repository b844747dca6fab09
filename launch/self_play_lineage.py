"""Self-play's lineage: what each iteration was made of, and what came of it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from scipy import stats

from launch.self_play_steps import Loop
from trainer.data.self_play import opponent_of
from trainer.policy.load import fingerprint as weights_of
from trainer.provenance import read_json, write_json
from trainer.schema import UserError

LINEAGE, LAST = "lineage.json", "last"
_EXAMPLES = 4


def write_lineage(loop: Loop, lineage: list[dict[str, Any]], ended: str | None) -> None:
    content = {"kind": "spin_lineage", "base": loop.first.base, "iterations": lineage, "ended": ended}
    write_json(loop.root / LINEAGE, content)


def read_lineage(loop: Loop) -> list[dict[str, Any]]:
    """The iterations as they were written before; none where none were."""
    path = loop.root / LINEAGE
    return list(read_json(path)["iterations"]) if path.is_file() else []


def describe(loop: Loop, iteration: int) -> dict[str, Any]:
    """What an iteration was made of, and what came of it."""
    run = read_json(loop.folder("train", iteration) / "manifest.json")
    pairs = read_json(loop.folder("convert", iteration) / "manifest.json")
    metrics = read_json(loop.folder("validate", iteration) / "metrics.json")
    metrics = {name.removeprefix("val/"): value for name, value in metrics.items()}
    trained = loop.saved(loop.folder("train", iteration) / "checkpoints" / "last")
    number = run["data"]["counts"].get("validation", {}).get("kept", 0)
    found = interval(metrics.get("rewards/accuracies"), number, loop.given.stop_confidence)
    return {
        "iteration": iteration,
        "opponent": {**pairs["opponent"], "start": loop.start(iteration), "base_model": loop.first.base},
        "shards": pairs["shards"],
        "pairs": {
            "folder": str(loop.folder("convert", iteration)),
            **{name: pairs[name] for name in ("counts", "similarity", "files", "previous")},
        },
        "template": pairs["template"],
        "seeds": {"generate": pairs["sampling"]["seed"], "train": int(run["seed"])},
        "lr": run["model"]["optimizer"]["lr"],
        "beta": run["model"]["objective"]["beta"],
        "steps": run["step"],
        "adapter": {"path": trained.start, **opponent_of(weights_of(trained))},
        "validation": {"pairs": number, **metrics},
        "accuracy_interval": found,
        "told_apart": found is None or found[0] > 0.5,
        "examples": _examples(loop.folder("convert", iteration)),
    }


def _examples(pairs: Path) -> list[dict[str, str]]:
    """The first test pairs (or, without a test, training pairs): the same prompts in each iteration."""
    file = next(path for name in ("test", "train") if (path := pairs / f"{name}.jsonl").is_file())
    found = []
    with open(file, encoding="utf-8") as stream:
        for each in itertools.islice(stream, _EXAMPLES):
            row = json.loads(each)
            said = {name: row[name][-1]["content"] for name in ("real", "generated")}
            found.append({"prompt": _whole(row["real"][:-1]), **said})
    return found


def _whole(history: list[dict[str, str]]) -> str:
    """A prompt in words: chats that end alike are told apart by what came before."""
    if len(history) == 1:
        return history[0]["content"]
    return "\n\n".join(f"[{turn['role']}] {turn['content']}" for turn in history)


def interval(accuracy: float | None, pairs: int, confidence: float | None) -> list[float] | None:
    """Wilson's interval of the reward accuracy; None where nothing is to be decided by it.

    Raises `UserError` where nothing was validated.
    """
    if confidence is None:
        return None
    if accuracy is None or not pairs:
        raise UserError(
            "--stop_confidence: there are no test chats to tell by; keep some (`tandem spin reformat --test_fraction"
            " 0.05`), or give --stop_confidence never"
        )
    found = stats.binomtest(round(accuracy * pairs), pairs).proportion_ci(confidence, method="wilson")
    return [float(found.low), float(found.high)]


def summary(of: dict[str, Any]) -> str:
    """An iteration in a line."""
    metrics, between = of["validation"], of["accuracy_interval"]
    within = "" if between is None else f" ({between[0]:.3f} to {between[1]:.3f})"
    likeness = json.dumps({split: round(value, 3) for split, value in of["pairs"]["similarity"].items()})
    return (
        f"iteration {of['iteration']}: reward accuracy {metrics.get('rewards/accuracies', float('nan')):.3f}{within},"
        f" margin {metrics.get('rewards/margins', float('nan')):.4g}, log-likelihood of real answers"
        f" {metrics.get('logps/chosen', float('nan')):.2f}, similarity {likeness}"
    )
