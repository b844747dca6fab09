"""What ranks that share the making of pairs tell each other; alone, a process agrees with itself."""

from __future__ import annotations

import torch


def ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def agreed(keys: list[str]) -> list[str]:
    """What the first rank says: another shard may write while they read."""
    if ranks() == 1:
        return keys
    said = [keys]
    torch.distributed.broadcast_object_list(said)
    return said[0]


def gathered(value: int) -> list[int]:
    """Every rank's value, when all of them have come here."""
    if ranks() == 1:
        return [value]
    found = [0] * ranks()
    torch.distributed.all_gather_object(found, value)
    return found
