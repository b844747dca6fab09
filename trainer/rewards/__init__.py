"""What scores a text: the `Reward` that pairs, callbacks and evaluations ask. One file for each kind."""

from __future__ import annotations

import abc
import dataclasses
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


class PartedReward(Reward):
    """A reward that is the mean of several scores, such as those by a rubric's criteria; evaluations tell each."""

    @abc.abstractmethod
    def by_part(self, prompts: Sequence[str], completions: Sequence[str]) -> list[dict[str, float] | str]:
        """Name -> score of each completion, the same names for all; or why it has no score."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The means. Raises `UserError` for a completion that has no score."""
        found = []
        for text, by in zip(completions, self.by_part(prompts, completions), strict=True):
            if isinstance(by, str):
                raise UserError(f"{_name(self)}: {text[:60]!r} got no score ({by})")
            found.append(math.fsum(by.values()) / len(by))
        return found


@dataclasses.dataclass(frozen=True)
class Score:
    """What a completion is worth, and its parts; None, and why, where it has no score."""

    value: float | None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    why: str = ""


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
    found = _asked(reward, reward, prompts, completions)
    return [_number(_name(reward), score, text) for score, text in zip(found, completions, strict=True)]


def scored_by_part(reward: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[Score]:
    """As `scored`, with the parts of a reward that has some, whose texts may also go without a score."""
    if not isinstance(reward, PartedReward):
        return [Score(value) for value in scored(reward, prompts, completions)]
    found = _asked(reward, reward.by_part, prompts, completions)
    return [_parted(_name(reward), by, text) for by, text in zip(found, completions, strict=True)]


def _asked(reward: Any, call: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[Any]:
    name = _name(reward)
    try:
        found = list(call(prompts, completions))
    except UserError:
        raise
    except Exception as error:
        first = f", the first of {len(prompts)} prompts" if len(prompts) > 1 else ""
        raise UserError(f"{name}: fails at {prompts[0][:60]!r}{first} ({failure(error)})") from error
    if len(found) != len(completions):
        raise UserError(
            f"{name}: gave {len(found)} scores for {len(completions)} texts; one is wanted for each"
        )
    return found


def _parted(name: str, by: Any, text: str) -> Score:
    if isinstance(by, str):
        return Score(None, why=by)
    parts = {part: _number(name, value, text) for part, value in by.items()}
    return Score(math.fsum(parts.values()) / len(parts), parts)


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
