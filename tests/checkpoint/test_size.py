"""How large a checkpoint of a large model is, from its shapes: what is trained, and Adam's two moments of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.policy.test_adapters import LLAMA_2_7B, LLAMA_2_70B
from trainer.checkpoint import PortableCheckpointIO, trained_state
from trainer.policy.adapters import AdapterConfig, attach
from trainer.policy.state import adapter_json


@pytest.mark.parametrize(("config", "megabytes"), [(LLAMA_2_7B, 10), (LLAMA_2_70B, 40)])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path, config, megabytes) -> None:
    with torch.device("meta"):
        policy = attach(AutoModelForCausalLM.from_config(config), AdapterConfig())
    state = {name: torch.ones(tensor.shape) for name, tensor in trained_state(policy).items()}
    assert state
    assert all(".ia3_l." in name for name in state)
    moments = {
        i: {"step": torch.tensor(9.0), "exp_avg": torch.rand(t.shape), "exp_avg_sq": torch.rand(t.shape)}
        for i, t in enumerate(state.values())
    }
    checkpoint = {
        "state_dict": state,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}],
        "global_step": 9,
        "tandem": {"adapter_config": adapter_json(policy, "base"), "config": {}},
    }
    PortableCheckpointIO().save_checkpoint(checkpoint, tmp_path / "step-00000009")
    files = [path for path in (tmp_path / "step-00000009").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < megabytes * 1e6
    frozen = {
        name.removeprefix("base_model.model.") for name, p in policy.named_parameters() if not p.requires_grad
    }
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert not {name.removeprefix("base_model.model.") for name in tensors.keys()} & frozen  # noqa: SIM118
    assert json.loads((tmp_path / "step-00000009" / "manifest.json").read_text())["step"] == 9
