"""What a policy's texts are worth and how varied they are: rewards, entropy, KL, distinct n-grams, likeness, length."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.data.chat import chat_turns
from trainer.data.tokenize import tokenize_prompt
from trainer.evaluation.divergence import Applied, Drawn, by_ranks, measure
from trainer.evaluation.diversity import distinct, self_similarity
from trainer.evaluation.intervals import ratio_interval
from trainer.generation import Generation, Sampling, generate
from trainer.rewards import Reward, Score, described, scored_by_part
from trainer.schema import UserError

_CHUNK = 256
"""Texts that a reward is asked for at once."""


class Keyed(Protocol):
    """A prompt; its key decides its noise."""

    @property
    def key(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Sampled:
    """`samples` continuations of each prompt: sample j of prompt i is number i * samples + j.

    `too_long`: further prompts that leave no room for an answer.
    """

    prompts: list[str]
    ids: list[list[int]]
    answers: list[Generation]
    samples: int
    too_long: int = 0

    @property
    def beginnings(self) -> list[str]:
        """The prompt of each answer."""
        return [prompt for prompt in self.prompts for _ in range(self.samples)]

    @property
    def texts(self) -> list[str]:
        """The answers, without a last character that a cut went through."""
        return [each.text if each.finished else each.text.rstrip("\ufffd") for each in self.answers]

    @property
    def drawn(self) -> list[Drawn]:
        """The answers as token ids behind their prompts'."""
        ids = [row for row in self.ids for _ in range(self.samples)]
        return [Drawn(row, each.ids, each.finished) for row, each in zip(ids, self.answers, strict=True)]


def sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Keyed],
    sampling: Sampling,
    samples: int = 1,
    batch_size: int = 32,
    progress: bool = False,
    chat: bool = False,
    system: str | None = None,
) -> Sampled:
    """Continue each prompt (`chat`: answer it, as a user's turn behind `system`) `samples` times.

    Every rank of a process group must call this with the same prompts.

    The same prompts get the same noise from every model, so that two models are compared on the same draws. Raises
    `UserError`: fewer than two prompts (there is no interval), greedy sampling asked for several times.
    """
    if samples < 1 or (samples > 1 and not sampling.do_sample):
        raise UserError(
            f"samples: {samples} of each prompt; give 1 or more, and more than 1 with sampling.do_sample only"
        )
    if system is not None and not chat:
        raise UserError("system: has no effect without chat: true; set that, or leave it out")
    if system is not None and not system.strip():
        raise UserError("system: is blank; give a text, or leave it out")
    ids = [
        tokenize_prompt(
            chat_turns(prompt.text, system) if chat else prompt.text,
            tokenizer,
            f"prompt {prompt.text[:40]!r}",
        )
        for prompt in prompts
    ]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    fits = [len(row) < room for row in ids]
    prompts = list(itertools.compress(prompts, fits))
    ids = list(itertools.compress(ids, fits))
    if len(prompts) < 2:
        left = f" ({fits.count(False)} leave no room for an answer)" if not all(fits) else ""
        raise UserError(f"prompts: {len(prompts)} are too few for an interval{left}; give 2 or more")
    rows = [row for row in ids for _ in range(samples)]
    keys = [prompt.key for prompt in prompts for _ in range(samples)]
    answers = generate(model, tokenizer, rows, sampling, keys, batch_size, progress, continuing=not chat)
    return Sampled([prompt.text for prompt in prompts], ids, answers, samples, fits.count(False))


