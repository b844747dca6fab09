"""Shapes of published models, so that a plan needs neither their files nor the network."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from trainer.schema import UserError


def _decoder(
    family: str,
    vocabulary: int,
    hidden: int,
    feedforward: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": feedforward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": positions,
        **more,
    }


# As each publisher's config.json says; a test holds the sums against the published numbers of parameters.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _decoder("llama", 32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": _decoder("llama", 32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": _decoder("llama", 32000, 8192, 28672, 80, 64, 8, 4096),
    "llama-3-8b": _decoder("llama", 128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-3-70b": _decoder("llama", 128256, 8192, 28672, 80, 64, 8, 8192),
    "mistral-7b": _decoder("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096),
    "qwen2.5-7b": _decoder("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072, tie_word_embeddings=False),
    "qwen2.5-72b": _decoder("qwen2", 152064, 8192, 29568, 80, 64, 8, 131072, tie_word_embeddings=False),
    "gemma-2-2b": _decoder("gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, head_dim=256),
    "gemma-2-9b": _decoder("gemma2", 256000, 3584, 14336, 42, 16, 8, 8192, head_dim=256),
    "gemma-2-27b": _decoder("gemma2", 256000, 4608, 36864, 46, 32, 16, 8192, head_dim=128),
    "gpt2": {"model_type": "gpt2"},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
}


def published(name: str) -> PretrainedConfig:
    """The config of a model of the table.

    Raises:
        UserError: it is not in the table.
    """
    if name not in SHAPES:
        raise UserError(f"--shape {name}: not known; give one of {', '.join(SHAPES)}")
    settings = dict(SHAPES[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
