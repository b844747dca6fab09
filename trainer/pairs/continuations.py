"""What continues prompts: a model of this machine (or its ranks), batch by batch as the texts come."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from trainer.data.chat import chat_turns
from trainer.data.tokenize import tokenize_prompt, tokenize_prompts
from trainer.generation import Sampling, answer_batches, of_this_rank
from trainer.judges import Judge
from trainer.judges.scored import TransformersJudge
from trainer.pairs.prompts import Prompt
from trainer.policy.devices import check_device, device_named
from trainer.policy.load import PolicyConfig, fingerprint, load_frozen, load_tokenizer, saved_policy
from trainer.schema import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Continuation:
    """One text that follows a prompt: how many tokens it has, and whether it came to its end or was cut.

    `score` stands there where the texts came with one. `invalid` says what came instead of a text.
    """

    text: str
    tokens: int
    finished: bool
    score: float | None = None
    invalid: str | None = None


Continued = list[tuple[Prompt, list[Continuation]]]


class Generator(abc.ABC):
    """Continues prompts. A config names one by its `class_path`; nothing is registered anywhere."""

    @abc.abstractmethod
    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        """`n` continuations of each prompt, some prompts at a time as they come, each once.

        The texts follow from (sampling, prompt, number of the sample), whatever comes beside them. Where a process
        group is up, each rank gives those of its own share.

        Raises:
            UserError: nothing can be generated (no such model, a server that is down).
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that its texts follow from, as plain JSON."""

    def tokenizer_of(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that counts its tokens, where there is one."""
        return None

    def scorer(self, batch_size: int) -> Judge:
        """The same model as a judge, which gives its choices' probabilities; no weights are loaded a second time.

        Raises:
            UserError: its model cannot be asked for them.
        """
        raise UserError(
            f"{type(self).__qualname__}: cannot score its own texts; take trainer.pairs.continuations.LocalGenerator or"
            " trainer.pairs.served.ServerGenerator, with chat: true"
        )


class LocalGenerator(Generator):
    """A causal language model on this machine; under torchrun or srun a copy on each rank, which share the prompts.

    The texts do not depend on `batch_size`, shards or ranks in float32; in bfloat16 batches of other sizes round
    otherwise. A prompt that leaves no position for an answer has invalid ones. Nothing is loaded before the first
    prompt.

    Args:
        base: folder of a causal language model, or its id on the hub (asks for the network); by default the
            adapter's own.
        adapter: saved adapter, checkpoint or run.
        chat: each prompt is a user's turn, put through the tokenizer's chat template; else plain text to go on from.
        system: what stands before it, as a system turn where the template has one; needs chat.
        batch_size: texts generated at once; where a prompt has more continuations, it is one batch of several forwards.
        dtype: of the base's weights.
        device: cpu, cuda, ...; by default cuda where there is one.
        revision: commit, tag or branch on the hub.
        offline: refuse to use the network.
        trust_remote_code: run Python code that comes with the model.
    """

    def __init__(
        self,
        base: str | None = None,
        adapter: str | None = None,
        batch_size: int = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        check_system(chat, system, "LocalGenerator")
        if base is None and adapter is None:
            raise UserError("LocalGenerator: neither base nor adapter is given; name a model")
        if batch_size < 1:
            raise UserError(f"LocalGenerator.batch_size: {batch_size} is not possible; give 1 or more")
        # Only the name: shards that were made on a GPU may be merged where there is none.
        check_device(device, "LocalGenerator.device:")
        self.base, self.adapter, self.batch_size = base, adapter, batch_size
        self.dtype, self.device, self.revision = dtype, device, revision
        self.offline, self.trust_remote_code = offline, trust_remote_code
        self.chat, self.system = chat, system

    @override
    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        tokenizer = self._tokenizer
        if self.chat:
            rows = [
                tokenize_prompt(
                    chat_turns(prompt.text, self.system), tokenizer, f"prompt {prompt.text[:40]!r}"
                )
                for prompt in prompts
            ]
        else:
            rows = tokenize_prompts([prompt.text for prompt in prompts], tokenizer)
        long = self._too_long(rows)
        for place in of_this_rank(list(long)):
            yield [(prompts[place], [Continuation("", 0, False, invalid=long[place])] * n)]
        prompts = [prompt for place, prompt in enumerate(prompts) if place not in long]
        rows = [row for place, row in enumerate(rows) if place not in long]
        batches = answer_batches(
            self._model,
            tokenizer,
            [row for row in rows for _ in range(n)],
            sampling,
            keys=[prompt.key for prompt in prompts for _ in range(n)],
            batch_size=self.batch_size,
            together=n,
            continuing=not self.chat,
        )
        for batch in batches:
            texts = [
                Continuation(_whole(answer.text, answer.finished), len(answer.ids), answer.finished)
                for _, answer in batch
            ]
            firsts = range(0, len(batch), n)
            yield [(prompts[batch[first][0] // n], texts[first : first + n]) for first in firsts]

    def _too_long(self, rows: Sequence[list[int]]) -> dict[int, str]:
        """The prompts that leave no position for an answer, and what is said of each: one of them ends no run."""
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        told = f"tokens; the model has {room} positions for prompt and answer)"
        return {
            place: f"the prompt is too long ({len(row):,} {told}"
            for place, row in enumerate(rows)
            if room is not None and len(row) >= room
        }

    @override
    def tokenizer_of(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @override
    def describe(self) -> dict[str, Any]:
        """The weights' SHA-256 (or the hub's commit), whatever the folder is called, and their dtype."""
        made_of = fingerprint(self._policy)
        return {
            "class": type(self).__qualname__,
            "base": made_of["base"]["digest"],
            "adapter": made_of["start"] and made_of["start"]["files"],
            "dtype": self.dtype,
            **({"chat": True, "system": self.system} if self.chat else {}),
        }

    @override
    def scorer(self, batch_size: int) -> Judge:
        return TransformersJudge.sharing(self._policy, lambda: (self._model, self._tokenizer), batch_size)

    @functools.cached_property
    def _policy(self) -> PolicyConfig:
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("revision", "dtype", "offline", "trust_remote_code")
        }
        if self.adapter is not None:
            return saved_policy(self.adapter, self.base, **settings)
        assert self.base is not None
        return PolicyConfig(self.base, adapter=None, **settings)

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        policy = self._policy
        return load_tokenizer(policy.base, policy.revision, policy.offline, policy.trust_remote_code)

    @functools.cached_property
    def _model(self) -> Any:
        device = device_named(self.device, "LocalGenerator.device:")  # before weights are loaded for nothing
        model = load_frozen(self._policy).to(device)  # type: ignore[arg-type]
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight.sum(dtype=torch.float32)):
                raise UserError(
                    f"{self.adapter or self.base}: its weights are broken ({name} holds what is no number)"
                )
        return model


def as_chat(pair: dict[str, Any], system: str | None = None) -> dict[str, Any]:
    """A row of `pairs.jsonl` with prompt, chosen and rejected as turns, as they were generated."""
    answers = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    return pair | {"prompt": chat_turns(pair["prompt"], system)} | answers


def check_system(chat: bool, system: str | None, name: str) -> None:
    """Raise `UserError` for a system text that has no effect."""
    if system is not None and not chat:
        raise UserError(f"{name}.system: has no effect without chat: true; set that, or leave it out")


def _whole(text: str, finished: bool) -> str:
    """A text without the character that its end cut in two."""
    return text if finished else text.rstrip("\ufffd")
