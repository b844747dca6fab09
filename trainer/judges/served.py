"""A judge behind an OpenAI-compatible server: llama.cpp's, vLLM's, OpenAI's, any."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

from trainer.judges import Choice, Judge, JudgeGone, Question
from trainer.judges.asking import COMMON_MARKS, defused, read_choice, turns
from trainer.schema import UserError
from trainer.server import Answer, Refused, Server, ServerDown, ServerNonsense

_TOP = 20
"""Most log-probs that OpenAI's API gives."""
_IN_A_ROW = 5
"""Questions without an answer, one after another, after which the server counts as gone."""
_REFUSALS = 24
"""Refusals without any answer, after which it is the settings that the server does not take."""


class ServerJudge(Judge):
    """Greedy answers of a served model. What is no choice is asked again, then invalid.

    Args:
        url: where the API begins, such as `http://localhost:8080/v1`.
        model: the model's name there.
        key_variable: environment variable that holds the API key.
        constrain: how the server keeps the model to the choices: `grammar` (llama.cpp's), `choice` (vLLM's),
            `logprobs` (OpenAI's and others: the likeliest choice among the first token's 20 likeliest); by default
            not at all, and the answer's words are read.
        chat: ask `/chat/completions`; false asks `/completions`, with plain text.
        max_tokens: of an answer; more for a model that thinks first.
        tries: how often a question is asked whose answer is none of the choices.
        parallel: questions under way at once.
        timeout: seconds from a request to the end of its answer.
        attempts: how often a request is sent where the server is down, busy, slow or broken.
        wait: seconds before the second of them; doubled for each further one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        constrain: Literal["grammar", "choice", "logprobs"] | None = None,
        chat: bool = True,
        max_tokens: int = 16,
        tries: int = 2,
        parallel: int = 4,
        timeout: float = 60.0,
        attempts: int = 4,
        wait: float = 1.0,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("tries", tries), ("parallel", parallel)):
            if value < 1:
                raise UserError(f"judge.{name}: {value} is not possible; give 1 or more")
        self.server = Server(url, model, key_variable, timeout, attempts, wait)
        self.constrain, self.chat, self.max_tokens = constrain, chat, max_tokens
        self.tries, self.parallel = tries, parallel

    def choose(self, questions: Sequence[Question]) -> Iterator[list[Choice]]:
        """The choices as they come. A question that gets no answer is invalid, and not `answered`.

        Raises:
            JudgeGone: several questions in a row got no answer, nor did one that no server can stumble over.
            UserError: the server wants another key, or has no such model.
        """
        coming, tally = iter(questions), _Tally()
        self.server.interrupted.clear()
        pool = ThreadPoolExecutor(self.parallel)
        under_way: dict[Future[Choice], Question] = {}
        try:
            while True:
                for question in itertools.islice(coming, self.parallel - len(under_way)):
                    asked = pool.submit(self._choice, defused(question, COMMON_MARKS))
                    under_way[asked] = question
                if not under_way:
                    break
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    if known := tally.of(done, under_way.pop(done)):
                        yield known
                self._check(tally, question)
                if len(tally.refused) >= _REFUSALS:
                    yield self._settled(tally, question, "the first")
            if len(tally.refused) >= _IN_A_ROW:
                yield self._settled(tally, question, "all")
            elif tally.refused:
                yield tally.released()
        finally:
            self.server.interrupted.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        own = {
            "constrain": self.constrain,
            "chat": self.chat,
            "max_tokens": self.max_tokens,
            "tries": self.tries,
        }
        return {"class": type(self).__name__, **self.server.describe(), **own}

    def _check(self, tally: _Tally, question: Question) -> None:
        """Raise `JudgeGone` where too many questions in a row got no answer, and a plain one gets none, either."""
        if tally.failures < _IN_A_ROW:
            return
        try:
            self._ask(_plain(question), 0)
        except (Refused, ServerDown, ServerNonsense) as error:
            told = f"{tally.error}; {tally.failures} questions in a row got no answer"
            raise JudgeGone(told) from error
        tally.failures, tally.heard = 0, True

    def _settled(self, tally: _Tally, question: Question, which: str) -> list[Choice]:
        """The refused questions' choices: too long, say. If a short one is refused, too, it is the server's fault."""
        try:
            self._ask(_plain(question), 0)
        except (Refused, ServerDown, ServerNonsense) as error:
            told = f"{tally.error}; {which} {len(tally.refused)} questions were refused"
            raise JudgeGone(told) from error
        tally.heard = True
        return tally.released()

    def _choice(self, question: Question) -> Choice:
        choice = Choice(question.key, None)
        for number in range(self.tries):
            choice = self._read(self._ask(question, number), question)
            if choice.pick is not None:
                break
        return choice

    def _ask(self, question: Question, number: int) -> Answer:
        settings: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": 0.0, "seed": number}
        if number:
            # The same question would get the same answer.
            settings["temperature"] = 1.0
        match self.constrain:
            case "grammar":
                settings["grammar"] = f"root ::= {' | '.join(map(json.dumps, question.choices))}"
            case "choice":
                # By vLLM's name of today, and by the one before 0.12.
                named = list(question.choices)
                settings |= {"structured_outputs": {"choice": named}, "guided_choice": named}
            case "logprobs":
                settings["logprobs"] = _TOP
        if self.chat:
            return self.server.chat(turns(question.text), **settings)[0]
        if not isinstance(question.text, str):
            raise UserError(
                f"judge: question {question.key} is a chat, and judge.chat is false; set it to true"
            )
        return self.server.complete(question.text, **settings)[0]

    def _read(self, answer: Answer, question: Question) -> Choice:
        if self.constrain == "logprobs" and answer["top"]:
            weights = _weights(answer["top"], question.choices)
            if mass := math.fsum(weights):
                best = max(range(len(weights)), key=lambda i: weights[i])
                shares = tuple(weight / mass for weight in weights)
                pick = question.choices[best]
                return Choice(question.key, pick, answer["text"], shares, mass=min(mass, 1.0))
            pick_in_words = read_choice(answer["text"], question.choices)
            return Choice(question.key, pick_in_words, answer["text"], mass=0.0)
        return Choice(question.key, read_choice(answer["text"], question.choices), answer["text"])


class _Tally:
    """What came of the questions so far: whether the server is there, and whether it takes any question at all."""

    def __init__(self) -> None:
        self.failures, self.heard = 0, False
        self.refused: list[Choice] = []
        self.error: UserError | None = None

    def of(self, done: Future[Choice], question: Question) -> list[Choice]:
        """The choices that are known now. A refusal is, once the server has taken another question."""
        try:
            choice = done.result()
        except (ServerDown, ServerNonsense) as error:
            self.failures, self.error = self.failures + 1, error
            return [Choice(question.key, None, str(error), answered=False)]
        except Refused as error:
            self.error, choice = error, Choice(question.key, None, str(error))
            self.refused.append(choice)
            return self.released() if self.heard else []
        self.failures, self.heard = 0, True
        return [*self.released(), choice]

    def released(self) -> list[Choice]:
        refused, self.refused = self.refused, []
        return refused


def _plain(question: Question) -> Question:
    """A question so short that a server that works answers it, whatever it says."""
    return Question(question.key, question.choices[0], question.choices)


def _weights(top: dict[str, float], choices: Sequence[str]) -> list[float]:
    """What each choice holds of the first token's probability, as far as it is among the likeliest."""
    weights = [0.0] * len(choices)
    for token, logprob in top.items():
        if token.strip() in choices and logprob <= 0:
            weights[choices.index(token.strip())] += math.exp(logprob)
    return weights
