"""Log-probs and gradients are those of the concatenated layout, whatever the layout, attention and length."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from tests.conftest import FAMILIES
from trainer.data.layout import concatenated, packed, places, prefix_shared, separated, spread, supervised
from trainer.policy import attention, packed_rows
from trainer.policy.adapters import AdapterConfig
from trainer.policy.base import PolicyConfig, load_base
from trainer.policy.load import load_policy
from trainer.policy.logprobs import completion_token_logps, pair_logps
from trainer.policy.packed_rows import packed_rows_differ
from trainer.schema import PreferenceBatch, StepShare, TokenizedDemonstration, TokenizedPreference

WHOLE = StepShare(1.0, 1.0, True)


def pairs(lengths: list[tuple[int, int, int]], seed: int = 0) -> list[TokenizedPreference]:
    """Random pairs of the given numbers of tokens (prompt, chosen, rejected)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 200, (length,), generator=generator).tolist()

    return [TokenizedPreference(ids(p), ids(c), ids(r), str(i)) for i, (p, c, r) in enumerate(lengths)]


SHORT = [(12, 9, 20), (1, 1, 1), (30, 1, 14), (3, 25, 2)]
# Each of the ways that attention goes on a CPU: one small matrix, blocks of queries, the fused kernel.
LONG = [(300, 60, 70), (20, 30, 40), (10, 280, 300)]


