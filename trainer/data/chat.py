"""Chat templates: messages -> text, and where the prompt ends and the completion begins.

Where a template refuses a system role (Gemma's does), the system text is put before the user's first turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.provenance import sha256_text
from trainer.schema import Message, UserError

MARK = "where the words stand"
"""Words that show what a chat template puts around any."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], origin: str = "prompt"
) -> str:
    """The prompt as the model is to see it, up to the point where the assistant begins to speak."""
    return _apply(tokenizer, messages, origin, add_generation_prompt=True)


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completions: Sequence[Sequence[Message]],
    origin: str = "prompt",
) -> tuple[str, list[str]]:
    """The prompt's text and that of each completion: what the template adds when the completion is there.

    Raises:
        UserError: the tokenizer has no template, the template refuses the messages, or it renders the prompt
            otherwise once a completion follows, so that no place parts the two.
    """
    opening = render_prompt(tokenizer, prompt, origin)
    closings = []
    for completion in completions:
        whole = _apply(tokenizer, [*prompt, *completion], origin, add_generation_prompt=False)
        if not whole.startswith(opening):
            raise UserError(
                f"{origin}: the tokenizer's chat template renders the prompt otherwise when an answer "
                f"follows, so the two cannot be parted; give prompt and completions as plain text"
            )
        closings.append(whole[len(opening) :])
    return opening, closings


def render_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], origin: str = "prompt"
) -> list[str]:
    """`render_prompt`'s text in pieces: up to the assistant's first turn, that turn, up to the next one, and so on.

    A turn's piece is what the template adds when the turn is there, as of `render`'s completions. There are 2 n + 1
    pieces for n turns of the assistant; one that nothing stands before is no answer, and not counted.

    Raises:
        UserError: the template renders a part of the chat otherwise when more follows, so that no place parts them.
    """
    answers = [n for n, turn in enumerate(prompt) if n and turn["role"] == "assistant"]
    parts = [(end, end == n) for n in answers for end in (n, n + 1)]
    pieces, done, before = [], "", 0
    for end, opens in [*parts, (len(prompt), True)]:
        text = _apply(tokenizer, prompt[:end], origin, add_generation_prompt=opens)
        if not text.startswith(done):
            raise UserError(
                f"{origin}: the tokenizer's chat template renders the first {before} turns otherwise when more"
                " follows, so that earlier answers cannot be told from what is around them; set scored_turns to last"
            )
        pieces.append(text[len(done) :])
        done, before = text, end
    return pieces


def template_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what renders a chat: the template, and the tokens of begin and end that it may write.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    _require_template(tokenizer, "chat")
    template = tokenizer.get_chat_template()
    return sha256_text(template, str(tokenizer.bos_token), str(tokenizer.eos_token))


def bare_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], drawn: str, origin: str = "prompt"
) -> str:
    """The words of an answer that was drawn behind a rendered prompt, without what the template puts around them.

    Rendered again they give what was drawn: Llama-2's template writes a space before and behind an answer, and a model
    that has learned from it draws both.
    """
    _, (sample,) = render(tokenizer, prompt, [[{"role": "assistant", "content": MARK}]], origin)
    before, _, after = sample.partition(MARK)
    after = after.partition(tokenizer.eos_token)[0] if isinstance(tokenizer.eos_token, str) else after
    return drawn.removeprefix(before).removesuffix(after)


def _require_template(tokenizer: PreTrainedTokenizerBase, origin: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{origin}: holds chat messages, but the tokenizer of {tokenizer.name_or_path or 'the model'} "
            f"has no chat template; use a chat model's tokenizer, or give plain text"
        )


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], origin: str, add_generation_prompt: bool
) -> str:
    _require_template(tokenizer, origin)
    if not messages:
        raise UserError(f"{origin}: has no message in its prompt; a chat's prompt should hold at least one")
    try:
        return _rendered(tokenizer, messages, add_generation_prompt)
    except Exception as error:  # a template may run into anything that Python does
        folded = without_system(messages)
        if folded != list(messages):
            with contextlib.suppress(Exception):
                return _rendered(tokenizer, folded, add_generation_prompt)
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{origin}: the chat template refuses these messages ({roles}): {error}") from error


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    turns: list[dict[str, Any]] = [dict(message) for message in messages]
    return str(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    )


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages with a system text before the user's first turn, in it, as for models that know no such role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    first = "\n\n".join(text for each in messages[:2] if (text := each["content"].strip()))
    return [{"role": "user", "content": first}, *messages[2:]]


def chat_turns(text: str, system: str | None) -> list[Message]:
    """A user's turn, behind a system turn where there is a text for it."""
    user: Message = {"role": "user", "content": text}
    return [user] if system is None else [{"role": "system", "content": system}, user]
