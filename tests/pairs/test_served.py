"""Continuations from a real HTTP server: the same texts however many are asked for at once, and one that fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.judges.servers import ManyAtOnce
from tests.pairs.rewards import CountReward
from trainer.generation import Sampling
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import build
from trainer.pairs.prompts import TextPrompts
from trainer.pairs.served import ServerGenerator
from trainer.schema import UserError


class Completions(ManyAtOnce):
    """Completes a prompt with words that follow from it and the seed; `behaviour(body)` may do otherwise."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.behaviour = lambda body: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Completions

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, raw = self.server.behaviour(body) or (200, _completed(body))
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


def _completed(body: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps([body["prompt"], body["seed"]]).encode()).hexdigest()
    text = " " + " ".join(digest[i : i + 3] for i in range(0, 30, 3))
    finish = "stop" if int(digest[0], 16) < 8 else "length"
    return json.dumps({"choices": [{"text": text, "finish_reason": finish}]}).encode()


@pytest.fixture
def server() -> Iterator[Completions]:
    made = Completions()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_server_takes_all_that_come_at_once() -> None:
    """Also while its own thread has no turn: what was reset twice looked like a server that is gone."""
    made = Completions()
    with contextlib.closing(made.socket), contextlib.ExitStack() as held:
        for _ in range(40):
            held.enter_context(socket.create_connection(made.server_address, timeout=0.5))  # type: ignore[arg-type]


@pytest.fixture
def texts(tmp_path) -> TextPrompts:
    (tmp_path / "texts.txt").write_text("\n".join(f"beginning number {i}" for i in range(9)))
    return TextPrompts(str(tmp_path / "texts.txt"), tokens=None, part="all")


def builder(url: str, texts: TextPrompts, **settings: Any) -> BestOfN:
    generator = ServerGenerator(url, "some-model", attempts=2, wait=0.01, **settings)
    return BestOfN(generator, texts, CountReward("abc"), 4, Sampling(20, True, top_k=7, seed=5))


