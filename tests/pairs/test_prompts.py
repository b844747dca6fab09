"""Prompts: the first tokens of texts, as they are written there, in parts that share none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tiny_models import byte_tokenizer
from trainer.pairs.prompts import NoPrompt, TextPrompts
from trainer.schema import UserError

REVIEWS = Path(__file__).resolve().parents[3] / "shared" / "data" / "imdb" / "reviews.jsonl.gz"
TOKENIZER = byte_tokenizer()


def write(path: Path, *texts: object) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def test_the_first_tokens_of_each_text_once(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", "  the first film", "the first of all", "", None, "the first", "short")
    found = TextPrompts(path, tokens=9, part="all").load(TOKENIZER)
    assert [prompt.text for prompt in found.prompts] == ["the first"]
    assert found.counts == {
        "rows": 6, "kept": 1, "dropped_duplicate": 1, "other_parts": 0, "dropped_blank": 2, "dropped_short": 2,
        "dropped_over_limit": 0,
    }  # fmt: skip


def test_no_character_is_cut_in_two(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", "один текст")
    (prompt,) = TextPrompts(path, tokens=3, part="all").load(TOKENIZER).prompts
    assert prompt.text == "од", "the third byte is the first of two"


def test_order_and_part_follow_from_the_content(tmp_path) -> None:
    texts = [f"prompt number {i}" for i in range(200)]
    one, two = write(tmp_path / "a.jsonl", *texts), write(tmp_path / "b.jsonl", *reversed(texts[:150]))
    parts = {
        (path, part): [
            prompt.text
            for prompt in TextPrompts(path, tokens=None, part=part, held_out_fraction=0.3).load().prompts
        ]
        for path in (one, two)
        for part in ("train", "held_out")
    }
    assert not set(parts[one, "train"]) & set(parts[one, "held_out"])
    assert not set(parts[one, "train"]) & set(parts[two, "held_out"])
    assert set(parts[one, "train"]) | set(parts[one, "held_out"]) == set(texts)
    assert 30 < len(parts[one, "held_out"]) < 90
    assert parts[two, "train"] == [text for text in parts[one, "train"] if text in texts[:150]]
    few = TextPrompts(one, tokens=None, held_out_fraction=0.3, limit=5).load()
    assert [prompt.text for prompt in few.prompts] == parts[one, "train"][:5]
    assert few.counts["dropped_over_limit"] == len(parts[one, "train"]) - 5


def test_no_prompt_has_keys_of_its_own() -> None:
    first, others = NoPrompt(3).load().prompts, NoPrompt(3, first=3).load().prompts
    assert {prompt.text for prompt in first} == {""}
    assert len({prompt.key for prompt in [*first, *others]}) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"part": "test"}, "part is 'test'"),
        ({"part": "all", "held_out_fraction": 0.2}, "no effect with part: all"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction is 1\.0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"column": "review"}, "no column 'review'"),
        ({"tokens": 900}, r"no prompt is left for part 'train'.*dropped_short 1"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, settings, message) -> None:
    path = write(tmp_path / "x.jsonl", "a text of some words")
    with pytest.raises(UserError, match=message) as caught:
        TextPrompts(path, **settings).load(TOKENIZER)
    assert "x.jsonl" in str(caught.value)
    with pytest.raises(UserError, match="count is 0"):
        NoPrompt(0)


def test_tokens_need_a_tokenizer(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", "a text of some words")
    with pytest.raises(UserError, match="the first 8 tokens need a tokenizer"):
        TextPrompts(path).load()


@pytest.mark.skipif(not REVIEWS.is_file(), reason=f"the real reviews are not at {REVIEWS}")
def test_real_reviews(tiny_gpt2) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    train, held = (
        TextPrompts(str(REVIEWS), tokens=16, part=part).load(tokenizer) for part in ("train", "held_out")
    )
    assert train.counts["rows"] == 1000
    assert len(train.prompts) > 600
    assert 30 < len(held.prompts) < 200
    assert not {prompt.text for prompt in train.prompts} & {prompt.text for prompt in held.prompts}
    assert all(len(tokenizer.encode(prompt.text)) == 16 for prompt in train.prompts if prompt.text.isascii())


def test_a_repeated_prompt_has_a_key_each_time(tmp_path) -> None:
    path = write(tmp_path / "texts.jsonl", "one text here", "two texts here")
    once = TextPrompts(path, tokens=None, part="all").load()
    twice = TextPrompts(path, tokens=None, part="all", repeat=2).load()
    assert [each.text for each in twice.prompts] == [each.text for each in once.prompts for _ in range(2)]
    assert len({each.key for each in twice.prompts}) == 4
    assert twice.prompts[::2] == once.prompts
    assert twice.counts["kept"] == 4
