"""Models loaded under ZeRO-3 are the models, in each family and dtype, and no rank ever holds a whole one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Phi3Config

from tests.distributed.ranks import on_ranks
from tests.tiny_models import byte_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1000)]

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt2")


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """Each family; a model in several files; GPT-2's body alone, as on the hub; and one under other names."""
    root = tmp_path_factory.mktemp("loading")
    made = {family: models(family) for family in FAMILIES}
    split = AutoModelForCausalLM.from_pretrained(made["llama"])
    split.save_pretrained(root / "split", max_shard_size="40KB")
    body = AutoModelForCausalLM.from_pretrained(made["gpt2"])
    body.base_model.save_pretrained(root / "body")
    config = MixtralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "experts")
    turned = Phi3Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
                         "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 32},
    )  # fmt: skip
    AutoModelForCausalLM.from_config(turned).save_pretrained(root / "longrope")
    assert len(list((root / "split").glob("*.safetensors"))) > 2
    made |= {name: root / name for name in ("split", "body", "experts", "longrope")}
    return made


@pytest.fixture(scope="module")
def seen(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("seen")
    (out / "plan.json").write_text(
        json.dumps({"models": [str(folder) for folder in folders.values()], "out": str(out / "seen.json")})
    )
    on_ranks("tests.distributed.loading", out / "plan.json", ranks=2)
    return json.loads((out / "seen.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FAMILIES, "split", "body", "experts", "longrope"])
def test_a_sharded_model_is_the_model(seen, folders, name, dtype) -> None:
    for way in seen[f"{folders[name]}.{dtype}"].values():
        assert way == {"same": True, "sharded": True, "dtypes": [f"torch.{dtype}"], "stops": True}


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(tmp_path) -> None:
    """600 MB over four ranks: a quarter each, and what gloo holds for a rank that lags (up to 0.73 was seen)."""
    config = LlamaConfig(
        vocab_size=259, hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "large")
    byte_tokenizer().save_pretrained(tmp_path / "large")
    plan = {"models": [], "large": str(tmp_path / "large"), "out": str(tmp_path / "seen.json")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    on_ranks("tests.distributed.loading", tmp_path / "plan.json", ranks=4)
    grown = json.loads((tmp_path / "seen.json").read_text())["grown"]
    assert all(0.25 <= share < 0.9 for share in grown), grown
