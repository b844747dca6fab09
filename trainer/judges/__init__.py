"""What chooses: the `Judge` that win rates (and a model's scores of itself) ask. One file for each kind."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from trainer.schema import Text, UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """What a judge is asked: text or the turns of a chat, and the answers that it may give, such as A, B and C.

    `judged` are the pieces of `text` that others wrote, which may try to pose as a chat's marks; none: all of it.
    """

    key: str
    text: Text
    choices: tuple[str, ...]
    judged: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a judge said to the question of this key.

    `pick` is one of the choices; None is invalid, and `said` tells what came instead. `probabilities` (of the choices,
    in their order, summing to 1) stand there where the judge gives them, and `mass` is what all of them held before
    they were made to sum to 1: little means that the model would have said something else. Of a server that tells the
    likeliest tokens only, it is what the choices hold among those. `answered` is false where no answer came at all, so
    that the question may be asked again.
    """

    key: str
    pick: str | None
    said: str = ""
    probabilities: tuple[float, ...] | None = None
    answered: bool = True
    mass: float | None = None


class JudgeGone(UserError):
    """Answers no more: what it said before stands, and the rest may be asked again later."""


class Judge(abc.ABC):
    """Chooses among given answers. A config names a subclass by its `class_path`; nothing is registered anywhere."""

    @abc.abstractmethod
    def choose(self, questions: Sequence[Question]) -> Iterator[list[Choice]]:
        """The choices, some at a time as they come, each question's once; nonsense is invalid, never an error.

        Raises:
            JudgeGone: it gives no answers any more (a server that went down).
            UserError: the judge cannot be asked at all (no such file, a missing extra, a wrong key).
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that its choices follow from, as plain JSON."""
