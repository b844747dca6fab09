from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    Adafactor,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from tests.policy.batches import logits
from trainer.policy.adapters import POLICY, AdapterConfig, attach
from trainer.policy.load import PolicyConfig, count_parameters, load_policy, trained_state
from trainer.schema import UserError

PAPER = AdapterConfig(preset="paper")
LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def on_meta(config, adapter=AdapterConfig()):
    with torch.device("meta"):
        return attach(AutoModelForCausalLM.from_config(config), adapter)


@pytest.mark.parametrize(
    ("config", "adapter", "trained"),
    [
        (LLAMA_2_7B, AdapterConfig(), 614_400),
        (LLAMA_2_7B, PAPER, 614_400),
        (LLAMA_3_8B, AdapterConfig(), 524_288),
        (LLAMA_2_70B, AdapterConfig(), 2_457_600),
        # GPT-2: 12 layers of 768 keys, 768 values and 3,072 feed-forward; PEFT scales 768 queries as well.
        (GPT2Config(), PAPER, 12 * (768 + 768 + 3072)),
        (GPT2Config(), AdapterConfig(), 12 * (3 * 768 + 3072)),
        # Qwen2-7B's and Gemma-2-9B's sizes: PEFT scales queries instead of keys.
        (Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                     num_key_value_heads=4), PAPER, 28 * (512 + 512 + 18944)),
        (Gemma2Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                      num_key_value_heads=8, head_dim=256), PAPER, 42 * (2048 + 2048 + 14336)),
        (Gemma2Config(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
                      num_key_value_heads=8, head_dim=256), AdapterConfig(), 42 * (4096 + 2048 + 14336)),
        (LLAMA_2_7B, AdapterConfig(kind="lora", r=8), 32 * 2 * 2 * 8 * 4096),
    ],
)  # fmt: skip
def test_trained_parameters_are_those_of_the_family(config, adapter, trained):
    assert count_parameters(on_meta(config, adapter)).trained == trained


def test_all_parameters_of_llama_2_7b_are_counted():
    counts = count_parameters(on_meta(LLAMA_2_7B))
    assert counts.total == 6_738_415_616 + 614_400
    assert "614,400 trained" in str(counts)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
def test_paper_scales_keys_values_and_feed_forward_and_nothing_else(models, family):
    policy = load_policy(PolicyConfig(str(models(family)), PAPER))
    scaled = {name.rsplit(".ia3_l", 1)[0].rsplit(".", 1)[1] for name in trained_state(policy)}
    assert scaled == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("adapter", [AdapterConfig(), PAPER, AdapterConfig(kind="lora")])
def test_a_fresh_adapter_changes_nothing(models, family, adapter):
    base = load_policy(PolicyConfig(str(models(family)), None)).eval()
    policy = load_policy(PolicyConfig(str(models(family)), adapter)).eval()
    assert torch.equal(logits(policy), logits(base))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False, weight_decay=0.1
    ),
    "adafactor relative": lambda p: Adafactor(p, relative_step=True, scale_parameter=True, warmup_init=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gpt2_queries_are_never_scaled_and_plain_peft_loads_the_rest(tiny_gpt2, tmp_path, optimizer):
    policy = load_policy(PolicyConfig(str(tiny_gpt2), PAPER))
    steps = OPTIMIZERS[optimizer]([p for p in policy.parameters() if p.requires_grad])
    ids = torch.arange(24).view(2, 12) + 5
    for _ in range(3):
        policy(input_ids=ids, labels=ids).loss.backward()
        steps.step()
        steps.zero_grad()

    fused = {name: t.flatten() for name, t in trained_state(policy).items() if "c_attn" in name}
    assert len(fused) == 2
    for vector in fused.values():
        queries, keys, values = vector.chunk(3)
        assert torch.equal(queries, torch.ones(32))
        assert (keys != 1).all()
        assert (values != 1).all()

    policy.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path)
    torch.testing.assert_close(logits(plain.eval()), logits(policy.eval()), rtol=0, atol=1e-6)


