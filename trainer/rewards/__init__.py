"""What scores a text: the `Reward` that pairs, callbacks and evaluations ask. One file for each kind."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any


class Reward(abc.ABC):
    """Scores completions; more is better. A config names a subclass by its `class_path`; nothing is registered.

    From Python any callable of this shape does.
    """

    @abc.abstractmethod
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """A finite number for each prompt with its completion, whatever the batch they come in."""

    def describe(self) -> dict[str, Any]:
        """All that its scores follow from, as plain JSON; a subclass with settings adds them."""
        return {"class": type(self).__qualname__}


def described(reward: Any) -> dict[str, Any]:
    """What a manifest says of a reward: its own `describe()`, or its class."""
    if hasattr(reward, "describe"):
        return reward.describe()
    return {"class": getattr(reward, "__qualname__", type(reward).__qualname__)}
