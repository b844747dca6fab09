"""A rubric as a reward: the mean of the scores that a judge gives by its criteria, before training and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from trainer.judges import Judge
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.pairs.scoring import marks
from trainer.rewards import PartedReward
from trainer.schema import UserError


class RubricReward(PartedReward):
    """Scores answers to instructions from 1 to 5, criterion by criterion, as `tandem pairs self-judge` does.

    The judge is asked the rubric's scoring question; a score is the expected value of the digits' probabilities, or the
    digit itself from a judge that gives none. An answer that lacks any of them has no score.

    Args:
        judge: who scores: the model itself, or another one.
        rubric: YAML file of criteria and prompts (`trainer.pairs.rubric`). Default: the shipped Russian one.
        wording: which of the rubric's scoring questions is asked, from 1.
    """

    def __init__(self, judge: Judge, rubric: str = str(RUBRIC), wording: int = 1) -> None:
        self.judge, self.rubric, self.wording = judge, Rubric.read(rubric), wording
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
        scores = {key: mark.score for key, mark in marks(self.judge, asked, in_words=True).items()}
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
