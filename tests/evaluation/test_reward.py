"""Entropy and KL beside what one gets by hand; rewards, intervals and diversity of sampled texts."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.evaluation.divergence import Drawn, evaluating, measure
from trainer.evaluation.intervals import ratio_interval
from trainer.evaluation.reward import evaluate_reward, sample
from trainer.generation import Sampling
from trainer.pairs.prompts import NoPrompt, Prompt
from trainer.policy.load import PolicyConfig, load_frozen, load_policy, load_tokenizer
from trainer.schema import UserError

PROMPTS = [
    Prompt(f"p{n}", text) for n, text in enumerate(["The film", "A", "Once more, ", "фильм", "So", "It is"])
]
SAMPLED = Sampling(max_new_tokens=6, do_sample=True, seed=3)


def letters(prompts, completions) -> list[float]:  # type: ignore[no-untyped-def]
    """A reward that is plain: how many letters there are."""
    return [
        float(sum(map(str.isalpha, prompt + text))) for prompt, text in zip(prompts, completions, strict=True)
    ]


class Longest:
    """A reward with a description of its own."""

    def __call__(self, prompts, completions) -> list[float]:  # type: ignore[no-untyped-def]
        return [float(len(text)) for text in completions]

    def describe(self) -> dict[str, str]:
        return {"class": "Longest", "unit": "characters"}


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def two_models(request, models, tmp_path_factory):  # type: ignore[no-untyped-def]
    """A policy, another model of its family, and the tokenizer."""
    from tests import tiny_models

    other = tiny_models.make(request.param, tmp_path_factory.mktemp("other"), seed=1)
    folders = (models(request.param), other)
    loaded = [load_frozen(PolicyConfig(str(folder), adapter=None)) for folder in folders]
    return loaded[0], loaded[1], load_tokenizer(str(folders[0]))


SEQUENCES = [
    Drawn([5, 6, 7], [8, 9], True),
    Drawn([5], [8, 9, 10, 11], False),
    Drawn([5, 6, 7, 8, 9, 10], [20], False),
    Drawn([7, 30], [], True),
]


def by_hand(policy, other, drawn: Drawn) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Entropy and KL of one sequence, token by token, without padding or batches, in double precision."""
    entropy = divergence = 0.0
    for place in range(drawn.drawn):
        ids = torch.tensor([[*drawn.prompt, *drawn.completion[:place]]])
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, -1].double().softmax(-1) for model in (policy, other))
        entropy -= float((p * p.log()).sum())
        divergence += float((p * (p / q).log()).sum())
    return entropy, divergence


def test_entropy_and_kl_are_those_by_hand(two_models) -> None:  # type: ignore[no-untyped-def]
    policy, other, _ = two_models
    found = measure(policy, SEQUENCES, lambda: contextlib.nullcontext(other))
    assert [each.tokens for each in found] == [3, 4, 1, 1]
    for each, drawn in zip(found, SEQUENCES, strict=True):
        entropy, divergence = by_hand(policy, other, drawn)
        assert each.entropy == pytest.approx(entropy, rel=1e-4)
        assert each.kl == pytest.approx(divergence, rel=1e-3)
        assert divergence > 0.01


