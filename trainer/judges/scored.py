"""A judge by transformers: which of the choices the model holds for the likeliest after the question."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device

from trainer.data.layout import packed_row
from trainer.data.tokenize import tokenize_prompt
from trainer.judges import Choice, Judge, Question
from trainer.judges.asking import defused, turns
from trainer.policy.load import PolicyConfig, fingerprint, load_frozen, load_tokenizer, saved_policy
from trainer.policy.logprobs import completion_logps
from trainer.policy.packed_rows import PackedRows
from trainer.schema import StepShare, SupervisedBatch, UserError


class TransformersJudge(Judge):
    """Scores every choice by its log-prob after the question, which is computed once for all of them.

    A choice's probability is that of its letters with and without a space before them, and the choices' sum to 1; what
    they summed to before is a choice's `mass`.

    Args:
        model: folder of a causal language model, or its id on the hub (asks for the network). Default: what the adapter
            names.
        adapter: an adapter on it: a run's folder, a checkpoint, a PEFT folder.
        chat: put questions through the tokenizer's chat template; by default where it has one.
        batch_size: questions scored at once.
        dtype: of the model's weights.
        device: cpu, cuda, ... Default: cuda where there is one.
        revision: branch, tag or commit of a hub model.
        offline: refuse the network.
        trust_remote_code: run code that comes with a hub model.

    Raises:
        UserError: no such model or adapter; a chat where there is no template.
    """

    def __init__(
        self,
        model: str | None = None,
        adapter: str | None = None,
        chat: bool | None = None,
        batch_size: int = 8,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        if model is None and adapter is None:
            raise UserError("judge.model: is missing; give a model's folder or hub id, or an adapter")
        if batch_size < 1:
            raise UserError(f"judge.batch_size: {batch_size} is not possible; give 1 or more")
        self.model, self.adapter, self.chat, self.batch_size, self.device = (
            model, adapter, chat, batch_size, device,
        )  # fmt: skip
        self._loaded: Callable[[], tuple[Any, Any]] | None = None
        self._settings: dict[str, Any] = {
            "dtype": dtype,
            "revision": revision,
            "offline": offline,
            "trust_remote_code": trust_remote_code,
        }

    @classmethod
    def sharing(
        cls, config: PolicyConfig, loaded: Callable[[], tuple[Any, Any]], batch_size: int = 8
    ) -> TransformersJudge:
        """A judge by a model that another has, with its weights: `loaded` gives it and its tokenizer."""
        made = cls(
            config.base, chat=True, batch_size=batch_size, dtype=config.dtype, revision=config.revision
        )  # type: ignore[arg-type]
        made._config, made._loaded = config, loaded
        return made

    def choose(self, questions: Sequence[Question]) -> Iterator[list[Choice]]:
        """The choices, a batch at a time, questions of like length together."""
        added = self._tokenizer.added_tokens_decoder.values()
        marks = {*self._tokenizer.all_special_tokens, *(str(each) for each in added if each.special)}
        asked = [self._asked(defused(question, marks)) for question in questions]
        asked.sort(key=lambda each: (each.question.choices, len(each.prompt), each.question.key))
        for choices, group in itertools.groupby(asked, key=lambda each: each.question.choices):
            ways = [(i, ids) for i, choice in enumerate(choices) for ids in self._ways(choice)]
            room = self._positions - max(len(ids) for _, ids in ways)
            while batch := list(itertools.islice(group, self.batch_size)):
                fits = [each for each in batch if len(each.prompt) <= room]
                long = [each for each in batch if len(each.prompt) > room]
                yield [_too_long(each, room) for each in long] + (self._scored(fits, ways) if fits else [])

    def describe(self) -> dict[str, Any]:
        with _as_judges():
            weights = fingerprint(self._config)
        start = weights["start"] and weights["start"]["files"]
        settings = {name: self._settings[name] for name in ("dtype", "revision")}
        digests = {"base": weights["base"]["digest"], "adapter": start}
        return {
            "class": type(self).__name__,
            "model": self._config.base,
            **digests,
            **settings,
            "chat": self._is_chat,
        }

    def _asked(self, question: Question) -> _Asked:
        text = turns(question.text) if self._is_chat else question.text
        return _Asked(question, tokenize_prompt(text, self._tokenizer, f"judge's question {question.key}"))

    def _ways(self, choice: str) -> list[list[int]]:
        """How a choice may be written, as token ids: with a space before it or without."""
        found = [self._tokenizer.encode(text, add_special_tokens=False) for text in (choice, " " + choice)]
        return [ids for number, ids in enumerate(found) if ids not in found[:number]]

    @torch.no_grad()
    def _scored(self, asked: Sequence[_Asked], ways: Sequence[tuple[int, list[int]]]) -> list[Choice]:
        """A choice for each question, from one forward over all of them."""
        rows = packed_row([(each.prompt, [ids for _, ids in ways]) for each in asked])
        batch = SupervisedBatch(rows, [each.question.key for each in asked], StepShare(0.0, 0.0, True))
        batch = move_data_to_device(batch, self._policy.device)
        self._rows.try_on(self._policy, batch, lambda here: here)
        sums, _ = completion_logps(self._policy, self._rows.understood(batch).rows)
        table = sums.reshape(len(ways), len(asked)).double().cpu()
        choices = asked[0].question.choices
        owners = torch.tensor([i for i, _ in ways])
        scores = torch.stack([table[owners == i].logsumexp(0) for i in range(len(choices))])
        shares, masses = scores.softmax(0).t().tolist(), scores.logsumexp(0).exp().clamp(max=1.0).tolist()
        return [_chosen(each.question, *own) for each, *own in zip(asked, shares, masses, strict=True)]

    @property
    def _is_chat(self) -> bool:
        return bool(self._tokenizer.chat_template) if self.chat is None else self.chat

    @functools.cached_property
    def _config(self) -> PolicyConfig:
        if self.adapter is not None:
            return saved_policy(self.adapter, self.model, **self._settings)
        assert self.model is not None
        return PolicyConfig(self.model, adapter=None, **self._settings)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        if self._loaded is not None:
            return self._loaded()[1]
        with _as_judges():
            config = self._config
            return load_tokenizer(config.base, config.revision, config.offline, config.trust_remote_code)

    @functools.cached_property
    def _policy(self) -> Any:
        if self._loaded is not None:
            return self._loaded()[0]
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            return load_frozen(self._config).to(device)  # type: ignore[arg-type]
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"judge.device: {self.device} is no device here ({error}); give cpu") from error

    @functools.cached_property
    def _rows(self) -> PackedRows:
        return PackedRows(self._config.base, self._tokenizer.pad_token_id)

    @property
    def _positions(self) -> int:
        return getattr(self._policy.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


@contextlib.contextmanager
def _as_judges() -> Iterator[None]:
    """What is said of a policy's base, of the judge's model."""
    try:
        yield
    except UserError as error:
        said = str(error)
        if not said.startswith("policy.base:"):
            raise
        raise UserError(f"judge.model:{said.removeprefix('policy.base:')}") from error


class _Asked(NamedTuple):
    question: Question
    prompt: list[int]


def _chosen(question: Question, shares: list[float], mass: float) -> Choice:
    if not all(map(math.isfinite, shares)):
        return Choice(question.key, None, "the model's log-probs are not finite")
    best = max(range(len(shares)), key=lambda i: shares[i])
    return Choice(question.key, question.choices[best], probabilities=tuple(shares), mass=mass)


def _too_long(asked: _Asked, room: int) -> Choice:
    told = f"the question has {len(asked.prompt)} tokens; the judge has room for {room}"
    return Choice(asked.question.key, None, told)
