"""Trains a small generator or classifier from scratch by transformers' Trainer, and saves what loads anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from launch.scratch.models import Shape, classifier_of, generator_of, tokenizer_of
from launch.scratch.texts import Read, Texts, Windows, read, validates
from trainer.policy.folders import whole_folder
from trainer.provenance import versions, write_json
from trainer.schema import UserError

CARD = "scratch.json"
_WORDS = {"0": "NEGATIVE", "1": "POSITIVE"}
_MEASURED = 512
"""Windows that a model is measured on."""


@dataclasses.dataclass(frozen=True)
class Learning:
    """How long and how fast a model learns.

    Args:
        steps: optimizer steps.
        batch_size: windows in each.
        shortest: tokens of the shortest window.
        longest: tokens of the longest; by default all positions.
        lr: the highest learning rate, after a twentieth of the steps; it falls to 0 as a cosine does.
        weight_decay: of AdamW.
        token_dropout: share of a window's tokens that a classifier does not see, others each time.
    """

    steps: int = 600
    batch_size: int = 32
    shortest: int = 16
    longest: int | None = None
    lr: float = 2e-3
    weight_decay: float = 0.05
    token_dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1:
            raise UserError(
                f"learning: steps {self.steps} and batch_size {self.batch_size}; give 1 or more of both"
            )
        if not 0 < self.lr < math.inf or not 0 <= self.weight_decay < math.inf:
            raise UserError(
                f"learning: lr {self.lr} and weight_decay {self.weight_decay}; give more than 0, and 0 or more"
            )
        if not 0 <= self.token_dropout < 1:
            raise UserError(
                f"learning.token_dropout: {self.token_dropout}; it should be from 0 up to below 1"
            )

    def lengths(self, shape: Shape) -> tuple[int, int]:
        """The shortest and the longest window in tokens, BOS among them. Raises `UserError`."""
        longest = shape.positions if self.longest is None else self.longest
        if not 2 <= self.shortest <= longest <= shape.positions:
            raise UserError(
                f"learning: windows of {self.shortest} to {longest} tokens; they should be 2 or more, and at most"
                f" shape.positions ({shape.positions})"
            )
        return self.shortest, longest


def check_seed(seed: int, threads: int | None) -> None:
    """Raise `UserError` for a seed or number of threads that cannot be."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: {seed} is not possible; give 0 to {2**32 - 1}")
    if threads is not None and threads < 1:
        raise UserError(f"threads: {threads} is not possible; give 1 or more")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is learned, by what, and how.

    Args:
        texts: what the model learns from.
        shape: its sizes.
        learning: how long and how fast.
        seed: of the weights and windows.
        threads: of the CPU.
    """

    texts: Texts
    shape: Shape = dataclasses.field(default_factory=Shape)
    learning: Learning = dataclasses.field(default_factory=Learning)
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed, self.threads)


def make_generator(settings: Settings, output: Path) -> dict[str, Any]:
    """Train a language model on the texts; returns what it was measured at: loss (nats a token) and perplexity."""
    if settings.learning.token_dropout:
        raise UserError("learning.token_dropout: has no effect on a generator; leave it out")
    known = read(settings.texts, labelled=False)
    learn, measure = _parted(known, settings.texts)
    begin(settings.seed, settings.threads)
    tokenizer = tokenizer_of((text for text, _ in learn), settings.shape)
    model = generator_of(settings.shape, tokenizer)
    rows = [[[*ids, tokenizer.eos_token_id] for ids in _ids(part, tokenizer)] for part in (learn, measure)]
    data = _windows(settings, rows, (None, None), tokenizer)
    loss = train(model, tokenizer, data, settings.learning, settings.seed)["eval_loss"]
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 50))}
    save(model, tokenizer, dataclasses.asdict(settings), known.hashes, figures, output)
    return figures


def make_classifier(settings: Settings, output: Path) -> dict[str, Any]:
    """Train a classifier on texts and labels; returns loss and accuracy on windows of texts that it has not seen.

    Labels 0 and 1 are called NEGATIVE and POSITIVE; others are called as they stand.
    """
    known = read(settings.texts, labelled=True)
    learn, measure = _parted(known, settings.texts)
    for text, label in known:
        if not isinstance(label, str | int | float) or not str(label).strip():
            raise UserError(
                f"{settings.texts.path}: column {settings.texts.label!r} holds {str(label)[:40]!r} beside"
                f" {text[:40]!r}; it should be a number or a word"
            )
    names = sorted({str(label) for _, label in known})
    if len(names) < 2 or {str(label) for _, label in learn} != set(names):
        told = ", ".join(names)[:100]
        raise UserError(
            f"{settings.texts.path}: column {settings.texts.label!r} holds {told}; there should be two or more labels,"
            " and texts of each to learn from"
        )
    begin(settings.seed, settings.threads)
    tokenizer = tokenizer_of((text for text, _ in learn), settings.shape, lowercase=True)
    labels = [_WORDS[name] for name in names] if set(names) == set(_WORDS) else names
    model = classifier_of(settings.shape, tokenizer, labels)
    targets = [[names.index(str(label)) for _, label in part] for part in (learn, measure)]
    rows = [_ids(part, tokenizer) for part in (learn, measure)]
    data = _windows(settings, rows, (targets[0], targets[1]), tokenizer)
    found = train(model, tokenizer, data, settings.learning, settings.seed)
    figures = {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}
    save(model, tokenizer, dataclasses.asdict(settings), known.hashes, figures, output)
    return figures


def begin(seed: int, threads: int | None) -> None:
    """Seed every random number, and set the CPU's threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    set_seed(seed)


