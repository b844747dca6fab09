"""The one forward equals a plain transformers computation, one sequence at a time, whatever the padding and batch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import FAMILIES
from trainer.data.layout import concatenated
from trainer.policy.logprobs import completion_logps, pair_logps
from trainer.schema import StepShare, TokenizedPreference

WHOLE = StepShare(1.0, 1.0, True)


def pairs(count: int, seed: int = 0, longest: int = 20) -> list[TokenizedPreference]:
    """Random pairs of unequal lengths, longer than Gemma-2's tiny sliding window."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int) -> list[int]:
        length = int(torch.randint(low, longest, (1,), generator=generator))
        return torch.randint(3, 200, (length,), generator=generator).tolist()

    return [TokenizedPreference([1, *ids(1)], [*ids(1), 2], [*ids(1), 2], str(i)) for i in range(count)]


def plain_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    """The textbook way: one unpadded sequence, full logits, log-softmax, a loop."""
    ids = torch.tensor([prompt + completion])
    logps = model(ids).logits[0].double().log_softmax(-1)
    start = len(prompt)
    return sum(logps[start + i - 1, token].item() for i, token in enumerate(completion))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 5])
@torch.no_grad()
def test_equals_plain_transformers(models, family: str, count: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(models(family)).eval()
    batch = pairs(count, seed=count)
    logps = pair_logps(model, concatenated(batch, 0, WHOLE))
    for i, one in enumerate(batch):
        chosen, rejected = (
            plain_logp(model, one.prompt, one.chosen),
            plain_logp(model, one.prompt, one.rejected),
        )
        # Sums over up to 20 tokens: 1e-5 for each token.
        assert logps.chosen[i].item() == pytest.approx(chosen, abs=1e-5 * len(one.chosen), rel=1e-6)
        assert logps.rejected[i].item() == pytest.approx(rejected, abs=1e-5 * len(one.rejected), rel=1e-6)
        assert logps.chosen_tokens[i] == len(one.chosen)
        assert logps.rejected_tokens[i] == len(one.rejected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_batch_change_nothing(models, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(models(family)).eval()
    batch = pairs(4)
    together = pair_logps(model, concatenated(batch, 0, WHOLE))
    for i, one in enumerate(batch):
        alone = pair_logps(model, concatenated([one], 7, WHOLE))
        torch.testing.assert_close(alone.chosen, together.chosen[i : i + 1], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(alone.rejected, together.rejected[i : i + 1], atol=1e-5, rtol=1e-6)


def test_sums_are_float32_over_a_bf16_model(tiny_llama) -> None:
    # bf16 moves in steps of 2 near -300; summed in float32 the long completion keeps its fraction.
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).eval()
    long = TokenizedPreference([1, 5], [*range(3, 103), 2], [9, 2], "long")
    with torch.no_grad():
        sums, _ = completion_logps(model, concatenated([long], 0, WHOLE).rows)
    assert sums.dtype == torch.float32
    assert sums[0].item() != torch.tensor(sums[0].item()).bfloat16().item()


def test_one_token_completion_and_identical_ones(tiny_llama) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    batch = concatenated([TokenizedPreference([1], [2], [2], "same")], 0, WHOLE)
    logps = pair_logps(model, batch)
    assert (
        logps.chosen.item() == logps.rejected.item() == pytest.approx(plain_logp(model, [1], [2]), abs=1e-5)
    )


def test_scaled_logits_go_through_the_model_itself(tmp_path) -> None:
    """Cohere multiplies its logits after the head; leaving that out would be silently wrong."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = CohereForCausalLM(config).eval()
    one = pairs(1)[0]
    logps = pair_logps(model, concatenated([one], 0, WHOLE))
    assert logps.chosen.item() == pytest.approx(plain_logp(model, one.prompt, one.chosen), abs=1e-4)
