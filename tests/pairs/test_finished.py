"""Completions that were cut did not end: from the file to the tokens, no EOS stands behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.tokenizers_of_kinds import CHATML
from tests.tiny_models import byte_tokenizer
from trainer.data.preferences import DemonstrationFile, PreferenceFile
from trainer.data.tokenize import Limits, tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from trainer.schema import Demonstration, Message, Preference, UserError

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
USER: Message = {"role": "user", "content": "question"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("rejected", [True, False])
def test_only_what_is_finished_gets_an_eos(chosen, rejected) -> None:
    record = Preference("p", "good", "bad", "id", "", chosen, rejected)
    (made,) = tokenize_preferences([record], TOKENIZER)
    assert made.chosen == ids("good") + [EOS] * chosen
    assert made.rejected == ids("bad") + [EOS] * rejected
    (shown,) = tokenize_demonstrations([Demonstration("p", "good", "id", finished=chosen)], TOKENIZER)
    assert shown.completion == made.chosen


def test_a_cut_text_and_the_same_text_with_its_end_are_no_twins() -> None:
    record = Preference("p", "the same", "the same", "id", "", True, False)
    (made,) = tokenize_preferences([record], TOKENIZER)
    assert made.chosen == [*made.rejected, EOS]


def test_a_cut_answer_in_a_chat_ends_with_its_words() -> None:
    record = Preference([USER], "an answer", "another", "id", "", False, True)
    (made,) = tokenize_preferences([record], TOKENIZER)
    assert TOKENIZER.decode(made.chosen) == "an answer"
    assert TOKENIZER.decode(made.rejected) == "another</s>"
    shouting = byte_tokenizer()
    shouting.chat_template = shouting.chat_template.replace("m['content']", "m['content'] | upper")
    with pytest.raises(
        UserError, match="row 3: chosen is not finished, and the chat template changes its words"
    ):
        tokenize_preferences([Preference([USER], "an answer", "b", "id", "row 3", False, True)], shouting)


@pytest.mark.parametrize("words", ["im", "end", "|", "an end, i", "</s"])
def test_a_cut_answer_may_say_what_the_template_s_closing_says(words) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    (made,) = tokenize_preferences([Preference([USER], words, "b", "id", "", False, True)], tokenizer)
    assert tokenizer.decode(made.chosen) == words


def test_limits_count_what_is_there() -> None:
    limits = Limits(max_length=6)
    record = Preference("p", "good", "bad", "id", "", False, False)
    assert len(tokenize_preferences([record], TOKENIZER, limits)) == 1, "BOS, p, and four bytes without EOS"
    with pytest.raises(UserError, match="over max_length 6"):
        tokenize_preferences([Preference("p", "good", "bad", "id")], TOKENIZER, limits)


def test_files_say_what_is_finished(tmp_path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write(
        tmp_path / "x.jsonl",
        row,
        row | {"chosen_finished": False, "rejected_finished": True},
        row | {"chosen_finished": True, "rejected_finished": False},
        row | {"chosen_finished": True, "rejected_finished": True},
    )
    loaded = PreferenceFile(path, validation_fraction=0).load("train")
    found = [(record.chosen_finished, record.rejected_finished) for record in loaded.records]
    assert found == [(True, True), (False, True), (True, False)]
    assert loaded.counts["dropped_duplicate"] == 1, "the last says what the first does"


def test_words_of_a_csv_and_other_names(tmp_path) -> None:
    (tmp_path / "x.csv").write_text("prompt,completion,done\np,a,True\np,b,false\np,c,\n")
    source = DemonstrationFile(str(tmp_path / "x.csv"), columns={"finished": "done"}, validation_fraction=0)
    assert [record.finished for record in source.load("train").records] == [True, False, True]
    (tmp_path / "y.csv").write_text("prompt,completion,finished\np,a,on Monday\n")
    with pytest.raises(UserError, match=r"y\.csv, row 1: column 'finished' holds 'on Monday'.*true or false"):
        DemonstrationFile(str(tmp_path / "y.csv")).load("train")


def test_pairs_without_prompt_both_train_and_validate(tmp_path) -> None:
    """Their prompt is the same, nothing: they are parted by what they say."""
    rows = [{"prompt": "", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(200)]
    source = PreferenceFile(write(tmp_path / "x.jsonl", *rows), validation_fraction=0.3)
    train, validation = ({r.chosen for r in source.load(split).records} for split in ("train", "validation"))
    assert 30 < len(validation) < 90
    assert len(train) + len(validation) == 200


def test_many_prompts_at_once_are_each_by_itself() -> None:
    assert tokenize_prompts(["", "abc"], TOKENIZER) == [[1], [1, *ids("abc")]]
