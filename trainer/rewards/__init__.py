"""What scores a text: the `Reward` that pairs, callbacks and evaluations ask. One file for each kind."""

from __future__ import annotations

import abc
import json
import math
from collections.abc import Sequence
from typing import Any

from trainer.schema import UserError, failure


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
    """What a manifest says of a reward: its own `describe()`, or its class. Raises `UserError` where that fails."""
    if not hasattr(reward, "describe"):
        return {"class": _name(reward)}
    try:
        found: dict[str, Any] = reward.describe()
        json.dumps(found)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{_name(reward)}.describe: fails ({failure(error)}); it should give plain JSON"
        ) from error
    return found


def scored(reward: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The reward of each completion, checked. Raises `UserError` for whatever goes wrong in it, so that ranks agree."""
    name = _name(reward)
    try:
        found = list(reward(prompts, completions))
    except UserError:
        raise
    except Exception as error:
        first = f", the first of {len(prompts)} prompts" if len(prompts) > 1 else ""
        raise UserError(f"{name}: fails at {prompts[0][:60]!r}{first} ({failure(error)})") from error
    if len(found) != len(completions):
        raise UserError(
            f"{name}: gave {len(found)} scores for {len(completions)} texts; one is wanted for each"
        )
    return [_number(name, score, text) for score, text in zip(found, completions, strict=True)]


def _number(name: str, score: Any, text: str) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        told = repr(score)
        told = told if len(told) <= 60 else told[:57] + "..."
        raise UserError(f"{name}: the score of {text[:60]!r} is {told}; a finite number is wanted")
    return number


def _name(reward: Any) -> str:
    return str(getattr(reward, "__qualname__", type(reward).__qualname__))
