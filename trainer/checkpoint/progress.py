"""Lightning's counts of micro-batches in a checkpoint, where a resumed run cuts its steps into others."""

from __future__ import annotations

from typing import Any


def recount_forwards(checkpoint: dict[str, Any], now: int) -> None:
    """Rewrite the counts of a checkpoint for `now` micro-batches a step; the steps stay what they are.

    Other ranks or another token budget may cut the same steps into other micro-batches. Of a step that was under way
    nothing is kept: the loader begins it anew.
    """
    before = checkpoint.get("tandem", {}).get("forwards_each_step")
    if before is None or "loops" not in checkpoint:
        return
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):
            # Saved in the middle of a micro-batch's hooks: `completed` is one behind.
            moved = counts["ready"] // before * now - counts["ready"]
            counts.update({name: count + moved for name, count in counts.items()})