def evaluate_reward(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Keyed],
    rewards: Mapping[str, Reward],
    *,
    sampling: Sampling,
    samples: int = 1,
    reference: Applied | None = None,
    batch_size: int = 32,
    examples: int = 20,
    progress: bool = False,
    chat: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Sample, score and measure; plain JSON with means and 95 % intervals (bootstrap over prompts).

    Every rank of a process group must call this with the same prompts, and has the same numbers.

    Args:
        rewards: by the names that they have in the result. Each scores every text.
        reference: what the KL divergence is from; without it `kl` is None.
        examples: how many prompts' first answers the result holds.
        chat: each prompt is a user's turn, put through the chat template; `system` stands before it.

    Returns:
        `rewards` (mean, interval, sd and n of texts; of a reward with parts also `parts`, each with mean and interval,
        and `unscored`, reason -> texts, which are in no mean), `entropy` (nats a token), `kl` (nats a text),
        `distinct_1` to `distinct_3` (by tokens), `self_similarity`, `length` (tokens), `finished` (share that came to
        an end), `examples`, `prompts`, `too_long` (prompts that leave no room for an answer, if any),
        `samples_per_prompt`, `sampling`, `reward_models`.
    """
    if not rewards:
        raise UserError("rewards: none is given; name one or more")
    # Before anything is sampled: a reward that is not there is told at once.
    reward_models = {name: _described(name, reward) for name, reward in rewards.items()}
    sampled = sample(model, tokenizer, prompts, sampling, samples, batch_size, progress, chat, system)
    measured = measure(model, sampled.drawn, reference)
    if not all(math.isfinite(each.entropy) for each in measured):
        raise UserError("model: gives probabilities that are no numbers (nan); its weights are broken")
    scores = {name: score(reward, sampled, name if progress else None) for name, reward in rewards.items()}
    tokens = [each.tokens for each in measured]
    divergences = [each.kl for each in measured if each.kl is not None]
    texts = sampled.texts
    ids = [answer.ids for answer in sampled.answers]
    return {
        "prompts": len(sampled.prompts),
        **({"too_long": sampled.too_long} if sampled.too_long else {}),
        "samples_per_prompt": samples,
        "sampling": dataclasses.asdict(sampling),
        "reward_models": reward_models,
        **({"chat": True, "system": system} if chat else {}),
        "rewards": {name: _told(name, each, samples) for name, each in scores.items()},
        "entropy": _mean([each.entropy for each in measured], samples, over=tokens),
        "kl": _mean(divergences, samples) if divergences else None,
        **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
        "self_similarity": self_similarity(texts),
        "length": _mean([len(each) for each in ids], samples),
        "finished": sum(answer.finished for answer in sampled.answers) / len(texts),
        "examples": _examples(sampled, scores, examples),
    }


def _described(name: str, reward: Reward) -> dict[str, Any]:
    try:
        return described(reward)
    except UserError as error:
        raise UserError(f"rewards.{name}: {error}") from error


def score(reward: Reward, sampled: Sampled, shown: str | None = None) -> list[Score]:
    """The reward of each answer; ranks share the work. `shown`: what the progress bar says, if there is to be one."""
    prompts, texts = sampled.beginnings, sampled.texts
    parts = [slice(start, start + _CHUNK) for start in range(0, len(texts), _CHUNK)]
    with tqdm(total=len(texts), desc=f"scoring: {shown}", unit="text", disable=shown is None) as bar:

        def of(part: slice) -> list[Score]:
            scores = scored_by_part(reward, prompts[part], texts[part])
            bar.update(len(scores))
            return scores

        found = by_ranks(parts, of)
    return [each for part in found for each in part]


def _told(name: str, scores: Sequence[Score], samples: int) -> dict[str, Any]:
    """What the result says of one reward. Raises `UserError` where no text has a score, or one alone."""
    values = [each.value for each in scores]
    known = [value for value in values if value is not None]
    unscored = Counter(each.why.partition(" (")[0] for each in scores if each.value is None)
    if len(known) < 2:
        told = ", ".join(f"{why} {count:,}" for why, count in unscored.items())
        raise UserError(f"rewards.{name}: {len(known)} of {len(scores)} texts got a score ({told})")
    found = _mean(values, samples) | {"sd": float(np.std(known, ddof=1)), "n": len(known)}
    names = dict.fromkeys(part for each in scores for part in each.parts)
    if names:
        found["parts"] = {part: _mean([each.parts.get(part) for each in scores], samples) for part in names}
    return found | ({"unscored": dict(unscored)} if unscored else {})


def _mean(values: Sequence[float | None], samples: int, over: Sequence[int] | None = None) -> dict[str, Any]:
    """Mean of the values that there are (or their sum over that of `over`), and its interval over prompts."""
    there = [value is not None for value in values]
    totals = np.asarray([value or 0.0 for value in values], float).reshape(-1, samples).sum(1)
    counts = np.asarray(there if over is None else over, float).reshape(-1, samples).sum(1)
    totals, counts = totals[counts > 0], counts[counts > 0]
    return {"mean": float(totals.sum() / counts.sum()), "interval": ratio_interval(totals, counts)}


def _examples(sampled: Sampled, scores: Mapping[str, list[Score]], count: int) -> list[dict[str, Any]]:
    texts = sampled.texts
    firsts = range(0, len(sampled.answers), sampled.samples)[:count]
    return [
        {
            "prompt": sampled.prompts[first // sampled.samples],
            "completion": texts[first],
            "rewards": {name: each[first].value for name, each in scores.items()},
        }
        for first in firsts
    ]
