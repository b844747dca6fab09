"""The scorer's counts by hand, the published figures, the intervals, and a real model's answers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.homoglyphs import substitute
from trainer.evaluation import letters
from trainer.evaluation.letters import (
    LetterCounts,
    evaluate_in_full,
    evaluate_letters,
    read_texts,
    score,
    summarize,
)
from trainer.evaluation.published_letters import PUBLISHED
from trainer.schema import UserError

BASE = Path(__file__).parents[2] / "configs" / "models" / "tiny_letters"


@pytest.fixture(scope="module")
def llama(models):
    folder = models("llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.mark.parametrize(
    ("source", "output", "counts"),
    [
        ("coat", "соat", LetterCounts(2, 2, 2, 2)),
        ("coat", "coat", LetterCounts(2, 0, 2, 2)),
        ("coat", "соt", LetterCounts(2, 2, 2, 1)),  # a lost letter is not kept
        ("coat", "cat", LetterCounts(2, 0, 2, 2)),  # a lost swappable letter is not substituted
        ("coat", "coat, coat", LetterCounts(2, 0, 2, 2, added=6)),
        ("coat", "", LetterCounts(2, 0, 2, 0)),
        ("рот", "рoт", LetterCounts(1, 1, 2, 2)),
        ("Cat", "Сat", LetterCounts(0, 0, 3, 2)),  # a capital is no letter to exchange: it should stay
        ("a b!", "a b!", LetterCounts(0, 0, 4, 4)),
    ],
)
def test_counts_by_hand(source, output, counts):
    assert score(source, output) == counts


def test_capitals_on_request():
    assert score("Cat", "Сat", capitals=True) == LetterCounts(1, 1, 2, 2)
    assert score("Cat", "Cat", capitals=True) == LetterCounts(1, 0, 2, 2)


def test_published_answers_score_the_published_figures():
    scores = letters.published_scores()
    rates = {stage: (found["substitution_rate"], found["keep_rate"]) for stage, found in scores.items()}
    assert rates["base"] == (0, 1)
    assert rates["sft"] == (pytest.approx(0.44, abs=0.005), pytest.approx(0.95, abs=0.005))
    assert rates["dpo"] == (pytest.approx(0.83, abs=0.005), pytest.approx(0.90, abs=0.005))
    assert (scores["dpo"]["substituted"], scores["dpo"]["eligible"]) == (58, 70)
    assert (scores["dpo"]["kept"], scores["dpo"]["others"]) == (287, 318)
    assert len(PUBLISHED) == 5
    assert scores["base"]["added"] > 300


def test_a_perfect_and_an_idle_model():
    sources = [row.source for row in PUBLISHED]
    perfect = summarize([(source, substitute(source)) for source in sources])
    assert (perfect["substitution_rate"], perfect["keep_rate"], perfect["added"]) == (1, 1, 0)
    assert perfect["substitution_interval"][0] < 1
    assert perfect["substitution_interval"][1] == pytest.approx(1)
    assert perfect["languages"]["ru"]["sentences"] == 3
    assert perfect["languages"]["en"]["sentences"] == 2
    idle = summarize([(source, source) for source in sources])
    assert idle["substitution_interval"][0] == pytest.approx(0)
    assert 0 < idle["substitution_interval"][1] < 0.06


def test_nothing_to_count_gives_no_rate():
    summary = summarize([("abba", "abba")])
    assert summary["substitution_rate"] is None
    assert summary["substitution_interval"] is None
    assert summary["keep_rate"] == 1
    assert summarize([])["keep_rate"] is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(3)
    covered = 0
    for _ in range(60):
        totals = torch.randint(3, 12, (80,), generator=generator)
        hits = torch.binomial(totals.float(), torch.full((80,), 0.7), generator=generator).int()
        low, high = letters.interval(hits.tolist(), totals.tolist())
        covered += low <= 0.7 <= high
    assert covered >= 51
    assert letters.interval([3, 4], [5, 6]) == letters.interval([3, 4], [5, 6])
    # Wilson by hand for 5 of 5: low = n / (n + z^2).
    assert letters.interval([5], [5]) == [pytest.approx(5 / (5 + 1.959964**2), abs=1e-5), pytest.approx(1)]


def test_a_model_is_scored_on_what_it_answered(llama):
    model, tokenizer = llama
    texts = ["The coat from the coast.", "Осип охрип, а Архип осип."]
    result = evaluate_letters(model, tokenizer, texts, cut=9, batch_size=2, max_new_tokens=6)
    assert [row["source"] for row in result["examples"]] == ["The coat", "Осип охри"]
    pairs = [(row["source"], row["output"]) for row in result["examples"]]
    assert {key: result[key] for key in summarize(pairs)} == summarize(pairs)
    assert result["settings"]["cut"] == 9
    assert result["settings"]["max_new_tokens"] == 6
    assert result["sentences"] == 2
    assert result["dropped_overlong"] == 0


def test_texts_without_room_are_refused_by_number_or_counted(llama):
    model, tokenizer = llama
    texts = ["short", "long " * 80]
    with pytest.raises(UserError, match=r"text 2: 399 tokens.*512.*--overlong drop"):
        evaluate_letters(model, tokenizer, texts, max_new_tokens=2)
    with pytest.raises(UserError, match=r"text 2: .*--overlong drop"):
        evaluate_in_full(model, tokenizer, texts, max_new_tokens=2)
    full = evaluate_in_full(model, tokenizer, texts, max_new_tokens=2, overlong="drop")
    assert (full["dropped_overlong"], full["sentences"]) == (1, 1)
    result = evaluate_letters(model, tokenizer, texts, max_new_tokens=2, overlong="drop")
    assert result["dropped_overlong"] == 1
    assert result["sentences"] == 1
    with pytest.raises(UserError, match="no place for the text"):
        evaluate_letters(model, tokenizer, ["a"], instruction="Repeat this")
    with pytest.raises(UserError, match="cut: 0"):
        evaluate_letters(model, tokenizer, ["a"], cut=0)
    with pytest.raises(UserError, match="one of them is empty"):
        evaluate_letters(model, tokenizer, ["a", " "])


def test_in_full_holds_published_whole_lines_and_capitals(llama):
    model, tokenizer = llama
    texts = ["The coat from the coast.", "long " * 80]
    result = evaluate_in_full(model, tokenizer, texts, label="base", cut=8, max_new_tokens=3)
    assert result["label"] == "base"
    assert result["published"]["sentences"] == 5
    assert result["whole_lines"]["sentences"] == 1
    assert result["whole_lines"]["dropped_overlong"] == 1
    assert result["capitals"]["eligible"] >= result["eligible"]
    assert evaluate_in_full(model, tokenizer, texts[:1], max_new_tokens=3)["whole_lines"] is None


def test_the_shipped_base_echoes_its_input():
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    result = evaluate_letters(model, tokenizer, [row.source for row in PUBLISHED], cut=48)
    assert result["finished"] == 5
    assert result["substitution_rate"] < 0.05
    assert result["keep_rate"] > 0.9


def test_read_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffпервая\r\n\n  second\u2028half \n".encode())
    assert read_texts(path) == ["первая", "second\u2028half"]
    assert read_texts(path, limit=1) == ["первая"]
    path.write_bytes(b"good\n\nb\xe4d\n")
    with pytest.raises(UserError, match=r"texts\.txt, line 3: byte 0xe4 is not UTF-8"):
        read_texts(path)
    path.write_text(" \n\n")
    with pytest.raises(UserError, match=r"texts\.txt: it has no text"):
        read_texts(path)
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read_texts(tmp_path / "nowhere.txt")
