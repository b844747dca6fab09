"""The client of OpenAI-compatible servers, against real ones: well, down, slow, busy, and talking nonsense."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from tests.judges.servers import chat, completion, serving
from trainer.schema import UserError
from trainer.server import Server, ServerDown, ServerNonsense


def server(url: str, **settings) -> Server:
    return Server(url, "tiny", **{"wait": 0.01, "timeout": 5.0, **settings})


def test_completions() -> None:
    with serving(lambda n, body: (200, completion("a", "b", top={"a": -0.5}))) as asked:
        answers = server(asked.url + "/").complete("Once", n=2, max_tokens=3, seed=7, min_p=0.1, logprobs=5)
    assert answers == [{"text": text, "finish_reason": "length", "top": {"a": -0.5}} for text in ("a", "b")]
    assert asked.paths == ["/v1/completions"]
    assert asked.bodies == [
        {
            "model": "tiny", "prompt": "Once", "n": 2, "max_tokens": 3, "temperature": 1.0, "seed": 7,
            "min_p": 0.1, "logprobs": 5,
        }
    ]  # fmt: skip
    assert "Authorization" not in asked.headers[0]


def test_chat() -> None:
    turns = [{"role": "user", "content": "Well?"}]
    with serving(lambda n, body: (200, chat(None, top={"A": -0.1, "B": -2.0}))) as asked:
        (answer,) = server(asked.url).chat(turns, stop=["\n"], top_p=0.9, logprobs=2)
    assert answer == {"text": "", "finish_reason": "stop", "top": {"A": -0.1, "B": -2.0}}
    assert asked.paths == ["/v1/chat/completions"]
    assert asked.bodies[0]["messages"] == turns
    assert asked.bodies[0]["stop"] == ["\n"]
    assert (asked.bodies[0]["logprobs"], asked.bodies[0]["top_logprobs"]) == (True, 2)
    assert "n" not in asked.bodies[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_asks_again_where_a_later_try_may_help(status) -> None:
    with serving(lambda n, body: (200, completion("a")) if n == 2 else (status, {})) as asked:
        assert server(asked.url).complete("x")[0]["text"] == "a"
    assert len(asked.paths) == 3


def test_waits_as_long_as_the_server_asks() -> None:
    begun = time.monotonic()
    with serving(lambda n, body: (200, completion("a")) if n else (429, {}, {"Retry-After": "1"})) as asked:
        server(asked.url).complete("x")
    assert 1 <= time.monotonic() - begun < 5


def test_attempts_have_a_limit() -> None:
    broken = {"error": {"message": "out of\nmemory"}}
    with (
        serving(lambda n, body: (500, broken)) as asked,
        pytest.raises(ServerDown, match=r"/v1/completions: status 500 \(out of memory\)"),
    ):
        server(asked.url, attempts=3).complete("x")
    assert len(asked.paths) == 3


def test_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ServerDown, match=r"cannot be reached.*is the server up"):
            server(url, attempts=2).complete("x")


def drip(handler) -> None:
    """An answer that never ends, a byte at a time."""
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.02)


@pytest.mark.parametrize("slow", [lambda handler: time.sleep(2), drip])
def test_slow(slow) -> None:
    begun = time.monotonic()
    with serving(lambda n, body: slow) as asked:
        with pytest.raises(ServerDown, match=r"no answer within 0\.2 s"):
            server(asked.url, timeout=0.2, attempts=2).complete("x")
        assert time.monotonic() - begun < 1.5
    assert len(asked.paths) == 2


NONSENSE = [
    b"<html>It works!</html>",
    b"",
    b"[" * 100_000,
    {},
    {"choices": 3},
    {"choices": [{}]},
    {"choices": [{"text": 3}]},
    {"choices": [{"text": "a", "logprobs": {"top_logprobs": "much"}}]},
    completion("a", "b"),
    completion(),
]


@pytest.mark.parametrize("content", NONSENSE)
def test_nonsense_is_asked_again_and_then_told(content) -> None:
    with serving(lambda n, body: (200, content)) as asked, pytest.raises(ServerNonsense) as error:
        server(asked.url, attempts=2).complete("x")
    assert len(asked.paths) == 2
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_refused_is_not_asked_again(monkeypatch) -> None:
    monkeypatch.setenv("TINY_KEY", "sk-secret")
    said = {"error": {"message": "Incorrect API key provided: sk-secret"}}
    with serving(lambda n, body: (401, said)) as asked, pytest.raises(UserError, match="TINY_KEY") as error:
        server(asked.url, key_variable="TINY_KEY").complete("x")
    assert asked.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(error.value)
    assert len(asked.paths) == 1


@pytest.mark.parametrize(
    ("status", "hint"), [(404, "ends in /v1"), (400, "status 400"), (403, "key_variable")]
)
def test_refusals_say_what_to_do(status, hint) -> None:
    with serving(lambda n, body: (status, {"message": "no"})) as asked, pytest.raises(UserError, match=hint):
        server(asked.url).complete("x")
    assert len(asked.paths) == 1


def test_the_key_stands_nowhere(monkeypatch) -> None:
    monkeypatch.setenv("TINY_KEY", "sk-secret\n")
    made = Server("http://localhost:1/v1", "tiny", key_variable="TINY_KEY")
    assert "sk-secret" not in str(made.describe()) + repr(made)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "localhost:8080/v1"}, "http"),
        ({"url": "ftp://localhost"}, "http"),
        ({"url": "http://me:geheim@localhost/v1"}, "key_variable"),
        ({"model": ""}, "model is empty"),
        ({"timeout": 0}, "timeout is 0"),
        ({"attempts": 0}, "attempts is 0"),
        ({"key_variable": "NOT_SET_ANYWHERE"}, "export NOT_SET_ANYWHERE"),
    ],
)
def test_settings_that_cannot_work(settings, told) -> None:
    with pytest.raises(UserError, match=told) as error:
        Server(**{"url": "http://localhost:1/v1", "model": "tiny", **settings})
    assert "geheim" not in str(error.value)
