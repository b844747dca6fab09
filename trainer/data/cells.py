"""The cells of a row: text or messages, checked; and where two dialogues part into prompt and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from trainer.provenance import sha256_text
from trainer.schema import Message, Text, UserError

_ROLES = get_args(get_type_hints(Message)["role"])


class EmptyCompletion(UserError):
    """A completion with nothing in it, which `empty: drop` leaves out."""


class BrokenRow(UserError):
    """A row whose cells do not hold what they should, which `broken: drop` leaves out."""


def text_or_turns(value: Any, origin: str, column: str, empty: bool = False) -> str | list[Message]:
    """A cell that should be text or messages; an empty one is refused unless `empty`."""
    if isinstance(value, str):
        if not value.strip() and not empty:
            raise EmptyCompletion(
                f"{origin}: column {column!r} is empty; give a completion, or set empty to drop"
            )
        return value
    if value is None:
        raise BrokenRow(f"{origin}: column {column!r} is missing or null; it should hold text or messages")
    turns = messages(value, origin, column)
    if not empty:
        check_answer(turns, origin, column)
    return turns


def yes_or_no(value: Any, origin: str, column: str) -> bool:
    """A cell that says whether a completion is finished: it is, where nothing is said. CSV has words only."""
    said = {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
    if said is None or said == "":
        return True
    if not isinstance(said, bool):
        raise BrokenRow(f"{origin}: column {column!r} holds {_short(value)}; it should be true or false")
    return said


def messages(value: Any, origin: str, column: str) -> list[Message]:
    """A cell that should be a list of messages; keys other than role and content are left out."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BrokenRow(
            f"{origin}: column {column!r} holds {_short(value)}; it should be text or a list of messages"
        )
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise BrokenRow(
                f"{origin}: column {column!r} has the turn {_short(turn)}; it should have role and "
                f"content, as text"
            )
        if turn.get("role") not in _ROLES:
            raise BrokenRow(
                f"{origin}: column {column!r} has the role {_short(turn.get('role'))}; it should be "
                f"one of {', '.join(_ROLES)}"
            )
        turns.append({"role": turn["role"], "content": turn["content"]})
    return turns


def check_answer(turns: Sequence[Message], origin: str, column: str) -> None:
    """The last turn is the assistant's and says something."""
    if turns[-1]["role"] != "assistant":
        raise BrokenRow(
            f"{origin}: column {column!r} ends with {turns[-1]['role']!r}; the last should be 'assistant'"
        )
    if not turns[-1]["content"].strip():
        raise EmptyCompletion(
            f"{origin}: column {column!r} ends with an empty answer; give a completion, or set empty to drop"
        )


def check_earlier_answers(prompt: Text, origin: str) -> None:
    """Each of the assistant's turns in a prompt says something, where they are to be learned."""
    turns = [] if isinstance(prompt, str) else prompt
    for number, turn in enumerate(turns, start=1):
        if number > 1 and turn["role"] == "assistant" and not turn["content"].strip():
            raise EmptyCompletion(
                f"{origin}: turn {number} is an empty answer, and scored_turns is all; give its words, set scored_turns"
                " to last, or set empty to drop"
            )


def part_plain(
    chosen: str, rejected: str, prompt_ends: str, origin: str, columns: tuple[str, str]
) -> tuple[str, str, str] | None:
    """Prompt and the two answers, behind the last `prompt_ends`; None where the dialogues' prompts differ.

    Raises:
        EmptyCompletion: nothing stands behind it in one of `columns`.
    """
    ends = [text.rfind(prompt_ends) for text in (chosen, rejected)]
    if ends[0] < 0 or ends[0] != ends[1]:
        return None
    cut = ends[0] + len(prompt_ends)
    if chosen[:cut] != rejected[:cut]:
        return None
    for name, answer in zip(columns, (chosen[cut:], rejected[cut:]), strict=True):
        if not answer.strip():
            raise EmptyCompletion(
                f"{origin}: column {name!r} has nothing after {prompt_ends!r}; set empty to drop such rows"
            )
    return chosen[:cut], chosen[cut:], rejected[cut:]


def part_turns(
    prompt: Text | None, chosen: Sequence[Message], rejected: Sequence[Message], origin: str, column: str
) -> tuple[list[Message], list[Message], list[Message]] | None:
    """Prompt and the two answers, one turn each; None where the dialogues part before the last turn.

    Raises:
        UserError: the column `column` says another prompt than the turns that the dialogues share.
    """
    if prompt is not None and not isinstance(prompt, str):
        given = list(prompt)
        whole = list(chosen[: len(given)]) == list(rejected[: len(given)]) == given
        start = len(given) if whole else 0
    else:
        start = _shared_turns(chosen, rejected)
        given = list(chosen[:start])
        if prompt is not None:
            _check_prompt(prompt, given, origin, column)
            given = given or [{"role": "user", "content": prompt}]
    answers = list(chosen[start:]), list(rejected[start:])
    if not given or len(answers[0]) != 1 or len(answers[1]) != 1:
        return None
    return given, *answers


def _check_prompt(prompt: str, shared: Sequence[Message], origin: str, column: str) -> None:
    """A prompt in words beside shared turns is what one of them says, or all together."""
    said = [turn["content"].strip() for turn in shared]
    if said and prompt.strip() and prompt.strip() not in (*said, "\n".join(said)):
        raise BrokenRow(
            f"{origin}: column {column!r} holds {_short(prompt)}, but chosen and rejected share other first "
            f"turns ({_short(said[-1])}); they should say the same, or leave the column out"
        )


def _shared_turns(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many first turns are the same; the last turn of either is never the prompt's."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def digest(*parts: Text) -> str:
    """SHA-256 over texts or messages."""
    return sha256_text(
        *(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)
    )
