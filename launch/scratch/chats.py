"""A small chat model from scratch: whole chats through a template, of which only the answers are learned."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from launch.scratch.models import Shape, generator_of, tokenizer_of
from launch.scratch.training import Learning, begin, check_seed, save, train
from trainer.data.preferences import DemonstrationFile
from trainer.data.tokenize import Limits, TokenCounts, tokenize_demonstrations
from trainer.schema import Demonstration, TokenizedDemonstration, UserError

TEMPLATE = Path(__file__).resolve().parent / "chat.jinja"
_POOL, _MEASURED = 16, 512
"""Batches whose rows are sorted by length together; chats that a model is measured on."""
_MARK, _ROLES = re.compile(r"<[^<>\s'\"{}]+>"), ("user", "model", "assistant", "system")


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What is learned, by what, and how.

    Args:
        chats: rows of `messages` (or `prompt` and `completion` as turns); the last turn is the answer. Every prompt is
            either learned from or measured on.
        template: file of the chat template (Jinja). Default: Gemma's form, which knows no system role.
        shape: the model's sizes; longer chats are left out and counted.
        learning: steps, batch size, learning rate; a batch holds whole chats.
        seed: of the weights and the order.
        threads: of the CPU.
    """

    chats: DemonstrationFile
    template: str = str(TEMPLATE)
    shape: Shape = dataclasses.field(default_factory=Shape)
    learning: Learning = dataclasses.field(default_factory=Learning)
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed, self.threads)
        if self.learning.token_dropout:
            raise UserError("learning.token_dropout: has no effect on a chat model; leave it out")
        for name in ("shortest", "longest"):
            if getattr(self.learning, name) != getattr(Learning(), name):
                raise UserError(
                    f"learning.{name}: has no effect on chats, which are learned whole; leave it out"
                )


def make_chat(settings: ChatSettings, output: Path) -> dict[str, Any]:
    """Train a chat model; returns its loss and perplexity (nats a token of the answers) on chats it has not seen."""
    template = _template(settings.template)
    parts = [settings.chats.load(split) for split in ("train", "validation")]
    learn, measure = ([each for each in part.records if isinstance(each, Demonstration)] for part in parts)
    if not learn or not measure:
        raise UserError(
            f"{settings.chats.path}: {len(learn)} chats to learn from and {len(measure)} to measure on; give more, or"
            " another chats.validation_fraction"
        )
    if plain := next((each for each in (*learn, *measure) if isinstance(each.prompt, str)), None):
        raise UserError(f"{plain.origin}: is plain text; give a chat's turns, as in a column `messages`")
    begin(settings.seed, settings.threads)
    # The roles, which the template writes, are one token each, and so are its marks.
    texts = itertools.chain((text for each in learn for text in _texts(each)), _ROLES * len(learn))
    tokenizer = tokenizer_of(texts, settings.shape, marks=list(dict.fromkeys(_MARK.findall(template))))
    tokenizer.chat_template = template
    limits, counts = Limits(settings.shape.positions, "drop"), TokenCounts()
    rows = [tokenize_demonstrations(part, tokenizer, limits, counts) for part in (learn, measure)]
    if not all(rows):
        raise UserError(
            f"{settings.chats.path}: all chats are longer than shape.positions ({settings.shape.positions} tokens);"
            " give more positions"
        )
    model = generator_of(settings.shape, tokenizer)
    steps, size = settings.learning.steps, settings.learning.batch_size
    data = (
        Answers(rows[0], steps * size, size, settings.seed),
        Answers(rows[1], min(len(rows[1]), _MEASURED), size, settings.seed + 1),
    )
    loss = train(model, tokenizer, data, settings.learning, settings.seed, in_order=True)["eval_loss"]
    figures = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 50)),
        "dropped_overlong": counts.dropped_overlong,
    }
    told = dataclasses.asdict(settings) | {"chats": settings.chats.describe()}
    save(model, tokenizer, told, parts[0].hashes, figures, output)
    return figures


def _template(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8").rstrip("\n")
        jinja2.Environment(autoescape=False).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template {path}: cannot be read as UTF-8 text ({error})") from error
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"template {path}: is no Jinja template (line {error.lineno}: {error.message})"
        ) from error
    return text


def _texts(each: Demonstration) -> Iterator[str]:
    for turns in (each.prompt, each.completion):
        assert not isinstance(turns, str)
        yield from (turn["content"] for turn in turns)


class Answers:
    """Token rows with labels at the answers alone, `count` of them: a dataset for transformers' Trainer.

    Item i follows from (seed, i) alone; in every len(rows) items each row comes once. Taken in their order, a batch of
    `size` holds rows of like length, which are less to pad, and batches of all lengths follow each other at random;
    where len(rows) is no multiple of `size`, those of a later turn may hold rows of two lengths.
    """

    labels = None

    def __init__(self, rows: Sequence[TokenizedDemonstration], count: int, size: int, seed: int) -> None:
        self.rows, self.count, self.size, self.seed = rows, count, size, seed
        self._turn, self._order = -1, np.empty(0, int)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, place = divmod(index, len(self.rows))
        if self._turn != turn:
            self._turn, self._order = turn, self._ordered(turn)
        row = self.rows[int(self._order[place])]
        prompt, answer = list(row.prompt), list(row.completion)
        # Earlier answers, where they are scored, too.
        marks = row.marks or [0] * len(prompt)
        labels = [token if mark else -100 for token, mark in zip(prompt, marks, strict=True)]
        return {"input_ids": prompt + answer, "labels": labels + answer}

    def _ordered(self, turn: int) -> Any:
        rng = np.random.default_rng([self.seed, 0, turn])
        order = rng.permutation(len(self.rows))
        lengths = np.array([len(row.prompt) + len(row.completion) for row in self.rows])
        # The permutation's pools sorted by length, cut into batches, and those of a pool shuffled.
        batches: list[Any] = []
        for start in range(0, len(order), _POOL * self.size):
            pool = order[start : start + _POOL * self.size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            found = [pool[at : at + self.size] for at in range(0, len(pool), self.size)]
            batches += [found[i] for i in rng.permutation(len(found))]
        return np.concatenate(batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.count))