def test_memory_is_bounded_and_batches_do_not_matter(two_models, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    policy, other, _ = two_models
    whole = measure(policy, SEQUENCES, lambda: contextlib.nullcontext(other))
    widths: list[int] = []
    monkeypatch.setattr("trainer.evaluation.divergence._LOGITS_BYTES", {"cpu": 4 * 300 * 2, "accelerator": 1})
    policy.register_forward_pre_hook(
        lambda _, args, given: widths.append(len(given["input_ids"])), with_kwargs=True
    )
    apart = measure(policy, SEQUENCES, lambda: contextlib.nullcontext(other))
    # Two positions at most of a vocabulary below 300: the two single tokens together, the others alone.
    assert widths == [2, 1, 1]
    for one, two in zip(whole, apart, strict=True):
        assert (two.entropy, two.kl) == pytest.approx((one.entropy, one.kl), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(two_models) -> None:  # type: ignore[no-untyped-def]
    policy, _, _ = two_models
    assert [each.kl for each in measure(policy, SEQUENCES, lambda: contextlib.nullcontext(policy))] == [
        0.0
    ] * 4
    assert [each.kl for each in measure(policy, SEQUENCES)] == [None] * 4


def test_impossible_tokens_add_nothing_and_what_is_nan_stays_so(tiny_gpt2: Path) -> None:
    class Fixed(torch.nn.Module):
        """GPT-2's interface with given logits."""

        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(len(logits), 1))
            self.logits = torch.tensor(logits)

        def get_output_embeddings(self):  # type: ignore[no-untyped-def]
            return self

        def forward(self, input_ids, logits_to_keep, **_):  # type: ignore[no-untyped-def]
            from types import SimpleNamespace

            return SimpleNamespace(logits=self.logits.expand(len(input_ids), logits_to_keep, -1))

    never = -math.inf
    policy, other = Fixed([0.0, 0.0, never]), Fixed([0.0, math.log(3.0), 1.0 - 1.0])
    found = measure(policy, [Drawn([0], [1], False)], lambda: contextlib.nullcontext(other))[0]
    assert found.entropy == pytest.approx(math.log(2))
    # KL of (1/2, 1/2, 0) from (1/5, 3/5, 1/5).
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.6))
    assert measure(other, [Drawn([0], [1], False)], lambda: contextlib.nullcontext(policy))[0].kl == math.inf
    assert math.isnan(measure(Fixed([math.nan, 0.0, 0.0]), [Drawn([0], [1], False)])[0].entropy)


def test_the_sum_of_token_divergences_is_that_of_the_texts(two_models) -> None:  # type: ignore[no-untyped-def]
    """The chain rule, by counting: over all texts of two tokens the mean is KL(policy || other) of whole texts."""
    policy, other, _ = two_models
    with torch.no_grad():
        first = [
            model(input_ids=torch.tensor([[5]])).logits[0, -1].double().log_softmax(-1)
            for model in (policy, other)
        ]
        count = len(first[0])
        pairs = torch.tensor([[5, token] for token in range(count)])
        second = [model(input_ids=pairs).logits[:, -1].double().log_softmax(-1) for model in (policy, other)]
    whole_p, whole_q = first[0][:, None] + second[0], first[1][:, None] + second[1]
    exact = float((whole_p.exp() * (whole_p - whole_q)).sum())
    # The second token's own id does not matter: its distribution does.
    texts = [Drawn([5], [token, 0], False) for token in range(count)]
    found = measure(policy, texts, lambda: contextlib.nullcontext(other))
    mean = sum(float(chance) * each.kl for chance, each in zip(first[0].exp(), found, strict=True))  # type: ignore[operator]
    assert mean == pytest.approx(exact, rel=1e-4)


def test_modes_are_as_before(tiny_llama: Path) -> None:
    policy = load_policy(PolicyConfig(str(tiny_llama)))
    part = next(module for module in policy.modules() if module is not policy)
    part.training = False
    before = [module.training for module in policy.modules()]
    with evaluating(policy):
        assert not any(module.training for module in policy.modules())
    assert [module.training for module in policy.modules()] == before
    assert True in before


# --- the whole evaluation


@pytest.fixture(scope="module")
def result(two_models):  # type: ignore[no-untyped-def]
    policy, other, tokenizer = two_models
    return evaluate_reward(
        policy,
        tokenizer,
        PROMPTS,
        {"letters": letters, "longest": Longest()},
        sampling=SAMPLED,
        samples=3,
        reference=lambda: contextlib.nullcontext(other),
        examples=2,
    )


