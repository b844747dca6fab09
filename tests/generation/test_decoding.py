"""Continuations keep the space that they begin with, also where a decoder takes it off the front."""

from __future__ import annotations

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

import trainer.generation
from tests.data.tokenizers_of_kinds import KINDS
from tests.generation.test_generation import load
from trainer.data.tokenize import tokenize_demonstrations, tokenize_prompt
from trainer.decoding import Decoder
from trainer.generation import Sampling, generate
from trainer.schema import Demonstration

PROMPTS = ["the coat", "the coat ", "one two three\n", "сорок", "é"]


def metaspace() -> PreTrainedTokenizerFast:
    """As newer files of Llama-2 and Mistral have it: the space is put by a pre-tokenizer."""
    made = KINDS["llama2"]()
    made.backend_tokenizer.normalizer = None
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


MADE = {name: make() for name, make in {**KINDS, "metaspace": metaspace}.items()}


def drawn(prompt: str, text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    (made,) = tokenize_demonstrations([Demonstration(prompt, text, "id", finished=False)], tokenizer)
    return made.prompt, made.completion


@pytest.mark.parametrize("kind", sorted(MADE))
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("text", [" the coat", "the coat", "  two", "\nсорок", "é", "two "])
def test_a_continuation_s_text_has_the_tokens_that_were_drawn(kind: str, prompt: str, text: str) -> None:
    tokenizer = MADE[kind]
    before, ids = drawn(prompt, text, tokenizer)
    found = Decoder(tokenizer, continuing=True)([*ids, tokenizer.eos_token_id], before)
    assert found == text
    assert before == tokenize_prompt(prompt, tokenizer)


def test_an_answer_by_itself_is_as_the_tokenizer_says() -> None:
    tokenizer = MADE["llama2"]
    before, ids = drawn("the coat", " the coat", tokenizer)
    assert Decoder(tokenizer)(ids, before) == "the coat"
    assert Decoder(tokenizer, continuing=True)(ids, [tokenizer.bos_token_id]) == "the coat", (
        "nothing is before it"
    )


def test_half_a_character_is_no_place_to_go_on_from() -> None:
    tokenizer = MADE["gpt2"]
    half = tokenizer("😀", add_special_tokens=False)["input_ids"]
    assert Decoder(tokenizer, continuing=True)(half[1:], half[:1]) == tokenizer.decode(half[1:])


def test_generate_decodes_behind_the_prompt(tiny_llama, monkeypatch) -> None:
    model, _ = load(tiny_llama)
    tokenizer = MADE["llama2"]
    before, ids = drawn("the coat", " the coat", tokenizer)
    monkeypatch.setattr(trainer.generation, "_answer_batch", lambda *_: torch.tensor([ids]))
    assert [each.text for each in generate(model, tokenizer, [before], Sampling())] == ["the coat"]
    (answer,) = generate(model, tokenizer, [before], Sampling(), continuing=True)
    assert (answer.text, answer.ids) == (" the coat", ids)
