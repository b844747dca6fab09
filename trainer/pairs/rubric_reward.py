"""A rubric as a reward: the mean of the scores that a judge gives by its criteria, before training and after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from trainer.judges import Judge
from trainer.judges.named import judge_named
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.pairs.scoring import LOW, marks, told_of
from trainer.rewards import PartedReward
from trainer.schema import UserError

log = logging.getLogger(__name__)


class RubricReward(PartedReward):
    """Scores answers to instructions from 1 to 5, criterion by criterion, as `tandem pairs self-judge` does.

    The judge is asked the rubric's scoring question; a score is the expected value of the digits' probabilities, or the
    digit itself from a judge that gives none. An answer that lacks any of them has no score.

    A warning says where the digits hold less than half of the judge's probability: it would have said something else.

    Args:
        judge: who scores: a .gguf file, a transformers model's folder or hub id, the .yaml of a judge, or a class.
        rubric: YAML file of criteria and prompts (`trainer.pairs.rubric`). Default: the shipped Russian one.
        wording: which of the rubric's scoring questions is asked, from 1.
    """

    def __init__(self, judge: Judge | str, rubric: str = str(RUBRIC), wording: int = 1) -> None:
        self.judge = judge_named(judge) if isinstance(judge, str) else judge
        self.rubric, self.wording = Rubric.read(rubric), wording
        if not 1 <= wording <= len(self.rubric.score):
            raise UserError(
                f"RubricReward.wording: {wording} is not possible; {rubric} has 1 to {len(self.rubric.score)}"
            )

    @override
    def by_part(self, prompts: Sequence[str], completions: Sequence[str]) -> list[dict[str, float] | str]:
        """Criterion -> score of each answer; or the first reason why it has none."""
        asked = [
            self.rubric.question(f"{number:09d}/{criterion.key}", prompt, text, criterion, self.wording - 1)
            for number, (prompt, text) in enumerate(_bare(prompts, completions))
            if text
            for criterion in self.rubric.criteria
        ]
        given = marks(self.judge, asked, in_words=True)
        scores = {key: mark.score for key, mark in given.items()}
        if (held := told_of(mark.mass for mark in given.values())) and held["mean"] < LOW:
            log.warning(
                "RubricReward: the digits hold %.1f %% of %s's probability: it would not have answered with one",
                100 * held["mean"],
                type(self.judge).__qualname__,
            )
        found: list[dict[str, float] | str] = []
        for number, text in enumerate(completions):
            if not text.strip():
                found.append("a blank answer")
                continue
            by = {each.key: scores[f"{number:09d}/{each.key}"] for each in self.rubric.criteria}
            why = next((value for value in by.values() if isinstance(value, str)), None)
            found.append(why if why is not None else {key: float(value) for key, value in by.items()})
        return found

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__qualname__,
            "judge": self.judge.describe(),
            "rubric": self.rubric.describe(),
            "wording": self.wording,
        }


def _bare(prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[str, str]]:
    return [(prompt, text.strip()) for prompt, text in zip(prompts, completions, strict=True)]
