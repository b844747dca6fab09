from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from tests.policy.batches import logits, pair_batch
from tests.policy.test_load import save_plain
from trainer.policy.adapters import POLICY, AdapterConfig
from trainer.policy.load import PolicyConfig, load_frozen, load_policy, saved_policy, trained_state
from trainer.policy.logprobs import pair_logps
from trainer.policy.reference import ReferenceConfig, build_reference
from trainer.schema import UserError

KINDS = ("shared", "sharded")
PEFT_CONFIGS = {"ia3": IA3Config(task_type="CAUSAL_LM"), "lora": LoraConfig(task_type="CAUSAL_LM", r=4)}


def trained(policy) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def move(policy) -> None:
    """One real optimizer step, large enough to see."""
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    logps = pair_logps(policy, pair_batch())
    (logps.rejected - logps.chosen).sum().backward()
    optimizer.step()


def both(reference):
    logps = reference.logps(pair_batch())
    return torch.cat([logps.chosen, logps.rejected])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["ia3", "lora"])
@pytest.mark.parametrize("adapter", ["start", None, "path"])
def test_shared_and_sharded_give_the_same_numbers_and_never_move(models, tmp_path, family, kind, adapter):
    base = models(family)
    start = save_plain(base, tmp_path / "start", PEFT_CONFIGS[kind])
    other = save_plain(base, tmp_path / "other", PEFT_CONFIGS[kind])
    config = PolicyConfig(str(base), AdapterConfig(kind=kind), str(start))
    named = str(other) if adapter == "path" else adapter
    expected = {
        "start": config,
        None: PolicyConfig(str(base), None),
        "path": PolicyConfig(str(base), AdapterConfig(kind=kind), str(other)),
    }[adapter]
    expected = pair_logps(load_frozen(expected), pair_batch())
    expected = torch.cat([expected.chosen, expected.rejected])
    numbers = {}
    for reference_kind in KINDS:
        policy = load_policy(config)
        names = trained(policy)
        reference = build_reference(ReferenceConfig(reference_kind, named), config, policy)
        assert trained(policy) == names == trained_state(policy).keys()
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        before, moved = reference.fingerprint(), logits(policy)
        move(policy)
        assert not torch.equal(logits(policy), moved), "the policy did move"
        numbers[reference_kind] = both(reference)
        assert reference.fingerprint() == before
        assert trained(policy) == names
        assert policy.active_adapter == POLICY
        assert policy.training
    torch.testing.assert_close(numbers["shared"], numbers["sharded"], rtol=0, atol=1e-5)
    torch.testing.assert_close(numbers["shared"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [True, False])
def test_gradients_are_those_without_a_reference(tiny_gpt2, tmp_path, start):
    """The switch stands between the policy's forward and backward, and leaves no trace in the gradient."""
    folder = save_plain(tiny_gpt2, tmp_path / "start", PEFT_CONFIGS["ia3"]) if start else None
    config = PolicyConfig(str(tiny_gpt2), start=folder and str(folder))
    gradients = []
    for used in (False, True):
        policy = load_policy(config)
        reference = build_reference(ReferenceConfig(), config, policy)
        loss = pair_logps(policy, pair_batch()).chosen.sum()
        if used:
            both(reference)
        loss.backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
        assert gradients[-1].keys() == trained(policy)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_reference_without_a_start_is_the_bare_base(tiny_llama):
    config = PolicyConfig(str(tiny_llama))
    policy = load_policy(config)
    for kind in KINDS:
        reference = build_reference(ReferenceConfig(kind), config, policy)
        logps = pair_logps(policy, pair_batch())
        assert torch.equal(both(reference), torch.cat([logps.chosen, logps.rejected]))
        assert "reference" not in policy.peft_config


def test_an_exception_inside_leaves_the_policy_as_it_was(tiny_llama, tmp_path):
    start = save_plain(tiny_llama, tmp_path / "start", PEFT_CONFIGS["ia3"])
    config = PolicyConfig(str(tiny_llama), start=str(start))
    policy = load_policy(config)
    names, expected = trained(policy), logits(policy)
    for adapter in ("start", None):
        if adapter is None:
            policy = load_policy(config)
        reference = build_reference(ReferenceConfig("shared", adapter), config, policy)
        with pytest.raises(RuntimeError, match="inside"), reference.applied():
            raise RuntimeError("inside")
        assert trained(policy) == names
        assert policy.training
        assert torch.equal(logits(policy), expected)


def test_lora_dropout_does_not_reach_the_reference(tiny_llama, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5)
    start = save_plain(tiny_llama, tmp_path / "start", lora)
    config = PolicyConfig(str(tiny_llama), AdapterConfig(kind="lora"), str(start))
    policy = load_policy(config)
    reference = build_reference(ReferenceConfig(), config, policy)
    assert torch.equal(both(reference), both(reference))
    assert not torch.equal(logits(policy), logits(policy)), "the policy's own dropout is back"


def test_the_fingerprint_sees_a_reference_that_moved(tiny_llama, tmp_path):
    start = save_plain(tiny_llama, tmp_path / "start", PEFT_CONFIGS["ia3"])
    config = PolicyConfig(str(tiny_llama), start=str(start))
    for kind in KINDS:
        policy = load_policy(config)
        reference = build_reference(ReferenceConfig(kind), config, policy)
        before = reference.fingerprint()
        owner = policy if kind == "shared" else reference.model
        name = "reference" if kind == "shared" else "default"
        scale = next(p for n, p in owner.named_parameters() if n.endswith(f"ia3_l.{name}"))
        with torch.no_grad():
            scale.view(-1)[0] += 1e-6
        assert reference.fingerprint() != before


def test_a_shared_reference_is_not_saved_with_the_module(tiny_llama):
    config = PolicyConfig(str(tiny_llama))
    module = nn.Module()
    module.policy = load_policy(config)
    count = len(list(module.state_dict()))
    module.reference = build_reference(ReferenceConfig(), config, module.policy)
    assert len(list(module.state_dict())) == count
    module.train()
    assert not module.reference.training


def test_what_cannot_be_a_reference_is_refused(tiny_llama, tmp_path):
    whole = PolicyConfig(str(tiny_llama), None)
    with pytest.raises(UserError, match=r"policy.adapter is null.*reference.kind: sharded"):
        build_reference(ReferenceConfig(), whole, load_policy(whole))
    lora = save_plain(tiny_llama, tmp_path / "lora", PEFT_CONFIGS["lora"])
    config = PolicyConfig(str(tiny_llama))
    with pytest.raises(UserError, match=r"cannot share the policy's base.*reference.kind: sharded"):
        build_reference(ReferenceConfig("shared", str(lora)), config, load_policy(config))
    with pytest.raises(UserError, match="/nowhere: no such file"):
        build_reference(ReferenceConfig("shared", "/nowhere"), config, load_policy(config))
    reference = build_reference(ReferenceConfig("sharded", str(lora)), config, load_policy(config))
    assert reference.describe()["fingerprint"]["start"]["path"] == str(lora.resolve())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["ia3", "lora"])
