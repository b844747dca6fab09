"""Self-judging: a chat model answers each instruction several times and scores its own answers by a rubric.

After Yuan et al. 2024, "Self-Rewarding Language Models", section 2, https://arxiv.org/abs/2401.10020: the best and the
worst of a model's answers by its own scores are a pair. A score from the probabilities of the digits is their expected
value, as in Liu et al. 2023, "G-Eval", section 2, https://arxiv.org/abs/2303.16634.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from typing_extensions import override

from trainer.generation import Sampling
from trainer.judges import Judge
from trainer.ledger import Row
from trainer.pairs.best_of_n import choose
from trainer.pairs.building import Pair, PairBuilder
from trainer.pairs.candidates import CandidateFile
from trainer.pairs.continuations import Continuation, Generator, as_chat
from trainer.pairs.estimates import Estimate, Form, Unreadable, read_estimate
from trainer.pairs.judging import findings
from trainer.pairs.prompts import Prompt, Prompts, PromptSource
from trainer.pairs.rubric import RECORDED, RUBRIC, Rubric
from trainer.pairs.scoring import Mark, marks
from trainer.pairs.users import continued, naming, plain
from trainer.schema import UserError

Way = Literal["together", "apart"]
WHOLE = "estimate"
"""What a score is called that is of the whole answer, and not of one criterion."""
_DECIMALS = 6


class SelfJudge(PairBuilder):
    """N answers of a chat model to each instruction, with its own scores from 1 to 5; best and worst are the pair.

    A pair's prompt is the plain instruction, as the one turn of a user. An answer's score is the mean of what was
    asked; where anything of it is missing the answer is invalid, counted, and in no pair.

    Args:
        generator: the model that answers and scores; a LocalGenerator or ServerGenerator with chat: true.
        prompts: the instructions.
        rubric: YAML file of criteria and prompts (`trainer.pairs.rubric`). Default: the shipped Russian one.
        way: `apart` asks for a score in a second call, criterion by criterion, and takes the expected value of the
            digits' probabilities; `together` asks for answer and score in one go, and reads them.
        form: of `together`: `json` (default) or `plain`.
        n: answers to each instruction.
        sampling: how tokens are drawn, and the seed (default: 256 new tokens).
        rescored: score so many times more, each time by a call for each criterion in another of the rubric's wordings:
            how far the scores agree with themselves. The same question would get the same probabilities. `together`
            cannot score the same answer twice in one go: its scores are compared with those of a second call.
        min_margin: leave out pairs whose scores are nearer than this.
        min_tokens: leave out answers that are shorter. Blank ones always are.
        language_threshold: an answer whose letters are to a smaller share of the rubric's script counts as being in
            another language.
        scoring_batch_size: scoring questions in one forward (default 8); without effect where nothing is asked apart.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: PromptSource,
        rubric: str = str(RUBRIC),
        way: Way = "apart",
        form: Form | None = None,
        n: int = 4,
        sampling: Sampling | None = None,
        rescored: int = 0,
        min_margin: float = 0.0,
        min_tokens: int = 1,
        language_threshold: float = 0.5,
        scoring_batch_size: int | None = None,
    ) -> None:
        self.generator, self.source, self.rubric = generator, prompts, Rubric.read(rubric)
        self.way, self.form, self.n, self.rescored = way, form, n, rescored
        self.sampling = sampling or Sampling(max_new_tokens=256, do_sample=True)
        self.min_margin, self.min_tokens = min_margin, min_tokens
        self.language_threshold, self.scoring_batch_size = language_threshold, scoring_batch_size
        self._check(rubric)
        if way == "together" and form is None:
            self.form = "json"

    def _check(self, rubric: str) -> None:
        if isinstance(self.generator, CandidateFile):
            raise UserError(
                "SelfJudge.generator: CandidateFile has texts and no model; for texts that are there take `tandem pairs"
                " rescore`"
            )
        if getattr(self.generator, "chat", True) is False:
            raise UserError(
                "SelfJudge.generator.chat: is false; set it to true: a rubric is put to a chat model"
            )
        if self.way not in ("together", "apart"):
            raise UserError(f"SelfJudge.way: {self.way!r} is not possible; give together or apart")
        if self.form is not None and self.way == "apart":
            raise UserError(f"SelfJudge.form: {self.form} has no effect with way: apart; leave it out")
        if self.n < 2:
            raise UserError(f"SelfJudge.n: {self.n} is not possible; give 2 or more: a best and a worst")
        if not self.sampling.do_sample:
            raise UserError(
                "SelfJudge.sampling.do_sample: is false, and all answers would be the same; set it to true"
            )
        most = len(self.rubric.score) - (self.way == "apart")
        if not 0 <= self.rescored <= most:
            raise UserError(
                f"SelfJudge.rescored: {self.rescored} is not possible; {rubric} has wordings for 0 to {most} times"
            )
        if not 0 <= self.min_margin < math.inf:
            raise UserError(f"SelfJudge.min_margin: {self.min_margin} is not possible; give 0 or more")
        if self.min_tokens < 1:
            raise UserError(f"SelfJudge.min_tokens: {self.min_tokens} is not possible; give 1 or more")
        if not 0 < self.language_threshold <= 1:
            raise UserError(
                f"SelfJudge.language_threshold: {self.language_threshold} is not possible; give above 0, at most 1"
            )
        if self.scoring_batch_size is not None:
            if self.scoring_batch_size < 1:
                raise UserError(
                    f"SelfJudge.scoring_batch_size: {self.scoring_batch_size} is not possible; give 1 or more"
                )
            if not self._wordings:
                raise UserError(
                    "SelfJudge.scoring_batch_size: has no effect with way: together and rescored: 0; leave it out"
                )

    @property
    def _wordings(self) -> range:
        """The scoring questions that are asked in calls of their own; `apart`, the first is the label's."""
        return range(self.rescored + (self.way == "apart"))

    @override
    def prompts(self) -> Prompts:
        with naming(self.generator, "tokenizer_of"):
            tokenizer = self.generator.tokenizer_of()
        with naming(self.source, "load"):
            return self.source.load(tokenizer)

    @override
    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        instructions = {prompt.key: prompt for prompt in prompts}
        asked = [Prompt(each.key, self.rubric.asked(each.text, self.form)) for each in prompts]
        for batch in continued(self.generator, asked, self.n, self.sampling):
            yield [self._row(instructions[prompt.key], texts) for prompt, texts in batch]

    def _row(self, prompt: Prompt, texts: list[Continuation]) -> Row:
        candidates = [self._read(each) if self.way == "together" else _plain(_bare(each)) for each in texts]
        if self._wordings:
            # All of a prompt's answers and of no other's: what a batch holds moves the last digits of a score.
            scores = self._scored(prompt, [each["text"] for each in candidates if "invalid" not in each])
            for each in candidates:
                if "invalid" not in each and each["text"].strip():
                    self._give(each, scores[each["text"]])
        for each in candidates:
            if "invalid" not in each and each["scores"] is not None:
                # Rounded: scores that differ by less are a tie, not a preference.
                each["score"] = round(math.fsum(each["scores"].values()) / len(each["scores"]), _DECIMALS)
        return {"key": prompt.key, "prompt": prompt.text, "candidates": candidates}

    def _read(self, said: Continuation) -> dict[str, Any]:
        """What a model said in one go, as an answer and its scores; `said` stays where it was not as asked for."""
        assert self.form is not None
        if said.invalid is not None:
            return _plain(said)
        names = [each.name for each in self.rubric.criteria]
        found = read_estimate(said.text, self.form, names, said.finished)
        if isinstance(found, Unreadable):
            return _plain(dataclasses.replace(said, text="", tokens=0, invalid=found.reason)) | {
                "said": said.text
            }
        keys = [WHOLE] if len(found.scores) == 1 else [each.key for each in self.rubric.criteria]
        made = _plain(Continuation(found.answer, self._count(found), True))
        made["scores"] = dict(zip(keys, found.scores, strict=True))
        return made | ({"said": said.text, "repairs": list(found.repairs)} if found.repairs else {})

    def _count(self, found: Estimate) -> int:
        tokenizer = self.generator.tokenizer_of()
        if tokenizer is None:
            return len(found.answer.split())
        return len(tokenizer.encode(found.answer, add_special_tokens=False, split_special_tokens=True))

    def _scored(self, prompt: Prompt, texts: Sequence[str]) -> dict[str, list[dict[str, Mark]]]:
        """For each text that says something and each wording: the mark by each criterion."""
        kept = [text for text in dict.fromkeys(texts) if text.strip()]
        places = [
            (number, wording, criterion)
            for number in range(len(kept))
            for wording in self._wordings
            for criterion in self.rubric.criteria
        ]
        questions = [
            self.rubric.question(f"{prompt.key}/{place:06d}", prompt.text, kept[number], criterion, wording)
            for place, (number, wording, criterion) in enumerate(places)
        ]
        given = marks(self._judge, questions)
        found: dict[str, list[dict[str, Mark]]] = {text: [{} for _ in self._wordings] for text in kept}
        for question, (number, wording, criterion) in zip(questions, places, strict=True):
            found[kept[number]][wording][criterion.key] = given[question.key]
        return found

    def _give(self, candidate: dict[str, Any], found: Sequence[Mapping[str, Mark]]) -> None:
        """A candidate its scores; one that lacks any of its label's is invalid."""
        own, again = (found[0], found[1:]) if self.way == "apart" else (None, found)
        if own is not None:
            _note(candidate, "mass", _masses(own))
            missing = [f"{key}: {mark.score}" for key, mark in own.items() if isinstance(mark.score, str)]
            if missing:
                candidate["invalid"] = f"no score ({missing[0]})"
                return
            candidate["scores"] = _whole(own)
        if again:
            # A wording that gave no score of a criterion says nothing of the answer.
            candidate["again"] = [_whole(each) for each in again]
            _note(candidate, "again_mass", [_masses(each) for each in again])

    @functools.cached_property
    def _judge(self) -> Judge:
        with naming(self.generator, "scorer"):
            return self.generator.scorer(self.scoring_batch_size or 8)

    @override
    def pair(self, row: Row, counts: Counter[str]) -> Pair | None:
        return choose(row["candidates"], self.min_margin, self.min_tokens, counts)

    @override
    def pair_row(self, row: Row, pair: Pair) -> dict[str, Any]:
        """Prompt and answers as the turns of a chat, with the scores that the pair follows from."""
        made = as_chat(super().pair_row(row, pair))
        scores = {"chosen_scores": pair.chosen["scores"], "rejected_scores": pair.rejected["scores"]}
        return made | scores | {"way": self.way}

    @override
    def findings(self, rows: Sequence[Row], pairs: Sequence[tuple[Row, Pair]]) -> dict[str, Any]:
        """What should make one doubt the scores, or trust them: see `trainer.pairs.judging`."""
        names = {each.key: each.name for each in self.rubric.criteria}
        told = {"way": self.way, "form": self.form, "names": names}
        return {"judging": told | findings(rows, pairs, self.rubric.language, self.language_threshold)}

    @override
    def beside(self) -> dict[str, str]:
        """The rubric as it is: the folder needs no other file to be scored again."""
        return {RECORDED: self.rubric.as_json()}

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "class": type(self).__qualname__,
            "generator": plain(self.generator, "describe"),
            "rubric": self.rubric.describe(),
            "way": self.way,
            "form": self.form,
            "n": self.n,
            "sampling": dataclasses.asdict(self.sampling),
            "rescored": self.rescored,
        }

    @override
    def selection(self) -> dict[str, Any]:
        return {
            "min_margin": self.min_margin,
            "min_tokens": self.min_tokens,
            "language_threshold": self.language_threshold,
        }


def _whole(found: Mapping[str, Mark]) -> dict[str, float] | None:
    """The scores by each criterion; None where one is missing."""
    known = {key: mark.score for key, mark in found.items() if not isinstance(mark.score, str)}
    return known if len(known) == len(found) else None


def _masses(found: Mapping[str, Mark]) -> dict[str, float | None]:
    """What probability the digits had, by criterion."""
    return {key: mark.mass for key, mark in found.items()}


def _note(candidate: dict[str, Any], name: str, masses: Any) -> None:
    """Put down masses of which one is known."""
    each = masses if isinstance(masses, list) else [masses]
    if any(mass is not None for some in each for mass in some.values()):
        candidate[name] = masses


def _bare(text: Continuation) -> Continuation:
    """Without blanks around it, which chat templates cut off: two answers that differ by those are one."""
    return dataclasses.replace(text, text=text.text.strip())


def _plain(text: Continuation) -> dict[str, Any]:
    """A candidate without scores yet."""
    made = dataclasses.asdict(text) | {"score": None, "scores": None}
    if made["invalid"] is None:
        del made["invalid"]
    return made
