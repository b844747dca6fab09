"""Classes that a user wrote (builders, generators, prompt sources): what goes wrong there is a line that names them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from trainer.generation import Sampling
from trainer.ledger import Row
from trainer.pairs.continuations import Continuation, Continued, Generator
from trainer.pairs.prompts import Prompt
from trainer.schema import UserError, failure

_OURS = ("trainer", "launch", "callbacks")


@contextlib.contextmanager
def naming(thing: Any, method: str) -> Iterator[None]:
    """Turn what a user's class raises into a `UserError` that names it; an error in our own stays as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_users(thing):
            raise
        raise UserError(f"{_name(thing)}.{method}: fails ({failure(error)})") from error


def is_users(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] not in _OURS


def plain(thing: Any, method: str, *given: Any) -> dict[str, Any]:
    """What a method gives, which has to be a dict in plain JSON."""
    with naming(thing, method):
        found: dict[str, Any] = getattr(thing, method)(*given)
        if is_users(thing):
            if not isinstance(found, dict):
                raise UserError(f"{_name(thing)}.{method}: gave {_short(found)}; a dict is wanted")
            json.dumps(found, allow_nan=False)
    return found


def continued(
    generator: Generator, prompts: Sequence[Prompt], n: int, sampling: Sampling
) -> Iterator[Continued]:
    """`generator.continued`, of a user's looked at batch by batch. What came before an error was given."""
    keys = {prompt.key for prompt in prompts}
    with naming(generator, "continued"):
        for batch in generator.continued(prompts, n, sampling):
            if is_users(generator) and not all(_is_continued(each, keys) for each in batch):
                raise UserError(
                    f"{_name(generator)}.continued: gave {_short(batch)}; a list of (prompt, its Continuations) is"
                    " wanted, of prompts that were asked for"
                )
            yield batch


def rows_of(builder: Any, prompts: Sequence[Prompt]) -> Iterator[list[Row]]:
    """`builder.rows`, of a user's looked at batch by batch. What came before an error was given."""
    keys = {prompt.key for prompt in prompts}
    with naming(builder, "rows"):
        for rows in builder.rows(prompts):
            if is_users(builder):
                if not all(_is_row(each, keys) for each in rows):
                    raise UserError(
                        f"{_name(builder)}.rows: gave {_short(rows)}; a list of rows is wanted, each with the key of a"
                        " prompt that was asked for and a list of candidates, whose scores are numbers or None"
                    )
                json.dumps(rows, allow_nan=False)
            yield rows


def _is_continued(found: Any, keys: set[str]) -> bool:
    prompt, texts = found
    return prompt.key in keys and all(isinstance(each, Continuation) for each in texts)


def _is_row(row: Any, keys: set[str]) -> bool:
    return (
        isinstance(row, Mapping)
        and row.get("key") in keys
        and isinstance(row.get("candidates"), Sequence)
        and all(
            isinstance(each, Mapping) and isinstance(each.get("score"), Real | None)
            for each in row["candidates"]
        )
    )


def check_pair(builder: Any, pair: Any) -> None:
    """Raises `UserError` where what a user's `pair` gave is no pair of scored candidates."""
    sides = (getattr(pair, "chosen", None), getattr(pair, "rejected", None))
    if is_users(builder) and not all(
        isinstance(each, Mapping) and isinstance(each.get("score"), Real) for each in sides
    ):
        raise UserError(
            f"{_name(builder)}.pair: gave {_short(pair)}; None or a Pair is wanted, of candidates with a score"
        )


def _name(thing: Any) -> str:
    return type(thing).__qualname__


def _short(found: Any) -> str:
    told = " ".join(repr(found).split())
    return told if len(told) <= 80 else told[:77] + "..."