def test_gpt2_paper_survives_state_dicts_copies_and_merging(tiny_gpt2):
    policy = load_policy(PolicyConfig(str(tiny_gpt2), PAPER)).eval()
    for parameter in policy.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.5, 1.5)
    expected = logits(policy)
    other = load_policy(PolicyConfig(str(tiny_gpt2), PAPER)).eval()
    other.load_state_dict(policy.state_dict())
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(copy.deepcopy(policy)), expected)
    torch.testing.assert_close(logits(policy.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_gpt2_paper_refuses_a_state_that_scales_queries(tiny_gpt2):
    whole = load_policy(PolicyConfig(str(tiny_gpt2), AdapterConfig(preset="peft")))
    nn.init.constant_(next(p for n, p in whole.named_parameters() if "c_attn.ia3_l" in n), 1.5)
    with pytest.raises(UserError, match=r"scales queries.*adapter.preset: peft"):
        load_policy(PolicyConfig(str(tiny_gpt2), PAPER)).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_thousandth_of_one_scale_changes_the_logits_over_a_bfloat16_base(tmp_path, models, family):
    policy = load_policy(PolicyConfig(str(models(family)), PAPER, dtype="bfloat16")).eval()
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = logits(policy)
    with policy.disable_adapter():
        assert torch.equal(logits(policy), before), "scales of exactly 1 change nothing"
    policy.set_adapter(POLICY)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.data += 1e-3
            assert not torch.equal(logits(policy), before), name
            parameter.data -= 1e-3
            parameter.data.fill_(1.0)


def test_rounding_keeps_the_mean_and_the_gradient():
    from trainer.policy.scales import scaled

    torch.manual_seed(0)
    x = torch.randn(400, 64).bfloat16()
    for factor in (0.999, 1.0003, 1.001, 1.5, 2.0):
        scale = torch.full((64,), factor, requires_grad=True)
        y = scaled(x, scale)
        exact = x.double() * factor
        ratio = ((y.double() - x.double()) * x.double()).sum() / x.double().square().sum()
        ratio = ratio.item()
        assert ratio == pytest.approx(factor - 1, abs=2e-4), "rounding to the nearest gives 0 near 1"
        assert ((y.double() - exact).abs() <= exact.abs() * 2**-7).all()
        y.float().sum().backward()
        torch.testing.assert_close(scale.grad, x.float().sum(0), rtol=1e-3, atol=1e-2)
    assert torch.equal(scaled(x, torch.ones(64)), x)
    # The same values round alike wherever they stand: in another batch, order or layout.
    scale = torch.rand(64) + 0.5
    assert torch.equal(scaled(x[7:9], scale), scaled(x, scale)[7:9])
    assert torch.equal(
        scaled(x.view(4, 100, 64).transpose(0, 1), scale), scaled(x, scale).view(4, 100, 64).transpose(0, 1)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lora", "preset": "paper"}, "adapter.preset: 'paper' has no effect"),
        ({"r": 4}, "adapter.r: 4 has no effect with kind 'ia3'"),
        ({"alpha": 4}, "adapter.alpha"),
        ({"dropout": 0.1}, "adapter.dropout"),
        ({"preset": "peft", "targets": ["k_proj"]}, "no effect beside targets"),
        ({"targets": []}, "adapter.targets: is empty"),
        ({"kind": "lora", "r": 0}, "adapter.r: 0"),
        ({"kind": "lora", "dropout": 1.0}, "adapter.dropout: 1.0"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AdapterConfig(**settings)


def test_targets_may_be_named_and_wrong_ones_are_refused(tiny_llama):
    policy = load_policy(PolicyConfig(str(tiny_llama), AdapterConfig(targets=["v_proj", "down_proj"])))
    sizes = {
        name.rsplit(".ia3_l", 1)[0].rsplit(".", 1)[1]: t.shape for name, t in trained_state(policy).items()
    }
    assert sizes == {"v_proj": (16, 1), "down_proj": (1, 64)}
    with pytest.raises(UserError, match=r"adapter: does not fit llama.*wrong_proj"):
        load_policy(PolicyConfig(str(tiny_llama), AdapterConfig(targets=["wrong_proj"])))


def test_a_family_that_no_preset_knows_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("opt", ffn_dim=16, word_embed_proj_dim=16, **sizes)
    with pytest.raises(UserError, match=r"'paper' is not known for 'opt'.*adapter.targets"):
        on_meta(config, PAPER)
