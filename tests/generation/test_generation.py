"""Answers depend on the prompt and the seed, never on the batch."""

import copy
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainer.generation import GumbelNoise, Sampling, generate, stop_ids
from trainer.schema import UserError

FAMILIES = ["llama", "gpt2", "gemma2", "qwen2"]


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Tiny random weights answer one token for ever; larger ones make answers differ and stop at different
    # places.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model, AutoTokenizer.from_pretrained(folder)


def some_prompts(vocabulary: int, count: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 11, 5, 1, 8, 5, 2][:count]
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(request.getfixturevalue(f"tiny_{request.param}"))


@pytest.fixture
def llama(tiny_llama: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(tiny_llama)


def test_greedy_in_batches_equals_greedy_one_by_one_and_a_plain_loop(family):
    model, tokenizer = family
    prompts = some_prompts(model.config.vocab_size)
    sampling = Sampling(max_new_tokens=10)
    together = generate(model, tokenizer, prompts, sampling, batch_size=4)
    assert together == generate(model, tokenizer, prompts, sampling, batch_size=1)
    assert len({tuple(answer.ids) for answer in together}) > 1
    stops = stop_ids(model, tokenizer)
    model.eval()
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 10:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
        assert answer.finished == (ids[-1] in stops)
        assert answer.ids == [token for token in ids[len(prompt) :] if token not in stops]


def test_samples_do_not_depend_on_batch_order_or_company(family):
    model, tokenizer = family
    prompts = some_prompts(model.config.vocab_size)
    keys = [f"row {index}" for index in range(len(prompts))]
    sampling = Sampling(max_new_tokens=10, do_sample=True, temperature=1.3, top_k=20, top_p=0.9, seed=4)
    first = generate(model, tokenizer, prompts, sampling, keys, batch_size=4)
    assert first == generate(model, tokenizer, prompts, sampling, keys, batch_size=1)
    turned = generate(model, tokenizer, prompts[::-1], sampling, keys[::-1], batch_size=3)
    assert first == turned[::-1]
    assert [first[2]] == generate(model, tokenizer, [prompts[2]], sampling, [keys[2]])


def test_seed_and_sample_number_change_the_noise(llama):
    model, tokenizer = llama
    prompt = some_prompts(model.config.vocab_size)[0]
    sampling = Sampling(max_new_tokens=12, do_sample=True, temperature=3.0)
    twice = generate(model, tokenizer, [prompt, prompt], sampling)
    assert twice[0].ids != twice[1].ids
    other = Sampling(max_new_tokens=12, do_sample=True, temperature=3.0, seed=1)
    assert generate(model, tokenizer, [prompt], other)[0].ids != twice[0].ids
    assert generate(model, tokenizer, [prompt], sampling)[0] == twice[0]


def test_gumbel_maximum_draws_from_the_softmax():
    scores = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).repeat(20_000, 1)
    draws = GumbelNoise([f"key {row}" for row in range(len(scores))])(None, scores).argmax(-1)
    shares = torch.bincount(draws, minlength=4) / len(scores)
    torch.testing.assert_close(shares, scores[0].softmax(-1), atol=0.012, rtol=0)
    assert shares[3] == 0


def test_stop_ids_of_the_generation_config_end_an_answer(llama):
    model, tokenizer = llama
    prompts = some_prompts(model.config.vocab_size)
    free = generate(model, tokenizer, prompts, Sampling(max_new_tokens=10))
    longest = max(free, key=lambda answer: len(answer.ids))
    stop = longest.ids[4]
    model.generation_config.eos_token_id = [int(tokenizer.eos_token_id), stop]
    assert stop in stop_ids(model, tokenizer)
    assert tokenizer.eos_token_id in stop_ids(model, tokenizer)
    for before, after in zip(
        free, generate(model, tokenizer, prompts, Sampling(max_new_tokens=10)), strict=True
    ):
        if stop in before.ids:
            assert after.finished
            assert after.ids == before.ids[: before.ids.index(stop)]
        else:
            assert after == before


def test_sampling_defaults_of_a_hub_model_are_left_out_and_come_back(llama):
    model, tokenizer = llama
    prompts = some_prompts(model.config.vocab_size)
    plain = generate(model, tokenizer, prompts, Sampling(max_new_tokens=10))
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.min_new_tokens = 10
    shipped = copy.deepcopy(model.generation_config)
    assert generate(model, tokenizer, prompts, Sampling(max_new_tokens=10)) == plain
    assert model.generation_config.to_dict() == shipped.to_dict()


def test_an_adapter_takes_part_and_training_modes_come_back(llama):
    model, tokenizer = llama
    prompts = some_prompts(model.config.vocab_size)
    bare = generate(model, tokenizer, prompts, Sampling(max_new_tokens=10))
    policy = get_peft_model(
        model,
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
    )
    assert generate(policy, tokenizer, prompts, Sampling(max_new_tokens=10)) == bare
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "ia3" in name:
                parameter.mul_(-2.0)
    policy.train()
    embedding = next(module for module in policy.modules() if isinstance(module, nn.Embedding))
    embedding.training = False
    modes = [module.training for module in policy.modules()]
    assert generate(policy, tokenizer, prompts, Sampling(max_new_tokens=10)) != bare
    assert [module.training for module in policy.modules()] == modes


def test_positions_bound_prompt_and_answer(llama):
    model, tokenizer = llama
    positions = model.config.max_position_embeddings
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    near = [5] * (positions - 4)
    answers = generate(model, tokenizer, [near, [5]], Sampling(max_new_tokens=9), batch_size=2)
    assert [len(answer.ids) for answer in answers] == [4, 9]
    assert not any(answer.finished for answer in answers)
    with pytest.raises(UserError, match=rf"'line 2'.*{positions} tokens.*{positions} positions"):
        generate(model, tokenizer, [[5], [5] * positions], Sampling(), keys=["line 1", "line 2"])
    with pytest.raises(UserError, match="prompt 2: it has no tokens"):
        generate(model, tokenizer, [[5], []], Sampling())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": 0.5}, "no effect without do_sample"),
        ({"top_k": 5}, "no effect without do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: 0.0"),
        ({"do_sample": True, "top_k": 0}, "top_k: 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p: 1.5"),
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_keys_must_match_the_prompts(llama):
    model, tokenizer = llama
    with pytest.raises(UserError, match="1 keys for 2 prompts"):
        generate(model, tokenizer, [[5], [6]], Sampling(), keys=["a"])
    assert generate(model, tokenizer, [], Sampling()) == []
