"""Continuations from an OpenAI-compatible server (vLLM's, llama.cpp's, any), where people outgrow one machine."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from trainer.generation import Sampling, of_this_rank
from trainer.judges import Judge
from trainer.judges.served import ServerJudge
from trainer.pairs.continuations import Continuation, Continued, Generator, chat_turns, check_system
from trainer.pairs.prompts import Prompt
from trainer.policy.load import load_tokenizer
from trainer.provenance import sha256_text
from trainer.schema import UserError
from trainer.server import Answer, Refused, Server, ServerNonsense

_PLAIN = Prompt("plain", "The")
"""What a server that works continues."""


class ServerGenerator(Generator):
    """Asks a server for each continuation by itself, many at once, with a seed of its own.

    A server that is down ends the work, with what came before kept. A request that it refuses, or answers with nonsense
    to the last attempt, is an invalid continuation: counted, never in a pair. Where the first prompts get nothing else,
    a plain word is asked for with the same settings: if that is refused, too, the work ends.

    Args:
        url: where the API begins, such as http://localhost:8000/v1.
        model: the model's name there.
        tokenizer: folder or hub id of the model's tokenizer: cuts prompts to tokens and counts those of texts. Without
            it lengths are in words.
        chat: ask /chat/completions, each prompt a user's turn; else /completions, which go on from it.
        system: a system turn before it; needs chat.
        bos: what is sent where a prompt is empty, such as <|endoftext|>: most servers refuse nothing at all.
        parallel: requests under way at once.
        batch_size: texts between two writes.
        key_variable: environment variable that holds the API key.
        timeout: seconds from a request to the end of its answer.
        attempts: how often a request is sent where the server is down, busy, slow or answers nonsense.
        wait: seconds before the second attempt; doubled for each further one.
        offline: refuse the network for the tokenizer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str | None = None,
        bos: str = "",
        parallel: int = 16,
        batch_size: int = 64,
        key_variable: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        wait: float = 1.0,
        offline: bool = False,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        check_system(chat, system, "ServerGenerator")
        if chat and bos:
            raise UserError("ServerGenerator.bos: has no effect with chat: true; leave it out")
        for name, value in (("parallel", parallel), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"ServerGenerator.{name}: {value} is not possible; give 1 or more")
        self.url, self.model, self.tokenizer, self.bos = url, model, tokenizer, bos
        self.parallel, self.batch_size, self.offline = parallel, batch_size, offline
        self.key_variable, self.timeout, self.attempts, self.wait = key_variable, timeout, attempts, wait
        self.chat, self.system = chat, system

    @override
    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        own = of_this_rank(list(prompts))
        server = Server(self.url, self.model, self.key_variable, self.timeout, self.attempts, self.wait)
        together = max(self.batch_size // n, 1)
        pool = ThreadPoolExecutor(self.parallel)
        usable = False
        held: Continued = []
        try:
            for start in range(0, len(own), together):
                batch = own[start : start + together]
                asked = [(prompt, number) for prompt in batch for number in range(n)]
                answers = list(pool.map(lambda each: self._ask(server, sampling, *each), asked))
                # Tokens are counted here: a tokenizer is for one thread.
                texts = [self._continuation(answer) for answer in answers]
                usable = usable or not all(text.invalid for text in texts)
                held += [(prompt, texts[i * n : (i + 1) * n]) for i, prompt in enumerate(batch)]
                # Prompts may be at fault by themselves; a word that no one can refuse says whether the server is.
                if not usable and (len(held) > 1 or start + together >= len(own)):
                    if isinstance(self._ask(server, sampling, _PLAIN, 0), str):
                        raise UserError(f"not one of {len(held) * n} answers is usable: {texts[0].invalid}")
                    usable = True
                if usable:
                    yield held
                    held = []
        finally:
            # Those under way are waited for, but ask no second time.
            server.interrupted.set()
            pool.shutdown(cancel_futures=True)
            server.close()

    @override
    def tokenizer_of(self) -> PreTrainedTokenizerBase | None:
        return self._tokenizer

    @override
    def describe(self) -> dict[str, Any]:
        """The model's name and the tokenizer's; where the server stands makes no other texts."""
        return {
            "class": type(self).__qualname__,
            "model": self.model,
            "tokenizer": self.tokenizer,
            "bos": self.bos,
            **({"chat": True, "system": self.system} if self.chat else {}),
        }

    @override
    def scorer(self, batch_size: int) -> Judge:
        """The likeliest tokens' log-probs, which the server has to give; `batch_size` is its own matter."""
        asking = (self.timeout, self.attempts, self.wait)
        return ServerJudge(
            self.url, self.model, self.key_variable, "logprobs", True, 1, 1, self.parallel, *asking
        )

    def _ask(self, server: Server, sampling: Sampling, prompt: Prompt, number: int) -> Answer | str:
        """The server's answer, or why there is none."""
        settings: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": _seed(sampling.seed, prompt.key, number),
            **({"top_k": sampling.top_k} if sampling.top_k is not None else {}),
        }
        try:
            if self.chat:
                (answer,) = server.chat(chat_turns(prompt.text, self.system), **settings)
            else:
                (answer,) = server.complete(prompt.text or self.bos, **settings)
        except (Refused, ServerNonsense) as error:
            return str(error)
        return answer

    def _continuation(self, answer: Answer | str) -> Continuation:
        if isinstance(answer, str):
            return Continuation("", 0, False, invalid=answer)
        text, finished = answer["text"], answer["finish_reason"] == "stop"
        return Continuation(text if finished else text.rstrip("\ufffd"), self._count(text), finished)

    def _count(self, text: str) -> int:
        if self._tokenizer is None:
            return len(text.split())
        return len(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    @functools.cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        return None if self.tokenizer is None else load_tokenizer(self.tokenizer, offline=self.offline)


def _seed(seed: int, key: str, number: int) -> int:
    """A seed of 31 bits for one text: some servers take no more."""
    return int(sha256_text(str(seed), key, str(number))[:15], 16) % 2**31
