"""Pairs that are measured: their lengths, and the same token ids on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from launch.bench.workloads import GENERATED, MAX_LENGTH, Workload, digest, make_workload
from trainer.data.tokenize import tokenize_preferences
from trainer.schema import Preference, UserError

WORDS = ("a", "fine", "day", "to", "ask", "whether", "it", "rains", "in", "Bergen,", "and", "how", "often?")


def rows_of(workload: Workload) -> list[dict[str, str]]:
    return [json.loads(line) for line in workload.file.read_text(encoding="utf-8").splitlines()]


def ours(workload: Workload) -> list[tuple[list[int], list[int], list[int]]]:
    """The ids as tandem makes them: prompt and completions apart."""
    tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer)
    records = [Preference(**row, id=str(i)) for i, row in enumerate(rows_of(workload))]
    return [
        (list(e.prompt), list(e.chosen), list(e.rejected)) for e in tokenize_preferences(records, tokenizer)
    ]


def theirs(workload: Workload) -> list[tuple[list[int], list[int], list[int]]]:
    """The ids as TRL 1.16 makes them: prompt and completion together, cut where the two sequences part."""
    tokenizer, found = AutoTokenizer.from_pretrained(workload.tokenizer), []
    for row in rows_of(workload):
        prompt = tokenizer(row["prompt"])["input_ids"]
        both = [tokenizer(row["prompt"] + row[name] + "</s>")["input_ids"] for name in ("chosen", "rejected")]
        assert all(ids[: len(prompt)] == prompt for ids in both)
        found.append((prompt, both[0][len(prompt) :], both[1][len(prompt) :]))
    return found


def dialogues(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)

    def said(least: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(least, 30))))

    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(count):
            prompt = f"\n\nHuman: {said(1)}\n\nAssistant:"
            row = {"chosen": f"{prompt} {said(2)}", "rejected": f"{prompt} {said(2)}"}
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("name", GENERATED)
def test_both_sides_make_the_ids_that_were_meant(name, tmp_path):
    made = make_workload(name, tmp_path, 6, 500, 0)
    assert ours(made) == theirs(made) == made.ids
    assert digest(ours(made)) == made.describe()["digest"]


def test_real_rows_give_both_sides_the_same_ids(tmp_path):
    made = make_workload(f"hh_rlhf={dialogues(tmp_path / 'rows.jsonl', 40)}", tmp_path / "w", 12, 400, 0)
    assert ours(made) == theirs(made) == made.ids
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in rows_of(made))
    assert len({row["chosen"] for row in rows_of(made)}) == 12


def test_lengths_like_those_of_hh_rlhf(tmp_path):
    made = make_workload("hh_like", tmp_path, 1200, 32000, 0)
    lengths = np.array([[len(part) for part in pair] for pair in made.ids])
    assert (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max() <= MAX_LENGTH
    # Medians are e to the fitted means.
    assert np.median(lengths, axis=0) == pytest.approx([73.7, 26.8, 33.4], rel=0.15)
    assert lengths.min() >= 2


def test_the_same_seed_gives_the_same_pairs_and_another_one_others(tmp_path):
    digests = [
        make_workload("long_answers", tmp_path / str(i), 4, 500, seed).describe()["digest"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_knows_order_within_a_pair_but_not_between_pairs():
    first, second = ([1, 2], [3], [4]), ([5], [6], [7])
    assert digest([first, second]) == digest([second, first])
    assert digest([first]) != digest([([1, 2], [4], [3])])
    assert digest([([1], [2, 3], [4])]) != digest([([1, 2], [3], [4])])


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="--workloads hh_liek: not known; give one of hh_like"):
        make_workload("hh_liek", tmp_path, 4, 500, 0)
    with pytest.raises(UserError, match="--pairs asks for 50"):
        make_workload(f"hh_rlhf={dialogues(tmp_path / 'few.jsonl', 5)}", tmp_path / "w", 50, 400, 0)
