from __future__ import annotations

import json
import math
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from tests.checkpoint.fit import BATCHES, EPOCHS, Saver, fit
from tests.policy.batches import logits
from tests.policy.test_load import Malicious
from trainer.checkpoint import PortableCheckpointIO, rng_state, set_rng_state, trained_state, verify
from trainer.policy.load import AdapterConfig, PolicyConfig, load_frozen, load_policy, saved_policy
from trainer.schema import UserError

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "resume/state.json",
    "resume/tensors.safetensors",
)
ADAPTERS = {
    "ia3": AdapterConfig(),
    "paper": AdapterConfig(preset="paper"),
    "lora": AdapterConfig(kind="lora", r=4, dropout=0.2),
    "all": None,
}


@pytest.mark.parametrize(
    ("family", "adapter"), [("llama", "ia3"), ("gpt2", "paper"), ("llama", "lora"), ("gpt2", "all")]
)
def test_a_fit_resumes_to_the_bit_and_its_folder_loads_without_us(models, tmp_path, family, adapter):
    base = models(family)
    whole, trainer, history = fit(base, tmp_path / "whole", ADAPTERS[adapter])
    half = tmp_path / "whole" / "checkpoints" / f"step-{2 * BATCHES:08d}"
    resumed, again, rest = fit(base, tmp_path / "again", ADAPTERS[adapter], resume=half, seed=99)

    assert len(history.losses) == EPOCHS * BATCHES
    assert rest.losses == history.losses[2 * BATCHES :]
    assert again.global_step == trainer.global_step
    expected, found = trained_state(whole.policy), trained_state(resumed.policy)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for one, two in zip(
        trainer.optimizers[0].state.values(), again.optimizers[0].state.values(), strict=True
    ):
        assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (t.lr_scheduler_configs[0].scheduler.state_dict() for t in (trainer, again))
    assert one == two
    assert stopping(again) == stopping(trainer)
    state = next(c.state for c in again.callbacks if isinstance(c, Saver))
    assert state[3] == (1, 2)
    assert math.isnan(state["nan"])
    assert state["scores"].dtype == torch.bfloat16

    last = tmp_path / "whole" / "checkpoints" / f"step-{EPOCHS * BATCHES:08d}"
    ours = load_frozen(saved_policy(last))
    if adapter == "all":
        plain = AutoModelForCausalLM.from_pretrained(last)
        assert (last / "tokenizer.json").is_file()
    else:
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), last)
    torch.testing.assert_close(logits(plain.eval()), logits(whole.policy.eval()), rtol=0, atol=1e-6)
    assert torch.equal(logits(ours), logits(whole.policy))


def stopping(trainer) -> dict:
    return next(c.state_dict() for c in trainer.callbacks if isinstance(c, EarlyStopping))


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """A run's folder with four checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    fit(models("llama"), folder)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of one of them, to be damaged."""
    return shutil.copytree(saved / "checkpoints" / f"step-{BATCHES:08d}", tmp_path / "step-3")


def test_a_checkpoint_holds_what_is_trained_and_says_what_it_is(checkpoint, tiny_llama):
    manifest = verify(checkpoint)
    assert (manifest["step"], manifest["epoch"], manifest["kind"]) == (BATCHES, 0, "adapter")
    assert manifest["base"]["name"] == str(tiny_llama)
    assert manifest["prompt_template"] == "{text}"
    assert "torch" in manifest["versions"]
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert len(names) == 6
    assert all(name.endswith("ia3_l") for name in names)
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 60_000
    assert set(manifest["files"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "resume/state.json",
        "resume/tensors.safetensors",
    }


def test_a_checkpoint_can_be_the_start_and_says_its_preset(tiny_gpt2, tmp_path):
    fit(tiny_gpt2, tmp_path, ADAPTERS["paper"])
    config = saved_policy(tmp_path)
    assert config.adapter == AdapterConfig(preset="paper")
    policy = load_policy(PolicyConfig(str(tiny_gpt2), start=str(tmp_path)))
    assert sum(p.numel() for p in policy.parameters() if p.requires_grad) == 2 * (64 + 128)


def test_another_base_is_refused_by_name(checkpoint, tmp_path):
    from tests import tiny_models

    other = tiny_models.make("llama", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=rf"trained on base model '.*llama'.* not on '{other}'"):
        load_policy(PolicyConfig(str(other), start=str(checkpoint)))


def test_generators_are_put_back(checkpoint):
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item())  # noqa: E731
    state = rng_state()
    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected
    first = PortableCheckpointIO().load_checkpoint(checkpoint)
    expected = draw()
    PortableCheckpointIO().load_checkpoint(checkpoint)
    assert draw() == expected
    assert len(first["rng"]) == 1


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_named(checkpoint, tiny_llama, file, damage):
    path = checkpoint / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    with pytest.raises(UserError, match=file):
        PortableCheckpointIO().load_checkpoint(checkpoint)
    if file != "adapter_config.json" or damage != "missing":
        with pytest.raises(UserError, match=file):
            load_policy(PolicyConfig(str(tiny_llama), start=str(checkpoint)))


