"""A real HTTP server in a thread, whose answers a test writes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]] | Callable[[BaseHTTPRequestHandler], None]


class ManyAtOnce(ThreadingHTTPServer):
    """Takes all that come at once: where the machine is busy, Linux resets what is more than the usual five."""

    daemon_threads = True
    request_queue_size = 128


class Asked:
    """What came to the server: paths, bodies and headers in their order."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []


@contextlib.contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Asked]:
    """A server that answers the n-th request (from 0) with `answer(n, body)`: status and JSON, bytes, or by itself."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked.paths)
                asked.paths.append(self.path)
                asked.bodies.append(body)
                asked.headers.append(dict(self.headers))
            reply = answer(number, body)
            if callable(reply):
                reply(self)
                return
            status, content, *more = reply
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (more[0] if more else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ManyAtOnce(("127.0.0.1", 0), Handler)
    asked = Asked(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def chat(*texts: str | None, finish: str = "stop", top: dict[str, float] | None = None) -> dict[str, Any]:
    """The answer of `/chat/completions`."""
    logprobs = None
    if top is not None:
        likeliest = [{"token": token, "logprob": value} for token, value in top.items()]
        logprobs = {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": likeliest}]}
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": logprobs}
            for text in texts
        ]
    }


def completion(*texts: str, finish: str = "length", top: dict[str, float] | None = None) -> dict[str, Any]:
    """The answer of `/completions`."""
    logprobs = {"top_logprobs": [top]} if top is not None else None
    return {"choices": [{"text": text, "finish_reason": finish, "logprobs": logprobs} for text in texts]}