def _parted(known: Read, texts: Texts) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    measure = [row for row in known if validates(row[0], texts.validation_fraction)]
    learn = [row for row in known if not validates(row[0], texts.validation_fraction)]
    if not learn or not measure:
        raise UserError(
            f"{texts.path}: {len(known)} texts leave none to {'learn from' if measure else 'measure on'}; give more, or"
            " another texts.validation_fraction"
        )
    return learn, measure


def _ids(part: Sequence[tuple[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    # Texts are longer than the model's positions: windows are cut of them.
    return tokenizer([text for text, _ in part], add_special_tokens=False, verbose=False).input_ids


def _windows(
    settings: Settings,
    rows: Sequence[list[list[int]]],
    labels: tuple[list[int] | None, list[int] | None],
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[Windows, Windows]:
    learning, lengths = settings.learning, settings.learning.lengths(settings.shape)
    counts = (learning.steps * learning.batch_size, _MEASURED)
    learn, measure = (
        Windows(rows[i], labels[i], lengths, tokenizer.bos_token_id, counts[i], settings.seed + i)
        for i in range(2)
    )
    return learn, measure


@dataclasses.dataclass
class _Collate:
    """Windows side by side, padded; a classifier that learns does not see some of the tokens."""

    tokenizer: PreTrainedTokenizerFast
    dropout: float
    model: PreTrainedModel

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [item["input_ids"] for item in items]
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
        if isinstance(items[0]["labels"], list):
            told = torch.tensor([item["labels"] + [-100] * (width - len(item["labels"])) for item in items])
            return {"input_ids": ids, "attention_mask": mask, "labels": told}
        if self.dropout and self.model.training:
            hidden = torch.rand(ids.shape) < self.dropout
            hidden[:, 0] = False
            mask = mask.masked_fill(hidden, 0)
        labels = torch.tensor([item["labels"] for item in items])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: tuple[Any, Any],
    learning: Learning,
    seed: int,
    in_order: bool = False,
) -> dict[str, float]:
    """Train in place; what Trainer would leave (pickles among it) stays in a folder that goes.

    `in_order`: the items come in the order that they have.
    """
    labelled = data[0].labels is not None
    # Trainer's figures go to stdout, which is for the result.
    with tempfile.TemporaryDirectory() as aside, contextlib.redirect_stdout(sys.stderr):
        arguments = TrainingArguments(
            output_dir=aside,
            max_steps=learning.steps,
            per_device_train_batch_size=learning.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=learning.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, learning.steps // 20),
            weight_decay=learning.weight_decay,
            adam_beta2=0.98,
            logging_steps=max(1, learning.steps // 10),
            save_strategy="no",
            report_to=[],
            seed=seed,
            train_sampling_strategy="sequential" if in_order else "random",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            data_collator=_Collate(tokenizer, learning.token_dropout, model),
            train_dataset=data[0],
            eval_dataset=data[1],
            compute_metrics=_accuracy if labelled else None,
        )
        # Only the losses of a language model are wanted, not its logits.
        trainer.args.prediction_loss_only = not labelled
        trainer.train()
        found = trainer.evaluate()
    if not math.isfinite(found["eval_loss"]):
        raise UserError(
            f"learning.lr: {learning.lr} gave a loss of {found['eval_loss']}, and nothing is written; give a lower one"
        )
    return found


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, -1) == prediction.label_ids))}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
    hashes: dict[str, str],
    figures: dict[str, Any],
    output: Path,
) -> None:
    """Write weights, tokenizer and card, all of it or nothing."""
    card = {
        "kind": "scratch",
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "figures": figures,
        "settings": settings,
        "texts": hashes,
        "versions": versions(),
    }
    tokenizer.backend_tokenizer.no_padding()
    with whole_folder(output) as folder:
        try:
            model.cpu().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            # safetensors 0.8 and tokenizers 0.23 write in Rust, and say in words that the disk is full.
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), str(error)) from error
            raise
        write_json(folder / CARD, card)