def policy(folder, **settings):
    """The policy with scales that are not all one."""
    model = load_policy(PolicyConfig(str(folder), AdapterConfig(), **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def logps_and_gradients(model, batch: PreferenceBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logps = pair_logps(model, batch)
    both = torch.cat([logps.chosen, logps.rejected])
    # Each sequence moves the loss by another amount.
    (both * torch.linspace(-1, 1, len(both))).sum().backward()
    return both.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(model, one: PreferenceBatch, other: PreferenceBatch) -> None:
    (logps, gradients), (expected, wanted) = (
        logps_and_gradients(model, one),
        logps_and_gradients(model, other),
    )
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    scale = max(gradient.abs().max().item() for gradient in wanted)
    assert scale > 0
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, atol=1e-5 * max(1.0, scale), rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [SHORT, SHORT[:1], LONG], ids=["short", "alone", "long"])
def test_prefix_shared_equals_concatenated(models, family: str, lengths, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_LONGEST_KEPT", 320)
    if family != "gpt2" and lengths is LONG:
        lengths = [*LONG, (400, 50, 60)]
    model = policy(models(family))
    assert model.config._attn_implementation == attention.NAME
    batch = pairs(lengths)
    assert_same(model, prefix_shared(batch, 0, WHOLE), concatenated(batch, 0, WHOLE))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_whole_rows_do_the_same(models, family: str, implementation: str, monkeypatch) -> None:
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("sdpa refuses Gemma-2's soft-capping")
    monkeypatch.setattr("trainer.policy.logprobs.MASKED_ROW", 64)
    model = policy(models(family), attention=implementation)
    batch = pairs(SHORT)
    assert_same(model, prefix_shared(batch, 0, WHOLE), concatenated(batch, 0, WHOLE))


@pytest.mark.parametrize("family", FAMILIES)
def test_tandems_attention_is_the_familys_own(models, family: str) -> None:
    """Rows without segments, padded, under our attention and under the family's."""
    batch = concatenated(pairs(SHORT), 0, WHOLE)
    own = "eager" if family == "gemma2" else "sdpa"
    expected = logps_and_gradients(policy(models(family), attention=own), batch)
    found = logps_and_gradients(policy(models(family)), batch)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-5)


WINDOW = {"sliding_window": 8, "max_window_layers": 0, "use_sliding_window": True}
COMMON = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {
    "mistral": MistralConfig(**COMMON, sliding_window=8),
    "qwen2": Qwen2Config(**COMMON, **WINDOW),
    "qwen3": Qwen3Config(**COMMON, **WINDOW),
    "phi3": Phi3Config(**COMMON, sliding_window=8),
    # Windows in the mask alone, experts, sinks: they keep their own attention.
    "qwen2_moe": Qwen2MoeConfig(**COMMON, **WINDOW, num_experts=4, moe_intermediate_size=16),
    "gpt_oss": GptOssConfig(**COMMON, sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_windows_and_sinks_are_kept_in_every_layout(family: str, tmp_path) -> None:
    """Against transformers' eager attention, one unpadded sequence at a time."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(WINDOWED[family])
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch, model = pairs([(12, 9, 20), (300, 40, 30)]), load_base(PolicyConfig(str(tmp_path), None)).eval()
    assert (model.config._attn_implementation == attention.NAME) == (family not in ("qwen2_moe", "gpt_oss"))
    expected = []
    for name in ("chosen", "rejected"):
        for pair in batch:
            ids = torch.tensor([pair.prompt + getattr(pair, name)])
            each = own(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            expected.append(each[len(pair.prompt) - 1 :].sum().item())
    for lay in (prefix_shared, concatenated):
        logps = pair_logps(model, lay(batch, 0, WHOLE))
        found = torch.cat([logps.chosen, logps.rejected]).tolist()
        assert found == pytest.approx(expected, abs=1e-3), lay.__name__
    assert packed_rows_differ(model, prefix_shared(batch, 0, WHOLE).rows, 0) is None


def test_the_trial_sees_what_must_not_be_seen(tiny_llama, monkeypatch) -> None:
    rows = prefix_shared(pairs([(5, 1, 1), (9, 1, 1)]), 0, WHOLE).rows
    model = policy(tiny_llama, attention="sdpa")
    assert packed_rows_differ(model, rows, 0) is None
    causal = torch.ones(200, 200, dtype=torch.bool).tril()

    def open_masks(config, rows):
        time = rows.input_ids.shape[1]
        return causal[None, None, :time, :time].expand(len(rows.input_ids), 1, time, time)

    monkeypatch.setattr(attention, "dense_masks", open_masks)
    assert packed_rows_differ(model, rows, 0) is not None


def test_running_out_of_memory_is_no_verdict_on_rows(tiny_llama, monkeypatch) -> None:
    real = packed_rows.completion_logps

    def short(model, rows):
        if rows.segments is not None:
            raise torch.OutOfMemoryError("no room")
        return real(model, rows)

    monkeypatch.setattr(packed_rows, "completion_logps", short)
    with pytest.raises(torch.OutOfMemoryError):
        packed_rows_differ(policy(tiny_llama), prefix_shared(pairs(SHORT), 0, WHOLE).rows, 0)


def test_rejected_does_not_see_chosen(tiny_llama) -> None:
    model = policy(tiny_llama)
    (pair,) = pairs([(8, 9, 10)])
    other = dataclasses.replace(pair, chosen=pair.chosen[::-1])
    first, second = (pair_logps(model, prefix_shared([each], 0, WHOLE)) for each in (pair, other))
    assert first.rejected.item() == second.rejected.item()
    assert first.chosen.item() != second.chosen.item()


def test_examples_do_not_see_each_other(models) -> None:
    model = policy(models("gemma2"))
    batch = pairs(SHORT)
    together = pair_logps(model, prefix_shared(batch, 0, WHOLE))
    for i, pair in enumerate(batch):
        alone = pair_logps(model, prefix_shared([pair], 0, WHOLE))
        torch.testing.assert_close(alone.chosen, together.chosen[i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.rejected, together.rejected[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_demonstrations_equal_padded_ones(models, family: str) -> None:
    model = policy(models(family))
    examples = [TokenizedDemonstration(pair.prompt, pair.chosen, pair.id) for pair in pairs(SHORT)]
    found = []
    for lay in (packed, supervised):
        model.zero_grad()
        each = completion_token_logps(model, lay(examples, 0, WHOLE).rows)
        each.sum().backward()
        found.append((each.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-5)


def test_separated_gives_the_padded_rows_back() -> None:
    batch = pairs(SHORT)
    expected, found = concatenated(batch, 7, WHOLE).rows, separated(prefix_shared(batch, 7, WHOLE).rows, 7)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(found, name)), name
    assert found.segments is None
    assert (found.sequences, found.tokens) == (expected.sequences, expected.tokens)


def test_spread_keeps_every_token_and_fills_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn((60, 3), generator=generator) * 0.7 + torch.tensor([3.0, 2.0, 2.2]))
    rows = prefix_shared(pairs([tuple(map(int, row)) for row in lengths.clamp(1, 90)]), 0, WHOLE).rows
    laid = spread(rows, 256)
    assert laid.input_ids.shape[1] <= 256
    assert int(laid.attention_mask.sum()) == rows.tokens
    assert rows.tokens / laid.input_ids.numel() >= 0.95
    flat = laid.input_ids.flatten()
    for number, segment in enumerate(rows.segments):
        new = laid.segments[number]
        start = new.row * laid.input_ids.shape[1] + new.start
        own = rows.input_ids[0, segment.start : segment.start + segment.tokens]
        assert torch.equal(flat[start : start + new.tokens], own)
    assert torch.equal(flat[laid.scored_positions], rows.input_ids[0, rows.scored_positions])


def test_flex_attention_sees_what_the_masks_see(models) -> None:
    """FlexAttention has no backward on a CPU; its mask and its forward do run there."""
    rows = prefix_shared(pairs(SHORT), 0, WHOLE).rows
    for window in (None, 8):
        packing = attention.Packing(rows)
        torch.manual_seed(0)
        query, key, value = torch.randn(1, 4, rows.tokens, 16), *torch.randn(2, 1, 2, rows.tokens, 16)
        mask = attention.seen(rows, window)
        for softcap in (None, 2.0):
            layer = attention.PackedAttention(packing, 0.25, window, softcap)
            found = layer.flex(query, key, value)
            expected = attention._masked(query, key, value, mask, 0.25, softcap)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            by_segment = layer.by_segment(query, key, value)
            torch.testing.assert_close(by_segment, expected, atol=1e-5, rtol=1e-5)


def test_places_of_a_row() -> None:
    rows = prefix_shared(pairs([(2, 1, 2), (1, 2, 1)]), 0, WHOLE).rows
    example, branch, position = (part[0].tolist() for part in places(rows))
    assert example == [0] * 5 + [1] * 4
    assert branch == [0, 0, 1, 2, 2, 0, 1, 1, 2]
    assert position == [0, 1, 2, 2, 3, 0, 1, 2, 1]
    assert rows.scored_positions.tolist() == [1, 1, 3, 5, 6, 5]


def test_restarted_positions_without_segments_are_refused(tiny_llama) -> None:
    rows = prefix_shared(pairs([(2, 1, 2)]), 0, WHOLE).rows
    with pytest.raises(ValueError, match="begin anew"):
        dataclasses.replace(rows, segments=None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_and_layouts(models, family: str) -> None:
    plain, again = policy(models(family)), policy(models(family), gradient_checkpointing=True)
    batch = prefix_shared(pairs(SHORT), 0, WHOLE)
    torch.testing.assert_close(
        logps_and_gradients(again, batch), logps_and_gradients(plain, batch), atol=1e-6, rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same(models) -> None:
    plain, compiled = policy(models("llama")), policy(models("llama"), compile=True)
    for lengths in (SHORT, LONG, SHORT[1:]):
        batch = prefix_shared(pairs(lengths), 0, WHOLE)
        torch.testing.assert_close(
            logps_and_gradients(compiled, batch), logps_and_gradients(plain, batch), atol=1e-4, rtol=1e-5
        )


def test_bfloat16_is_as_near_the_truth_as_the_fused_kernel(models) -> None:
    """Scores are kept in bfloat16 where segments are short; that costs no more than bfloat16 costs anyway."""
    batch = pairs([(60, 40, 50), (120, 50, 60), (30, 10, 12)])
    truth = logps_and_gradients(policy(models("llama")), concatenated(batch, 0, WHOLE))[0]
    fused = policy(models("llama"), dtype="bfloat16", attention="sdpa")
    short = policy(models("llama"), dtype="bfloat16")
    off = [
        (logps_and_gradients(model, lay(batch, 0, WHOLE))[0] - truth).square().mean().sqrt().item()
        for model, lay in ((fused, concatenated), (short, prefix_shared))
    ]
    assert off[1] < 2 * off[0]
