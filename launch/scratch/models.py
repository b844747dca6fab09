"""What is trained from scratch: a byte-level BPE tokenizer, a GPT-2 that writes, a DistilBERT that classifies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from trainer.schema import UserError

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Args:
        vocabulary: tokens, at most; few texts give fewer.
        width: of the hidden states.
        layers: of the transformer.
        heads: of its attention; width is a multiple of it.
        positions: the longest text in tokens.
        dropout: while it is trained.
    """

    vocabulary: int = 4096
    width: int = 128
    layers: int = 4
    heads: int = 4
    positions: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise UserError(
                f"shape: width {self.width}, layers {self.layers} and heads {self.heads} make no model; width should be"
                " a multiple of heads, all of them 1 or more"
            )
        if self.vocabulary < 300 or self.positions < 4:
            raise UserError(
                f"shape: vocabulary {self.vocabulary} and positions {self.positions}; they should be at least 300"
                " (all bytes and some words) and 4"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"shape.dropout: {self.dropout}; it should be from 0 up to below 1")


def tokenizer_of(
    texts: Iterable[str], shape: Shape, lowercase: bool = False, marks: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that has learned these texts' words; it writes BOS before a text, as Llama's does.

    `lowercase`: a word is the same with a capital and at a text's beginning, which few texts are better learned with.
    `marks`: further special tokens, of a chat template.
    """
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=lowercase)
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    made.decoder = decoders.ByteLevel()
    learning = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[*SPECIAL.values(), *marks],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, learning)
    bos = made.token_to_id(SPECIAL["bos_token"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=shape.positions,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(marks) or None,
        **SPECIAL,
    )


def generator_of(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 with random weights; its generation settings name the stop token and nothing else."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=shape.positions,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        **ids,
    )
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def classifier_of(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, labels: Sequence[str]
) -> DistilBertForSequenceClassification:
    """A DistilBERT with random weights and an output for each label."""
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=shape.width,
        hidden_dim=4 * shape.width,
        n_layers=shape.layers,
        n_heads=shape.heads,
        max_position_embeddings=shape.positions,
        dropout=shape.dropout,
        attention_dropout=shape.dropout,
        seq_classif_dropout=shape.dropout,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return DistilBertForSequenceClassification(config)
