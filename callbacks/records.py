"""Lines that a callback appends to a file of its run, one JSON object each, with the step that it is of."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.provenance import write_text


def rewind(path: Path, step: int) -> None:
    """Drop the lines of steps after the one that this run starts from: they will come again.

    What follows the last end of a line was being written when a run was killed, and goes, too.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    # Not splitlines(): texts may hold other ends of lines, which JSON writes as they are.
    lines = [f"{line}\n" for line in text.split("\n")[:-1]]
    kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
    if kept != text:
        write_text(path, kept)
