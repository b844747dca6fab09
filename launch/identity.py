"""Whether two configs describe the same run: what it is made of, not where it lies or how long it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.schema import UserError

PLACES = {"config", "run", "resume", "overwrite", "trainer.default_root_dir"}
_WHAT = ("model.", "data.")
_HOW = {
    "offline",
    "gradient_checkpointing",
    "compile",
    "workers",
    "num_workers",
    "cache",
    "layout",
    "token_budget",
}
"""Settings of model and data that change no number of the run."""
_NAMED = 3


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two configs, places (run, resume, ...) aside."""
    old, new = dict(flat(before)), dict(flat(after))
    keys = sorted({*old, *new} - PLACES)
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a config with their dotted keys."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from flat(value, name)
        else:
            yield name, value


def refuse_another_run(folder: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse to go on by `--resume auto` where the folder's run trains another model, or on other data.

    A setting that the saved config does not have came with a later version of tandem, and is no difference.

    Raises:
        UserError: naming the first keys that differ.
    """
    old, new = dict(flat(before)), dict(flat(after))
    changes = [
        f"{key.replace('.init_args', '')} is {new.get(key, 'something else')}, was {value}"
        for key, value in sorted(old.items())
        if key.startswith(_WHAT)
        and key.rpartition(".")[2] not in _HOW
        and (key not in new or new[key] != value)
    ]
    if not changes:
        return
    more = f" and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    named = "; ".join(changes[:_NAMED]) + more
    raise UserError(
        f"--resume auto: {folder} holds another run ({named}); give another --run FOLDER, or go on all the same"
        f" with --resume {folder}"
    )
