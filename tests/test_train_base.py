"""The tiny base: its training from scratch on a tiny shape, and the folder that is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import train_base
from launch.train_base import Schedule, Shape
from trainer.data.homoglyphs import INSTRUCTION

SHIPPED = Path(__file__).parents[1] / "configs" / "models" / "tiny_letters"
SHAPE = Shape(layers=1, hidden=16, intermediate=32, heads=2, positions=512)


def schedule(steps: int) -> Schedule:
    # Learning rate without decay: the first steps of a longer run are then those of a shorter one.
    return Schedule(
        steps=steps,
        tokens_per_step=256,
        warmup_steps=2,
        decay_fraction=0.0,
        short_length=16,
        snapshot_every=2,
    )


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_base.held_out
    monkeypatch.setattr(train_base, "held_out", lambda seed, count: whole(seed, 2))


def main(root: Path, steps: int, **kwargs: object) -> dict[str, torch.Tensor]:
    train_base.main(root / "model", root / "work", SHAPE, schedule(steps), seed=3, **kwargs)  # type: ignore[arg-type]
    return load_file(root / "model" / "model.safetensors")


def test_trains_resumes_and_writes_a_model_that_transformers_loads(
    tmp_path: Path, few_texts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("The coat\n\nсорок сорок\n", encoding="utf-8")
    half = main(tmp_path / "halves", 2)
    capsys.readouterr()
    resumed = main(tmp_path / "halves", 4, eval_files=(lines,))
    figures = json.loads(capsys.readouterr().out[-2000:].partition("\n{\n")[2].join(("{", "")))
    assert set(figures) == {"ru", "en", "all kinds", "mixed scripts", "lines.txt"}
    assert all(0 <= share <= 100 for each in figures.values() for share in each.values())
    whole = main(tmp_path / "whole", 4)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert any(not torch.equal(resumed[name], tensor) for name, tensor in half.items())

    folder = tmp_path / "halves" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert f"{model.num_parameters():,} parameters" in (folder / "README.md").read_text(encoding="utf-8")
    assert {name for name, _ in model.named_parameters()} == set(resumed)
    check_tokenizer(folder)
    assert not (folder / ".partial").exists()


def check_tokenizer(folder: Path) -> None:
    """One token a character, BOS once, and the text back."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = INSTRUCTION.format(text="Хитрую сороку — «yes», ёж № 5!")
    ids = tokenizer(text).input_ids
    assert len(ids) == 1 + len(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "so"}], tokenize=False)
    assert chat == tokenizer.bos_token + INSTRUCTION.format(text="so")


def test_figures_are_those_of_the_letters_scorer() -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    texts = ["The coat from the coast.", "сорок сорок"]
    figures = train_base.evaluate(model, AutoTokenizer.from_pretrained(SHIPPED), {"two": texts})
    assert figures == {"two": {"exact": 100.0, "substituted": 0.0, "kept": 100.0}}


def test_the_shipped_folder_is_small_and_whole() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    tensors = load_file(SHIPPED / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) <= 2_000_000
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.num_parameters() <= 2_000_000
    # The output layer is the embeddings' own tensor; all else is in the file by its name.
    assert {name for name, _ in model.named_parameters()} == set(tensors)
    check_tokenizer(SHIPPED)
