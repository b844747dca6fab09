"""Tiny random classifiers in folders: DistilBERT (pads, special tokens) and GPT-2 (looks for the last token)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from tests.tiny_models import byte_tokenizer


def distilbert(folder: Path, *, labels: tuple[str, ...] = ("NEGATIVE", "POSITIVE"), seed: int = 0) -> Path:
    tokenizer = byte_tokenizer(chat=False)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    return _saved(DistilBertForSequenceClassification, config, folder, seed, tokenizer)


def gpt2(folder: Path, *, labels: int = 2) -> Path:
    """Without a pad token, as GPT-2 itself."""
    tokenizer = byte_tokenizer(bos=False, chat=False)
    tokenizer.pad_token = None
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, num_labels=labels
    )
    return _saved(GPT2ForSequenceClassification, config, folder, 1, tokenizer)


def _saved(kind, config, folder: Path, seed: int, tokenizer) -> Path:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    model: PreTrainedModel = kind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
