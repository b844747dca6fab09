"""A client of OpenAI-compatible servers (llama.cpp's, vLLM's, any): completions and chat, with limits on everything."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from typing import Any, TypedDict

import httpx
import tenacity

from trainer.schema import Message, UserError

_MOST_BYTES = 64 * 2**20
_LONGEST_WAIT = 30.0
_AGAIN = (408, 409, 425, 429)
"""What a server says where the same request may do better later; so does every 5xx."""


class ServerDown(UserError):
    """No answer after all attempts: no connection, too slow, too busy, or broken."""

    retry_after: float | None = None
    """Seconds that the server asks to wait."""


class ServerNonsense(UserError):
    """Answers, after all attempts none that an OpenAI-compatible server would give."""


class Refused(UserError):
    """Does not take this request: it is too long, say, or has a setting that the server does not know."""


class Answer(TypedDict):
    """One text of a server. `top`: log-probs (nats) of the first token's likeliest, where asked for and given."""

    text: str
    finish_reason: str | None
    top: dict[str, float] | None


class Server:
    """Asks one model of one server; may be used by several threads at once.

    Args:
        url: where the API begins, such as `http://localhost:8080/v1`.
        model: the model's name there.
        key_variable: environment variable that holds the API key. The key itself stands in no config, log or message.
        timeout: seconds from a request to the end of its answer.
        attempts: how often a request is sent where a server is down, busy, slow or answers nonsense.
        wait: seconds before the second attempt; doubled for each further one, at most 30, or as the server asks.

    Raises:
        UserError: a setting that cannot work, or a key variable that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        wait: float = 1.0,
    ) -> None:
        self.url, self.model, self.key_variable = _checked(url), model, key_variable
        if not model:
            raise UserError(f"server {self.url}: model is empty; give the name that the server knows it by")
        for name, value, right in (
            ("timeout", timeout, "seconds above 0"),
            ("wait", wait, "seconds above 0"),
        ):
            if not 0 < value < float("inf"):
                raise UserError(f"server {self.url}: {name} is {value}; give {right}")
        if attempts < 1:
            raise UserError(f"server {self.url}: attempts is {attempts}; give 1 or more")
        self.timeout, self.attempts, self.wait = timeout, attempts, wait
        self.interrupted = threading.Event()
        """Set it, and nothing is asked a second time: what is under way ends soon."""
        self._key = _key(key_variable, self.url)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A proxy of the environment is for the network; what runs on this machine is asked directly.
        try:
            self._client = httpx.Client(headers=headers, timeout=timeout, trust_env=not _is_here(self.url))
        except (ImportError, ValueError) as error:
            raise UserError(
                f"server {self.url}: the proxy of the environment does not work ({error})"
            ) from error

    def complete(
        self,
        prompt: str,
        n: int = 1,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        logprobs: int | None = None,
        **more: Any,
    ) -> list[Answer]:
        """`n` continuations of a text. `logprobs`: of so many tokens; `more` goes into the request as it is.

        Raises:
            ServerDown: no answer after all attempts.
            ServerNonsense: no sensible answer after all attempts.
            UserError: the server refuses the request (a wrong key, no such model, ...).
        """
        body = {"prompt": prompt, "logprobs": logprobs} | _common(
            n, max_tokens, temperature, top_p, seed, stop
        )
        return self._answers("completions", body | more, n)

    def chat(
        self,
        messages: Sequence[Message],
        n: int = 1,
        max_tokens: int = 16,
        temperature: float = 1.0,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        logprobs: int | None = None,
        **more: Any,
    ) -> list[Answer]:
        """`n` answers to the turns of a chat; the rest as for `complete`."""
        body: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        if logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": logprobs}
        return self._answers(
            "chat/completions", body | _common(n, max_tokens, temperature, top_p, seed, stop) | more, n
        )

    def describe(self) -> dict[str, Any]:
        """What its answers follow from, as plain JSON: nothing of the key."""
        return {"url": self.url, "model": self.model}

    def close(self) -> None:
        self._client.close()

    def _answers(self, path: str, body: dict[str, Any], n: int) -> list[Answer]:
        sent = {"model": self.model} | {name: value for name, value in body.items() if value is not None}
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_when_event_set(self.interrupted),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(self.interrupted),
            retry=tenacity.retry_if_exception_type((ServerDown, ServerNonsense)),
            reraise=True,
        )
        return retrying(lambda: self._ask(path, sent, n))  # type: ignore[no-any-return]

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: what the server asks for, or twice as long each time."""
        error = state.outcome.exception() if state.outcome else None
        asked = getattr(error, "retry_after", None)
        return float(min(asked or self.wait * 2 ** (state.attempt_number - 1), _LONGEST_WAIT))

    def _ask(self, path: str, body: dict[str, Any], n: int) -> list[Answer]:
        where = f"{self.url}/{path}"
        try:
            status, headers, raw = self._post(where, body)
        except httpx.TimeoutException as error:
            raise ServerDown(
                f"{where}: no answer within {self.timeout:g} s; raise timeout, or look at the server"
            ) from error
        except httpx.DecodingError as error:
            raise ServerNonsense(f"{where}: answers with broken bytes ({self._line(str(error))})") from error
        except httpx.RequestError as error:
            raise ServerDown(
                f"{where}: cannot be reached ({self._line(str(error))}); is the server up, and the url right?"
            ) from error
        if status != 200:
            raise self._refusal(where, status, headers, raw)
        try:
            answers = [_answer(choice) for choice in json.loads(raw)["choices"]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            told = self._line(raw.decode("utf-8", "replace"))
            raise ServerNonsense(f"{where}: answers what is no OpenAI-compatible answer: {told}") from error
        if len(answers) != n:
            raise ServerNonsense(f"{where}: gave {len(answers)} texts where {n} were asked for")
        return answers

    def _post(self, where: str, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and content; a server that drips its answer has no longer than one that is silent."""
        end = time.monotonic() + self.timeout
        raw = b""
        with self._client.stream("POST", where, json=body) as response:
            for block in response.iter_bytes():
                raw += block
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the answer takes too long")
                if len(raw) > _MOST_BYTES:
                    raise ServerNonsense(f"{where}: answers with more than {_MOST_BYTES >> 20} MB")
        return response.status_code, response.headers, raw

    def _refusal(self, where: str, status: int, headers: httpx.Headers, raw: bytes) -> UserError:
        told = f"{where}: status {status} ({self._line(_message(raw))})"
        if status in _AGAIN or status >= 500:
            down = ServerDown(told)
            down.retry_after = _seconds(headers.get("retry-after"))
            return down
        if status in (401, 403):
            named = self.key_variable or "none is given: set key_variable to the variable that holds it"
            return UserError(f"{told}; the API key is wrong or missing ({named})")
        if status == 404:
            return UserError(
                f"{told}; the url should be where the API begins (it mostly ends in /v1), and the model known"
            )
        return Refused(told)

    def _line(self, text: str) -> str:
        """One short line, without the key, which some servers say back."""
        if self._key:
            text = text.replace(self._key, "[key]")
        line = _whole(" ".join(text.split()) or "nothing")
        return line if len(line) <= 200 else line[:197] + "..."


def _common(
    n: int,
    max_tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    stop: Sequence[str] | None,
) -> dict[str, Any]:
    # One text is what every server gives unasked; some do not know `n`.
    several = {"n": n} if n != 1 else {}
    chosen = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    return several | chosen | {"stop": list(stop) if stop else None}


def _answer(choice: dict[str, Any]) -> Answer:
    """One of a server's `choices`, of a completion or of a chat."""
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, str | None):
        raise TypeError(f"a text is {type(text).__name__}")
    return {
        "text": _whole(text or ""),
        "finish_reason": choice.get("finish_reason"),
        "top": _top(choice.get("logprobs")),
    }


def _whole(text: str) -> str:
    """JSON can hold half a character (a lone surrogate), a file of UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _top(logprobs: dict[str, Any] | None) -> dict[str, float] | None:
    """The first token's likeliest tokens, in either of the two forms that servers have."""
    if not logprobs:
        return None
    if content := logprobs.get("content"):
        return {each["token"]: float(each["logprob"]) for each in content[0].get("top_logprobs") or ()}
    return {token: float(value) for token, value in ((logprobs.get("top_logprobs") or [{}])[0] or {}).items()}


def _message(raw: bytes) -> str:
    """What a server says of its error, in its JSON or as plain text."""
    text = raw.decode("utf-8", "replace")
    try:
        said = json.loads(text)
        error = said.get("error", said.get("message", text))
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, AttributeError, RecursionError):
        return text


def _seconds(value: str | None) -> float | None:
    return float(value) if value and value.isdecimal() else None


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        told = "is no address" if "@" in url else error
        raise UserError(f"server url: {told}; give one such as http://localhost:8080/v1") from error
    if parsed.userinfo or parsed.query or "@" in url:
        raise UserError("server url: has a password or a query in it; give the key by key_variable")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"server url {url!r}: is no http address; give one such as http://localhost:8080/v1")
    return url.rstrip("/")


def _key(variable: str | None, url: str) -> str | None:
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        # It may be the key itself, which is not to be seen in a log.
        raise UserError(
            f"server {url}: key_variable is no variable's name; give one such as OPENAI_API_KEY, not the key itself"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"server {url}: key_variable names {variable}, which is not set; export {variable}=..."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"server {url}: what {variable} holds is no API key; it has other than plain letters")
    return key


def _is_here(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