def candidates(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    return [each for row in rows for each in row["candidates"]]


def test_each_text_has_a_seed_of_its_own_whatever_is_asked_for_at_once(server, texts, tmp_path) -> None:
    build(builder(server.url, texts), tmp_path / "a")
    seeds = sorted(body["seed"] for body in server.asked)
    assert len(set(seeds)) == 36
    assert {(body["model"], body["max_tokens"], body["top_k"]) for body in server.asked} == {
        ("some-model", 20, 7)
    }
    server.asked.clear()
    build(builder(server.url, texts, parallel=1, batch_size=3), tmp_path / "b")
    assert sorted(body["seed"] for body in server.asked) == seeds
    files = [(tmp_path / name / "candidates.jsonl").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    found = candidates(tmp_path / "a")
    assert {each["tokens"] for each in found} == {10}, "without a tokenizer words are counted"
    assert {each["finished"] for each in found} == {True, False}


def test_a_tokenizer_counts_and_cuts(server, texts, tmp_path, tiny_gpt2) -> None:
    texts.tokens = 9
    with pytest.raises(UserError, match="need a tokenizer"):
        build(builder(server.url, texts), tmp_path / "none")
    build(builder(server.url, texts, tokenizer=str(tiny_gpt2)), tmp_path / "out")
    assert {body["prompt"] for body in server.asked} == {"beginning"}
    assert {each["tokens"] for each in candidates(tmp_path / "out")} == {40}


def test_an_empty_prompt_is_sent_as_bos(server, tmp_path) -> None:
    from trainer.pairs.prompts import NoPrompt

    build(builder(server.url, NoPrompt(2), bos="<|endoftext|>"), tmp_path / "out")  # type: ignore[arg-type]
    assert {body["prompt"] for body in server.asked} == {"<|endoftext|>"}


def test_nonsense_is_an_invalid_text_and_in_no_pair(server, texts, tmp_path) -> None:
    server.behaviour = lambda body: (200, b"{}") if body["seed"] % 4 == 0 else None
    manifest = build(builder(server.url, texts), tmp_path / "out").manifest
    bad = [each for each in candidates(tmp_path / "out") if "invalid" in each]
    assert (
        len(bad)
        == manifest["counts"]["candidates_invalid"]
        == sum(seed % 4 == 0 for seed in {body["seed"] for body in server.asked})
    )
    assert 0 < len(bad) < 36
    assert all("no OpenAI-compatible answer" in each["invalid"] and each["score"] is None for each in bad)
    texts_of_pairs = (tmp_path / "out" / "pairs.jsonl").read_text()
    assert '"chosen": ""' not in texts_of_pairs
    assert '"rejected": ""' not in texts_of_pairs


def test_a_server_that_breaks_down_ends_the_work_and_a_rerun_asks_for_the_rest(
    server, texts, tmp_path
) -> None:
    server.behaviour = lambda body: (500, b"out of memory") if len(server.asked) > 8 else None
    with pytest.raises(UserError, match=r"status 500 \(out of memory\)"):
        build(builder(server.url, texts, batch_size=4), tmp_path / "out")
    server.behaviour = lambda body: None
    server.asked.clear()
    assert build(builder(server.url, texts), tmp_path / "out").new == 7
    assert len(server.asked) == 28, "what was answered is not asked again"
    build(builder(server.url, texts), tmp_path / "whole")
    files = [(tmp_path / name / "candidates.jsonl").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_a_server_that_refuses_all_is_one_line(server, texts, tmp_path) -> None:
    server.behaviour = lambda body: (400, b'{"error": {"message": "max_tokens is too large"}}')
    with pytest.raises(UserError, match=r"not one of 36 answers is usable: .*max_tokens is too large"):
        build(builder(server.url, texts), tmp_path / "out")


def test_no_server(texts, tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        build(builder("http://127.0.0.1:9/v1", texts), tmp_path / "out")
    with pytest.raises(UserError, match=r"ServerGenerator\.parallel: 0"):
        ServerGenerator("http://127.0.0.1:9/v1", "m", parallel=0)


def test_half_a_character_does_not_stop_the_work(server, texts, tmp_path) -> None:
    server.behaviour = lambda body: (
        (200, b'{"choices": [{"text": "half \\ud83d", "finish_reason": "length"}]}')
        if body["seed"] % 4 == 0
        else None
    )
    build(builder(server.url, texts), tmp_path / "out")
    assert "half ?" in {each["text"] for each in candidates(tmp_path / "out")}


def test_one_prompt_that_is_refused_does_not_end_the_work(server, texts, tmp_path) -> None:
    made = builder(server.url, texts, batch_size=4)
    first, *_, last = (prompt.text for prompt in made.prompts().prompts)
    refused = (400, b'{"error": {"message": "the prompt is too long"}}')
    server.behaviour = lambda body: refused if body["prompt"] in (first, last) else None
    manifest = build(made, tmp_path / "out").manifest
    assert manifest["counts"]["candidates_invalid"] == 8
    bad = [each["invalid"] for each in candidates(tmp_path / "out") if "invalid" in each]
    assert all("the prompt is too long" in each for each in bad)


TOO_LONG = (400, b'{"error": {"message": "the prompt is too long"}}')


def test_a_rerun_in_which_all_that_is_left_is_refused_ends_as_the_first_run_would(
    server, texts, tmp_path
) -> None:
    """Killed before the last three prompts, which the server refuses one by one."""
    prompts = [prompt.text for prompt in builder(server.url, texts).prompts().prompts]

    def behaviour(body: dict[str, Any]) -> tuple[int, bytes] | None:
        return TOO_LONG if body["prompt"] in prompts[-3:] else None

    server.behaviour = behaviour
    whole = build(builder(server.url, texts), tmp_path / "whole").manifest
    assert whole["counts"]["dropped_invalid"] == 3
    server.behaviour = lambda body: (500, b"down") if body["prompt"] in prompts[-3:] else None
    with pytest.raises(UserError, match="status 500"):
        build(builder(server.url, texts, batch_size=4), tmp_path / "cut")
    server.behaviour = behaviour
    server.asked.clear()
    again = build(builder(server.url, texts), tmp_path / "cut")
    assert (again.new, again.missing) == (3, 0)
    assert again.manifest["counts"] == whole["counts"]
    assert [body["prompt"] for body in server.asked].count("The") == 1
    files = [(tmp_path / name / "pairs.jsonl").read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]


def test_a_rerun_at_a_server_that_refuses_everything_by_now_keeps_what_is_left(
    server, texts, tmp_path
) -> None:
    server.behaviour = lambda body: (500, b"down") if len(server.asked) > 20 else None
    with pytest.raises(UserError, match="status 500"):
        build(builder(server.url, texts, batch_size=4, parallel=1), tmp_path / "out")
    server.behaviour = lambda body: (400, b"no such setting")
    with pytest.raises(UserError, match=r"not one of 16 answers is usable: .*no such setting"):
        build(builder(server.url, texts), tmp_path / "out")
    server.behaviour = lambda body: None
    assert build(builder(server.url, texts), tmp_path / "out").manifest["counts"]["candidates_invalid"] == 0


def test_prompts_that_are_all_refused_leave_no_pair_and_the_server_s_reason(server, texts, tmp_path) -> None:
    server.behaviour = lambda body: None if body["prompt"] == "The" else TOO_LONG
    with pytest.raises(UserError, match=r"no pair is left .*dropped_invalid 9.*the prompt is too long"):
        build(builder(server.url, texts), tmp_path / "out")


def test_the_only_prompt_is_refused_by_a_server_that_refuses_all(server, tmp_path) -> None:
    (tmp_path / "texts.txt").write_text("alone")
    texts = TextPrompts(str(tmp_path / "texts.txt"), tokens=None, part="all")
    server.behaviour = lambda body: TOO_LONG
    with pytest.raises(UserError, match=r"not one of 4 answers is usable: .*too long"):
        build(builder(server.url, texts), tmp_path / "out")
    server.behaviour = lambda body: None
    assert build(builder(server.url, texts), tmp_path / "out").new == 1


def test_a_server_that_refuses_prompt_by_prompt_leaves_no_row(server, texts, tmp_path) -> None:
    server.behaviour = lambda body: (400, b"no")
    with pytest.raises(UserError, match="not one of 8 answers is usable"):
        build(builder(server.url, texts, batch_size=4), tmp_path / "out")
    server.behaviour = lambda body: None
    assert build(builder(server.url, texts), tmp_path / "out").new == 9


def test_what_ends_the_work_does_not_wait_for_other_attempts(server, texts, tmp_path) -> None:
    made = builder(server.url, texts)
    made.generator.wait, made.generator.attempts = 10.0, 3
    first = made.prompts().prompts[0].text
    server.behaviour = lambda body: (401, b"no") if body["prompt"] == first else (503, b"busy")
    begun = time.monotonic()
    with pytest.raises(UserError, match="API key is wrong"):
        build(made, tmp_path / "out")
    assert time.monotonic() - begun < 5


def test_half_a_character_in_a_refusal_does_not_stop_the_work(server, texts, tmp_path) -> None:
    half = (400, b'{"error": {"message": "cannot read \\ud83d"}}')
    server.behaviour = lambda body: half if body["seed"] % 4 == 0 else None
    build(builder(server.url, texts), tmp_path / "out")
    said = {each["invalid"] for each in candidates(tmp_path / "out") if "invalid" in each}
    assert {each[-15:] for each in said} == {"(cannot read ?)"}