@pytest.mark.parametrize(
    "file", ["resume/tensors.safetensors", "resume/state.json", "adapter_model.safetensors"]
)
def test_a_pickle_in_a_checkpoint_never_runs(checkpoint, tmp_path, file):
    """Not even where the manifest was forged to fit."""
    (checkpoint / file).write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    from trainer.policy.folders import write_manifest

    write_manifest(checkpoint, {k: v for k, v in manifest.items() if k not in ("files", "seal", "format")})
    verify(checkpoint)
    with pytest.raises(UserError, match=file):
        PortableCheckpointIO().load_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    load = PortableCheckpointIO().load_checkpoint
    torch.save({"a": torch.ones(1)}, tmp_path / "lightning.ckpt")
    (tmp_path / "empty").mkdir()
    plain = shutil.copytree(checkpoint, tmp_path / "plain")
    shutil.rmtree(plain / "resume")
    (plain / "manifest.json").unlink()
    for path, message in {
        "nowhere": "no such file or folder",
        "lightning.ckpt": "is a file",
        "empty": "holds no sound checkpoint",
        "plain": "not a checkpoint that tandem wrote",
    }.items():
        with pytest.raises(UserError, match=message):
            load(tmp_path / path)


class Thing:
    pass


def test_a_state_without_a_safe_form_is_named(tiny_llama, tmp_path):
    io = PortableCheckpointIO()
    about = {"adapter_config": {}, "base": None}
    checkpoint = {"state_dict": {}, "tandem": about, "callbacks": {"Mine": {"things": [1, Thing()]}}}
    with pytest.raises(
        UserError, match=r"checkpoint key 'callbacks/Mine/things/1': a .*Thing has no safe form"
    ):
        io.save_checkpoint(checkpoint, tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="lacks 'tandem'"):
        io.save_checkpoint({"state_dict": {}}, tmp_path / "step-1")


def test_removing_leaves_nothing(checkpoint):
    PortableCheckpointIO().remove_checkpoint(checkpoint)
    assert list(checkpoint.parent.iterdir()) == []


def test_no_module_of_torch_is_needed_to_read_the_tree(saved):
    """The tree is plain JSON: nan and tensors are marked, nothing else is hidden in it."""
    text = (saved / "checkpoints" / f"step-{BATCHES:08d}" / "resume" / "state.json").read_text()
    state = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert state["checkpoint"]["global_step"] == BATCHES
    assert {"loops", "optimizer_states", "lr_schedulers", "callbacks", "rng"} <= set(state["checkpoint"])


def test_sizes_for_llama_2_7b():
    """IA³ of Llama-2-7B with Adam's moments: from shapes alone."""
    from tests.policy.test_adapters import LLAMA_2_7B, on_meta

    policy = on_meta(LLAMA_2_7B)
    state = {name: nn.Parameter(tensor) for name, tensor in trained_state(policy).items()}
    optimizer = torch.optim.AdamW(state.values())
    assert 3 * 4 * sum(p.numel() for g in optimizer.param_groups for p in g["params"]) < 10 * 2**20
