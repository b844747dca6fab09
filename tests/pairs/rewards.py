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
