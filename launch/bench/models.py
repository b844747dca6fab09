"""The models that are measured: a small Llama, a published shape, or a folder's; random weights, made once."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.schema import UserError

POSITIONS = 2048


@dataclasses.dataclass(frozen=True)
class Shape:
    """Which model: a Llama of these sizes, the published `shape` of that name, or the weights in a `folder`."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1376
    heads: int = 8
    vocabulary: int = 32000
    shape: str | None = None
    folder: str | None = None

    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig, LlamaConfig

        if self.folder is not None:
            if not (Path(self.folder) / "config.json").is_file():
                raise UserError(f"--model {self.folder}: has no config.json; give a model's folder")
            return AutoConfig.from_pretrained(self.folder)
        if self.shape is not None:
            from trainer.planning.shapes import published

            return published(self.shape)
        if self.hidden % self.heads:
            raise UserError(f"--heads {self.heads}: does not divide --hidden {self.hidden}")
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=POSITIONS,
        )


def make_model(shape: Shape, dtype: str, folder: Path) -> None:
    """Write config and random weights (safetensors, `dtype`) into the folder, or link to those that are given."""
    import torch
    from transformers import AutoModelForCausalLM

    config = shape.config()
    if shape.folder is not None:
        config.save_pretrained(folder)
        _link(Path(shape.folder), folder)
        return
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    torch.manual_seed(0)
    # A 7B model's weights are drawn in minutes by a CPU, and in a second by a GPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.cpu().save_pretrained(folder)


def _link(given: Path, folder: Path) -> None:
    files = [path for path in given.iterdir() if path.name.endswith((".safetensors", ".index.json"))]
    if not files:
        raise UserError(f"--model {given}: has no .safetensors files")
    for path in files:
        os.symlink(path.resolve(), folder / path.name)


def with_tokenizer(model: Path, tokenizer: Path, folder: Path) -> Path:
    """A folder with the model's files, linked, and the tokenizer's."""
    shutil.copytree(tokenizer, folder)
    for path in model.iterdir():
        os.symlink(path.resolve(), folder / path.name)
    return folder