@pytest.mark.parametrize("reference_kind", KINDS)
def test_an_opponent_from_its_frozen_adapter_is_the_merged_previous_model(
    models, tmp_path, family, kind, reference_kind
):
    """Self-play: nothing is lost by never merging the last iteration's adapter into the base."""
    base = models(family)
    previous = save_plain(base, tmp_path / "previous", PEFT_CONFIGS[kind])
    if kind == "lora":  # updates as large as the weights, not a hundred times: float32 has seven digits
        file = previous / "adapter_model.safetensors"
        save_file({name: 0.1 * tensor for name, tensor in load_file(file).items()}, file)
    merged = load_frozen(saved_policy(previous, str(base))).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = pair_logps(load_frozen(PolicyConfig(str(tmp_path / "merged"), None)), pair_batch())
    config = PolicyConfig(str(base), AdapterConfig(kind=kind), str(previous))
    policy = load_policy(config)
    opponent = build_reference(ReferenceConfig(reference_kind, "start"), config, policy)
    start = pair_logps(policy, pair_batch())
    move(policy)
    expected = torch.cat([merged.chosen, merged.rejected])
    torch.testing.assert_close(both(opponent), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([start.chosen, start.rejected]), expected, rtol=0, atol=1e-5)
    moved = pair_logps(policy, pair_batch())
    assert (torch.cat([moved.chosen, moved.rejected]) - expected).abs().max() > 1e-3
