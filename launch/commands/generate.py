"""`tandem generate`: answer a prompt on stdout and nothing else, or chat."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from launch.commands.parsing import add_model, command_parser
from trainer.schema import Message, Text, UserError

if TYPE_CHECKING:
    from launch.models import Answering

_LEAVE = ("/exit", "/quit")
_FORGET = "/new"


def parser() -> ArgumentParser:
    """The arguments of `tandem generate`."""
    made = command_parser(
        "generate",
        "Answer a prompt. The answer goes to stdout, everything else to stderr. An adapter that was trained"
        " with a prompt template (letters: `Repeat: ...`) gets the prompt in it; --raw leaves it out.",
    )
    made.add_argument("--prompt", type=str | None, help="What to answer; `-` reads it from stdin.")
    made.add_argument(
        "--chat", action="store_true", help="Use the chat template; without --prompt: a conversation."
    )
    made.add_argument("--system", type=str | None, help="System message of a chat.")
    made.add_argument(
        "--raw", action="store_true", help="Give the prompt as it is, without the prompt template."
    )
    add_model(made)
    sampling = made.add_argument_group("sampling")
    sampling.add_argument("--max_new_tokens", type=int, default=100, help="Longest answer, in tokens.")
    sampling.add_argument(
        "--do_sample", action="store_true", help="Sample; without it the likeliest token is taken."
    )
    sampling.add_argument(
        "--temperature", type=float, default=1.0, help="Below 1: safer, above: more varied."
    )
    sampling.add_argument("--top_k", type=int | None, help="Sample among the k likeliest tokens.")
    sampling.add_argument(
        "--top_p", type=float | None, help="Sample among the likeliest tokens of this probability."
    )
    sampling.add_argument("--seed", type=int, default=0, help="Of the sampling noise.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem generate`; returns the exit status."""
    given = parser().parse_args(list(arguments))
    if given.prompt is None and not given.chat:
        raise UserError("--prompt: give a text, or - to read it from stdin (or --chat for a conversation)")
    if given.system is not None and not given.chat:
        raise UserError("--system: has no effect without --chat")
    if given.raw and given.chat:
        raise UserError("--raw: has no effect with --chat, whose template is the tokenizer's")
    # Read before the model is loaded: a mistake in it shows at once.
    prompt = _stdin() if given.prompt == "-" else given.prompt
    if prompt is not None and not prompt:
        raise UserError("--prompt: is empty; give at least one character")
    from launch.models import answering

    ready = answering(given)
    if prompt is None:
        return converse(lambda messages: _answer(ready, messages, given), given.system)
    text: Text = [*_system(given.system), {"role": "user", "content": prompt}] if given.chat else prompt
    if not given.chat and not given.raw and ready.prompt_template:
        text = ready.prompt_template.replace("{text}", prompt)
    print(_answer(ready, text, given))
    return 0


def _answer(ready: Answering, prompt: Text, given: Namespace) -> str:
    from trainer.data.tokenize import tokenize_prompt
    from trainer.generation import Sampling, generate

    sampling = Sampling(
        max_new_tokens=given.max_new_tokens,
        do_sample=given.do_sample,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=given.seed,
    )
    ids = tokenize_prompt(prompt, ready.tokenizer, "--prompt")
    return generate(ready.model, ready.tokenizer, [ids], sampling)[0].text


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: byte {error.start} is not UTF-8; give UTF-8 text") from error


def _system(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def converse(answer: Callable[[list[Message]], str], system: str | None) -> int:
    """A conversation on the terminal that remembers its turns; ends with Ctrl-D or /exit, /new forgets."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input(), where the platform has it)

    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{_FORGET} starts over, {_LEAVE[0]} or Ctrl-D leaves", file=sys.stderr)
    history = _system(system)
    while True:
        try:
            # input() writes its prompt to stdout: only to a terminal, so that a pipe holds the answers alone.
            said = input("> " if terminal and sys.stdout.isatty() else "")
        except EOFError:
            return 0
        if said.strip() in _LEAVE:
            return 0
        if said.strip() == _FORGET:
            history = _system(system)
            continue
        if not said.strip():
            continue
        history.append({"role": "user", "content": said})
        reply = answer(history)
        history.append({"role": "assistant", "content": reply})
        print(reply, flush=True)
