"""Best of N: of several continuations of a prompt the best by a reward is chosen, and the worst rejected."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import override

from trainer.generation import Sampling
from trainer.ledger import Row
from trainer.pairs.building import Pair, PairBuilder
from trainer.pairs.candidates import CandidateFile
from trainer.pairs.continuations import Continuation, Generator, as_chat
from trainer.pairs.prompts import Prompt, Prompts, PromptSource
from trainer.pairs.users import continued, naming, plain
from trainer.rewards import Reward, described, scored
from trainer.schema import UserError

_N = 8


class BestOfN(PairBuilder):
    """N sampled continuations of each prompt, scored; best and worst are the pair.

    The texts follow from prompts, generator, n and sampling alone: not from batches, shards, ranks or reruns. A row's
    texts are scored together, so that its scores do not depend on them either.

    Args:
        generator: what continues the prompts.
        prompts: what to continue; none for a `CandidateFile`, which has its own.
        reward: what scores; may be left out where a `CandidateFile` has scores.
        n: continuations of each prompt (default 8); none for a `CandidateFile`.
        sampling: how tokens are drawn, and the seed (default: 64 new tokens); none for a `CandidateFile`.
        min_margin: leave out pairs whose scores are nearer than this.
        min_tokens: leave out texts that are shorter: they carry no signal. Blank ones always are.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: PromptSource | None = None,
        reward: Reward | None = None,
        n: int | None = None,
        sampling: Sampling | None = None,
        min_margin: float = 0.0,
        min_tokens: int = 1,
    ) -> None:
        self.generator, self.source, self.reward = generator, prompts, reward
        if isinstance(generator, CandidateFile):
            _refuse_idle(prompts=prompts, n=n, sampling=sampling)
        elif prompts is None or reward is None:
            raise UserError(f"BestOfN.{'prompts' if prompts is None else 'reward'}: is missing; give one")
        self.n = _N if n is None else n
        self.sampling = sampling or Sampling(max_new_tokens=64, do_sample=True)
        self.min_margin, self.min_tokens = min_margin, min_tokens
        self._check()

    def _check(self) -> None:
        if self.n < 2:
            raise UserError(f"BestOfN.n: {self.n} is not possible; give 2 or more: a best and a worst")
        if not self.sampling.do_sample:
            raise UserError(
                "BestOfN.sampling.do_sample: is false, and all texts would be the same; set it to true"
            )
        if not 0 <= self.min_margin < math.inf:
            raise UserError(f"BestOfN.min_margin: {self.min_margin} is not possible; give 0 or more")
        if self.min_tokens < 1:
            raise UserError(f"BestOfN.min_tokens: {self.min_tokens} is not possible; give 1 or more")

    @override
    def prompts(self) -> Prompts:
        if isinstance(self.generator, CandidateFile):
            if self.reward is None and not self.generator.scored:
                raise UserError(f"{self.generator.path}: has no scores; give a reward, or map columns.score")
            return self.generator.load()
        assert self.source is not None
        with naming(self.generator, "tokenizer_of"):
            tokenizer = self.generator.tokenizer_of()
        with naming(self.source, "load"):
            return self.source.load(tokenizer)

    @override
    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
        for batch in continued(self.generator, prompts, self.n, self.sampling):
            yield [self._row(prompt, texts) for prompt, texts in batch]

    def _row(self, prompt: Prompt, texts: list[Continuation]) -> Row:
        found = texts if self.reward is None else self._scored(prompt, texts)
        candidates = [dataclasses.asdict(each) for each in found]
        for each in candidates:
            if each["invalid"] is None:
                del each["invalid"]
        return {"key": prompt.key, "prompt": prompt.text, "candidates": candidates}

    def _scored(self, prompt: Prompt, texts: list[Continuation]) -> list[Continuation]:
        """The texts with their scores; a blank or invalid one is in no pair, and gets none."""
        assert self.reward is not None
        asked = [i for i, each in enumerate(texts) if each.text.strip() and each.invalid is None]
        found = [dataclasses.replace(each, score=None) for each in texts]
        if not asked:
            return found
        scores = scored(self.reward, [prompt.text] * len(asked), [texts[i].text for i in asked])
        for i, score in zip(asked, scores, strict=True):
            found[i] = dataclasses.replace(texts[i], score=score)
        return found

    @override
    def pair(self, row: Row, counts: Counter[str]) -> Pair | None:
        return choose(row["candidates"], self.min_margin, self.min_tokens, counts)

    @override
    def pair_row(self, row: Row, pair: Pair) -> dict[str, Any]:
        """Turns of a chat where the generator was given such."""
        made = super().pair_row(row, pair)
        return (
            as_chat(made, getattr(self.generator, "system", None))
            if getattr(self.generator, "chat", False)
            else made
        )

    @override
    def describe(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "class": type(self).__qualname__,
            "generator": plain(self.generator, "describe"),
        }
        if not isinstance(self.generator, CandidateFile):
            made |= {"n": self.n, "sampling": dataclasses.asdict(self.sampling)}
        return made | {"reward": None if self.reward is None else described(self.reward)}

    @override
    def selection(self) -> dict[str, Any]:
        return {"min_margin": self.min_margin, "min_tokens": self.min_tokens}


def choose(
    candidates: Sequence[dict[str, Any]], min_margin: float, min_tokens: int, counts: Counter[str]
) -> Pair | None:
    """Best and worst of the candidates; the first of those that are equally good, or bad.

    Left out first: invalid and unscored texts, short and blank ones, and those that say the same as another. Adds to
    `counts` why there is no pair (`dropped_short`, `dropped_duplicate`, `dropped_tie`, `dropped_margin`), and of the
    candidates how many were `candidates_invalid`, `_short`, `_duplicate` and `_unfinished`.
    """
    for name in ("short", "duplicate", "tie", "margin"):
        counts[f"dropped_{name}"] += 0
    valid = [each for each in candidates if each.get("score") is not None or _blank(each)]
    long = [each for each in valid if not _blank(each) and each["tokens"] >= min_tokens]
    texts: dict[str, dict[str, Any]] = {}
    for each in long:
        texts.setdefault(each["text"], each)
    counts["candidates_invalid"] += len(candidates) - len(valid)
    counts["candidates_short"] += len(valid) - len(long)
    counts["candidates_duplicate"] += len(long) - len(texts)
    counts["candidates_unfinished"] += sum(not each["finished"] for each in long)
    if len(texts) < 2:
        why = "duplicate" if len(long) > 1 else "invalid" if len(valid) < 2 else "short"
        counts[f"dropped_{why}"] += 1
        return None
    best, worst = (end(texts.values(), key=lambda each: each["score"]) for end in (max, min))
    if best["score"] == worst["score"]:
        counts["dropped_tie"] += 1
    elif best["score"] - worst["score"] < min_margin:
        counts["dropped_margin"] += 1
    else:
        return Pair(best, worst)
    return None


def _blank(candidate: dict[str, Any]) -> bool:
    return not candidate["text"].strip() and not candidate.get("invalid")


def _refuse_idle(**settings: Any) -> None:
    for name, value in settings.items():
        if value is not None:
            raise UserError(
                f"BestOfN.{name}: has no effect with a CandidateFile, whose texts are there; leave it out"
            )
