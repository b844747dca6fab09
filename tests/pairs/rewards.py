"""Rewards that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.rewards import Reward


class CountReward(Reward):
    """How many of a text's characters are one of these letters."""

    def __init__(self, letters: str = "aeiou") -> None:
        self.letters = letters

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        return [float(sum(text.count(letter) for letter in self.letters)) for text in completions]

    def describe(self) -> dict[str, Any]:
        return {"class": "CountReward", "letters": self.letters}


class Failing(CountReward):
    """Fails at prompts that say a word."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        if any(self.at in prompt for prompt in prompts):
            raise KeyError(self.at)
        return super().__call__(prompts, completions)


class Unmade(CountReward):
    """Cannot be made."""

    def __init__(self) -> None:
        raise ZeroDivisionError("no letters")


class Unfinished(Reward):
    """Lacks `__call__`."""