def test_what_is_in_the_result(result) -> None:  # type: ignore[no-untyped-def]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["prompts"], result["samples_per_prompt"]) == (6, 3)
    assert result["sampling"]["seed"] == 3
    assert result["reward_models"] == {
        "letters": {"class": "letters"},
        "longest": {"class": "Longest", "unit": "characters"},
    }
    for name in ("letters", "longest"):
        each = result["rewards"][name]
        assert each["n"] == 18
        assert each["interval"][0] <= each["mean"] <= each["interval"][1]
        assert each["sd"] > 0
    for name in ("entropy", "kl", "length"):
        assert result[name]["interval"][0] <= result[name]["mean"] <= result[name]["interval"][1]
    assert 0 < result["entropy"]["mean"] < math.log(300)
    assert 0 < result["length"]["mean"] <= 6
    assert 0 <= result["finished"] <= 1
    assert [row["prompt"] for row in result["examples"]] == ["The film", "A"]
    first = result["examples"][0]
    assert first["rewards"]["longest"] == len(first["completion"])


def test_the_same_numbers_whatever_the_batch(two_models, result) -> None:  # type: ignore[no-untyped-def]
    policy, other, tokenizer = two_models
    rewards = {"letters": letters, "longest": Longest()}
    again = evaluate_reward(
        policy,
        tokenizer,
        PROMPTS,
        rewards,
        sampling=SAMPLED,
        samples=3,
        reference=lambda: contextlib.nullcontext(other),
        batch_size=1,
        examples=2,
    )
    assert again["rewards"] == result["rewards"]
    assert again["examples"] == result["examples"]
    assert again["kl"]["mean"] == pytest.approx(result["kl"]["mean"], rel=1e-4)


def test_samples_are_the_prompts_own(two_models) -> None:  # type: ignore[no-untyped-def]
    policy, _, tokenizer = two_models
    once = sample(policy, tokenizer, PROMPTS, SAMPLED, samples=2)
    other_order = sample(policy, tokenizer, PROMPTS[::-1], SAMPLED, samples=2)
    assert once.beginnings[:3] == ["The film", "The film", "A"]
    assert once.texts[:2] == other_order.texts[-2:]
    assert len({tuple(each.ids) for each in once.answers}) > 6


def test_nothing_at_all_is_a_prompt(tiny_llama: Path) -> None:
    policy, tokenizer = (
        load_frozen(PolicyConfig(str(tiny_llama), adapter=None)),
        load_tokenizer(str(tiny_llama)),
    )
    prompts = NoPrompt(4).load(tokenizer).prompts
    found = evaluate_reward(policy, tokenizer, prompts, {"letters": letters}, sampling=SAMPLED)
    assert found["rewards"]["letters"]["n"] == 4
    assert found["kl"] is None


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        prompts = rng.normal(2.0, 1.0, 60)
        low, high = ratio_interval(prompts, np.ones(60))
        covered += low <= 2.0 <= high
    assert 88 <= covered <= 100


def test_an_interval_of_what_is_all_the_same() -> None:
    assert ratio_interval(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == [2.0, 2.0]


def test_refusals(two_models) -> None:  # type: ignore[no-untyped-def]
    policy, _, tokenizer = two_models

    def refused(match: str, prompts=PROMPTS, rewards=None, **settings) -> None:  # type: ignore[no-untyped-def]
        given = {"sampling": SAMPLED, **settings}
        with pytest.raises(UserError, match=match):
            evaluate_reward(
                policy, tokenizer, prompts, {"letters": letters} if rewards is None else rewards, **given
            )

    refused("none is given", rewards={})
    refused("1 are too few", prompts=PROMPTS[:1])
    refused("samples: 2", samples=2, sampling=Sampling(max_new_tokens=2))
    refused("gave 1 scores for 6 texts", rewards={"short": lambda prompts, completions: [1.0]})
    refused(
        "is nan; a finite number", rewards={"nan": lambda prompts, completions: [math.nan] * len(prompts)}
    )
    refused(
        "fails at 'The film', the first of 6 prompts .ZeroDivisionError: ",
        rewards={"zero": lambda prompts, completions: [1 / 0]},
    )


def test_a_model_that_gives_no_numbers_is_refused(tiny_gpt2) -> None:
    policy = load_frozen(PolicyConfig(str(tiny_gpt2), adapter=None))
    next(policy.parameters()).data.fill_(math.nan)
    with pytest.raises(UserError, match="probabilities that are no numbers"):
        evaluate_reward(
            policy, load_tokenizer(str(tiny_gpt2)), PROMPTS, {"letters": letters}, sampling=SAMPLED
        )
