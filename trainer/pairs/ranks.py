"""What ranks that share the making of pairs tell each other; alone, a process agrees with itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from trainer.schema import UserError


def ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def agreed(keys: list[str]) -> list[str]:
    """What the first rank says: another shard may write while they read."""
    if ranks() == 1:
        return keys
    said = [keys]
    with _losing_a_rank():
        torch.distributed.broadcast_object_list(said)
    return said[0]


def gathered(value: int) -> list[int]:
    """Every rank's value, when all of them have come here."""
    if ranks() == 1:
        return [value]
    found = [0] * ranks()
    with _losing_a_rank():
        torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def _losing_a_rank() -> Iterator[None]:
    """A rank that fails ends at once, with its error; those that wait for it say that it is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"rank {rank()} of {ranks()} lost another one; that one's own output says why. What was made is kept,"
            " and the same command goes on"
        ) from error
