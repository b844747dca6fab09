from __future__ import annotations

import copy
import json
import pickle
import shutil
import zlib
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests import tiny_models
from tests.data.helps import help_of
from tests.policy.batches import logits
from trainer.policy.base import hub_commit
from trainer.policy.load import (
    AdapterConfig,
    PolicyConfig,
    base_fingerprint,
    describe_for_checkpoint,
    fingerprint,
    load_base,
    load_frozen,
    load_policy,
    load_tokenizer,
    saved_policy,
    trained_state,
)
from trainer.policy.reference import ReferenceConfig
from trainer.provenance import sha256_file
from trainer.schema import UserError


def save_plain(base: Path, folder: Path, config) -> Path:
    """An adapter as PEFT alone writes it, with scales that are not 1: the same for the same name of its folder."""
    torch.manual_seed(zlib.crc32(folder.name.encode()))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


class Malicious:
    """Unpickled, it would write a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("config", [IA3Config(task_type="CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM", r=4)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plain_peft_folder_can_be_the_start(models, tmp_path, config, family):
    base = models(family)
    folder = save_plain(base, tmp_path / "plain", config)
    kind = config.peft_type.value.lower()
    policy = load_policy(PolicyConfig(str(base), AdapterConfig(kind=kind), str(folder))).eval()
    saved = load_file(folder / "adapter_model.safetensors")
    found = {name.replace(".default", ""): tensor for name, tensor in trained_state(policy).items()}
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert not torch.equal(logits(policy), logits(load_base(PolicyConfig(str(base)))))
    again = saved_policy(folder)
    assert (again.base, again.adapter.kind) == (str(base), kind)
    assert torch.equal(logits(load_frozen(again)), logits(policy))


def test_dropout_is_off_in_training_too(tiny_gpt2):
    policy = load_policy(PolicyConfig(str(tiny_gpt2)))
    assert policy.training
    assert torch.equal(logits(policy), logits(policy))
    lora = load_policy(PolicyConfig(str(tiny_gpt2), AdapterConfig(kind="lora", dropout=0.5)))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert not torch.equal(logits(lora), logits(lora)), "an adapter's own dropout is what was asked for"


def test_the_tokenizer_pads_with_eos_where_it_has_no_pad_token(tiny_llama, tmp_path):
    assert load_tokenizer(str(tiny_llama)).pad_token == "<pad>"
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "</s>"
    assert len(tokenizer) == len(load_tokenizer(str(tiny_llama)))


def test_wrong_bases_are_refused_by_name(tiny_llama, tmp_path):
    cases = {
        "no folder": (PolicyConfig("/nowhere/model"), "/nowhere/model is no folder"),
        "no path": (PolicyConfig("configs/models/nothing"), "configs/models/nothing is no folder"),
        "hub id": (PolicyConfig("NousResearch/Llama-2-7b-hf", offline=True), "Llama-2-7b-hf'.*--offline"),
        "empty": (PolicyConfig(str(tmp_path)), "holds no config.json"),
    }  # fmt: skip
    for config, message in cases.values():
        with pytest.raises(UserError, match=message):
            load_policy(config)
    with pytest.raises(UserError, match="--offline"):
        load_tokenizer("gpt2", offline=True)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(tiny_llama / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"only pickled weights.*safetensors"):
        load_policy(PolicyConfig(str(pickled)))
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(PolicyConfig(str(broken)))
    assert not (tmp_path / "ran").exists()


def test_wrong_starts_are_refused_by_name(tiny_llama, tiny_gpt2, tmp_path):
    adapter = save_plain(tiny_llama, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM"))
    lora = save_plain(tiny_llama, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM"))
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    cut = shutil.copytree(adapter, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"12345678")
    less = shutil.copytree(adapter, tmp_path / "less")
    tensors = load_file(less / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, less / "adapter_model.safetensors")
    llama = str(tiny_llama)
    cases = [
        (PolicyConfig(llama, start="/nowhere"), "/nowhere: no such file"),
        (PolicyConfig(llama, start=str(tmp_path / "ia3"), adapter=None), "policy.adapter is null"),
        (PolicyConfig(llama, start=str(lora)), "adapter.kind: 'ia3'.*'lora'"),
        (PolicyConfig(llama, start=str(tiny_llama)), "holds all weights.*policy.base"),
        (PolicyConfig(llama, start=str(pickled)), "only adapter_model.bin, a pickle"),
        (PolicyConfig(llama, start=str(cut)), "adapter_model.safetensors: damaged"),
        (PolicyConfig(llama, start=str(less)), "lacks .*ia3_l"),
        (PolicyConfig(str(tiny_gpt2), start=str(adapter)), "adapter: does not fit gpt2"),
        (PolicyConfig(llama, AdapterConfig(targets=["v_proj"]), str(adapter)), "has unknown .* and 3 more"),
        (PolicyConfig(llama, AdapterConfig("lora", r=8, alpha=32), str(lora)), "alpha: 32, but .* with 8"),
    ]
    for config, message in cases:
        with pytest.raises(UserError, match=message):
            load_policy(config)
    assert not (tmp_path / "ran").exists()


def test_another_width_is_refused(tiny_llama, tmp_path):
    wide = tiny_models.make("llama", tmp_path / "wide", hidden=64)
    adapter = save_plain(tiny_llama, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"has shape \[.*another base model"):
        load_policy(PolicyConfig(str(wide), start=str(adapter)))


def test_a_fingerprint_changes_with_any_weight(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    same = base_fingerprint(str(tiny_llama))
    assert base_fingerprint(str(base))["digest"] == same["digest"]
    assert same["files"] == {"model.safetensors": sha256_file(tiny_llama / "model.safetensors")}
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1e-6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert base_fingerprint(str(base))["digest"] != same["digest"]
    adapter = save_plain(tiny_llama, tmp_path / "ia3", IA3Config(task_type="CAUSAL_LM"))
    made_of = fingerprint(PolicyConfig(str(tiny_llama), start=str(adapter)))
    weights = "adapter_model.safetensors"
    assert made_of["start"]["files"] == {weights: sha256_file(adapter / weights)}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A hub's cache with two commits of `someone/model`, of which `main` is the first."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--someone--model"
    tiny_models.make("llama", model / "snapshots" / COMMITS[0])
    tiny_models.make("llama", model / "snapshots" / COMMITS[1], seed=1)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMITS[0])
    hub_commit.cache_clear()
    return model


COMMITS = ("a" * 40, "b" * 40)


def test_a_branch_that_moves_gives_no_other_model_than_the_one_recorded(hub):
    config = PolicyConfig("someone/model")
    load_tokenizer(config.base)
    (hub / "refs" / "main").write_text(COMMITS[1])
    first = load_base(PolicyConfig(str(hub / "snapshots" / COMMITS[0])))
    assert torch.equal(logits(load_base(config)), logits(first))
    assert base_fingerprint(config.base)["digest"] == COMMITS[0]
    hub_commit.cache_clear()  # as a new process would
    assert base_fingerprint(config.base)["digest"] == COMMITS[1]
    assert not torch.equal(logits(load_base(config)), logits(first))
    assert torch.equal(logits(load_base(PolicyConfig("someone/model", revision=COMMITS[0]))), logits(first))


def test_a_checkpoint_does_not_ask_the_hub_again(hub):
    config = PolicyConfig("someone/model")
    policy = load_policy(config)
    shutil.rmtree(hub)
    assert describe_for_checkpoint(policy, config)["base"]["digest"] == COMMITS[0]


def test_a_hub_out_of_reach_is_named():
    for load in (load_tokenizer, base_fingerprint, lambda name: load_base(PolicyConfig(name))):
        with pytest.raises(UserError, match="'someone/nothing' cannot be reached on the hub"):
            load("someone/nothing")


@pytest.mark.parametrize("kind", [PolicyConfig, AdapterConfig, ReferenceConfig])
def test_each_setting_has_its_help(kind):
    assert all(help_of(kind).values()), help_of(kind)


def test_all_weights_can_be_trained(tiny_llama):
    policy = load_policy(PolicyConfig(str(tiny_llama), None))
    assert all(p.requires_grad for p in policy.parameters())
    assert trained_state(policy).keys() == dict(policy.named_parameters()).keys()


# The published .pth files


def scales(policy) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.rand_like(tensor) + 0.5 for name, tensor in trained_state(policy).items()}


def own_naming(name: str) -> str:
    kind = {"k_proj": "attention.l_k", "v_proj": "attention.l_v", "down_proj": "ffn.l_ff"}
    parts = name.split(".")
    return f"blocks.{parts[parts.index('layers') + 1]}.{kind[parts[-3]]}"


NAMINGS = {
    "peft": lambda name: name.replace(".default", ""),
    "peft, live": lambda name: name,
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "own": own_naming,
    "ia3": lambda name: own_naming(name).replace(".l_", ".ia3_"),
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("form", ["flat", "parameters", "wrapped"])
def test_published_files_are_imported(tiny_llama, tmp_path, naming, form):
    expected = scales(load_policy(PolicyConfig(str(tiny_llama))))
    state = {NAMINGS[naming](name): tensor for name, tensor in expected.items()}
    if form == "flat":
        state = {name: tensor.flatten() for name, tensor in state.items()}
    if form == "parameters":
        state = {name: nn.Parameter(tensor) for name, tensor in state.items()}
    torch.save({"state_dict": state} if form == "wrapped" else state, tmp_path / "sft.pth")
    policy = load_policy(PolicyConfig(str(tiny_llama), start=str(tmp_path / "sft.pth")))
    found = trained_state(policy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_published_keys_that_match_nothing_are_listed(tiny_llama, tmp_path):
    state = {
        own_naming(name): tensor
        for name, tensor in scales(load_policy(PolicyConfig(str(tiny_llama)))).items()
    }
    short = dict(state)
    short.pop("blocks.1.ffn.l_ff")
    wrong = {
        "blocks.9.attention.l_k": torch.ones(16),
        "blocks.0.attention.l_q": torch.ones(16),
        "nothing": torch.ones(2),
    }
    torch.save({**state, **wrong}, tmp_path / "wrong.pth")
    torch.save(short, tmp_path / "short.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    for name, message in {
        "wrong.pth": r"blocks.9.attention.l_k \[16\], blocks.0.attention.l_q \[16\], nothing \[2\]",
        "short.pth": r"short.pth: lacks .*layers.1.mlp.down_proj.ia3_l",
        "list.pth": "holds no state dict",
        "text.pth": "refused",
    }.items():
        with pytest.raises(UserError, match=message):
            load_policy(PolicyConfig(str(tiny_llama), start=str(tmp_path / name)))


def test_a_malicious_published_file_never_runs(tiny_llama, tmp_path):
    torch.save({"blocks.0.attention.l_k": Malicious(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    for name in ("bad.pth", "raw.pth"):
        with pytest.raises(UserError, match="refused, it is not a file of plain tensors"):
            load_policy(PolicyConfig(str(tiny_llama), start=str(tmp_path / name)))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run"


def test_a_weight_that_the_files_lack_is_not_left_random(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"policy.base.*lack model.layers.1.mlp.up_proj.weight"):
        load_policy(PolicyConfig(str(folder)))


def test_a_quantized_base_is_refused(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"policy.base.*is quantized, which is not supported"):
        load_policy(PolicyConfig(str(folder)))


def test_a_folder_without_a_tokenizer_is_named(tiny_gpt2: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_gpt2, bare, ignore=shutil.ignore_patterns("token*", "special*", "vocab*", "merges*"))
    with pytest.raises(UserError, match=f"policy.base: '{bare}' has no tokenizer"):
        load_tokenizer(str(bare))
