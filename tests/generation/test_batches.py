"""Answers that come batch by batch: the same as all at once, groups that are not parted, and how much faster."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tests.generation.test_generation import load, some_prompts
from trainer.generation import GumbelNoise, Sampling, answer_batches, generate
from trainer.schema import UserError

SAMPLING = Sampling(max_new_tokens=8, do_sample=True, temperature=1.2, seed=2)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_hold_what_generate_gives(tiny_llama, batch_size) -> None:
    model, tokenizer = load(tiny_llama)
    prompts = some_prompts(model.config.vocab_size)
    keys = [f"row {index}" for index in range(len(prompts))]
    whole = generate(model, tokenizer, prompts, SAMPLING, keys)
    batches = list(answer_batches(model, tokenizer, prompts, SAMPLING, keys, batch_size))
    assert all(len(batch) <= batch_size for batch in batches)
    answers = dict(itertools.chain(*batches))
    assert [answers[index] for index in range(len(prompts))] == whole


def test_a_batch_is_there_before_the_next_is_begun(tiny_llama) -> None:
    model, tokenizer = load(tiny_llama)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    coming = answer_batches(model, tokenizer, some_prompts(model.config.vocab_size), SAMPLING, batch_size=3)
    assert not forwards
    next(coming)
    assert 0 < len(forwards) <= 8
    model.train()
    next(coming)
    assert model.training, "between batches the model stands as its owner left it"


@pytest.mark.parametrize(("batch_size", "groups"), [(2, [1] * 7), (8, [2, 2, 2, 1]), (100, [7])])
def test_samples_of_a_prompt_come_together(tiny_llama, batch_size, groups) -> None:
    """Also where they are more than a batch, which then takes several forwards."""
    model, tokenizer = load(tiny_llama)
    prompts = [prompt for prompt in some_prompts(model.config.vocab_size) for _ in range(4)]
    keys = [f"row {index // 4}" for index in range(len(prompts))]
    widths = []
    model.register_forward_pre_hook(
        lambda _, __, given: widths.append(len(given["input_ids"])), with_kwargs=True
    )
    batches = list(answer_batches(model, tokenizer, prompts, SAMPLING, keys, batch_size, together=4))
    assert max(widths) <= batch_size
    for batch in batches:
        assert set(Counter(index // 4 for index, _ in batch).values()) == {4}
    assert [len(batch) // 4 for batch in batches] == groups
    answers = dict(itertools.chain(*batches))
    assert [answers[index] for index in range(28)] == generate(model, tokenizer, prompts, SAMPLING, keys)


def test_what_cannot_be_is_told_when_the_first_is_asked_for(tiny_llama) -> None:
    model, tokenizer = load(tiny_llama)
    with pytest.raises(UserError, match="batch_size: 0"):
        next(answer_batches(model, tokenizer, [[5]], SAMPLING, batch_size=0))
    assert list(answer_batches(model, tokenizer, [], SAMPLING)) == []


@pytest.mark.slow
@pytest.mark.alone
def test_a_thousand_continuations_are_ten_times_faster_in_batches(tiny_gpt2) -> None:
    """A small GPT-2, random weights, greedy in float32 on one thread: the same tokens in less than a tenth of the time.

    One by one is measured on the first hundred, each of which takes as long as any other; `ONE_BY_ONE=1000` takes all.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=8000,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = [torch.randint(3, 8000, (8,)).tolist() for _ in range(1000)]
    sampling = Sampling(max_new_tokens=32)
    generate(model, tokenizer, prompts[:2], sampling)
    begun = time.monotonic()
    together = generate(model, tokenizer, prompts, sampling, batch_size=250)
    batched = time.monotonic() - begun
    few = int(os.environ.get("ONE_BY_ONE", "100"))
    begun = time.monotonic()
    alone = [generate(model, tokenizer, [prompt], sampling)[0] for prompt in prompts[:few]]
    single = 1000 / few * (time.monotonic() - begun)
    print(
        f"1,000 continuations: {batched:.1f} s batched, {single:.1f} s one by one ({single / batched:.1f} times)"
    )
    assert alone == together[:few]
    assert single > 10 * batched


def test_what_has_no_probability_is_never_drawn_from_a_large_vocabulary() -> None:
    """Noise of too few digits would let one of so many tokens win every few hundred draws."""
    scores = torch.full((1, 50_000), -40.0)
    scores[0, 7] = 0.0
    noise = GumbelNoise(["one stream"])
    assert {int(noise(None, scores).argmax()) for _ in range(3000)} == {7}
