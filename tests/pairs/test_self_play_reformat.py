"""Any chats into SPIN's format: which answers, which split, and whether an answer ended."""

from __future__ import annotations

import pytest

from launch.cli import main
from tests.pairs.test_self_play import CHAT, lines, turns, write
from trainer.data.self_play import SpinChats, chat_source, spin_row_of
from trainer.pairs.self_play import read_chats, reformat
from trainer.schema import UserError


@pytest.mark.parametrize(
    ("row", "history", "real"),
    [
        ({"messages": CHAT}, CHAT[:-1], "four"),
        ({"prompt": "one?", "prompt_id": "x", "messages": CHAT[1:3]}, CHAT[1:2], "two"),
        ({"prompt": "one?", "response": "two"}, CHAT[1:2], "two"),
        ({"prompt": "one?", "completion": "two"}, CHAT[1:2], "two"),
        ({"prompt": CHAT[:2], "completion": CHAT[2:3]}, CHAT[:2], "two"),
        ({"prompt": "one?", "chosen": "two", "rejected": "no"}, CHAT[1:2], "two"),
        ({"chosen": CHAT, "rejected": [*CHAT[:-1], {**CHAT[-1], "content": "no"}]}, CHAT[:-1], "four"),
        ({"real": CHAT, "generated": CHAT}, CHAT[:-1], "four"),
    ],
)
def test_any_chats_become_spin_s_format(row, history, real, tmp_path):
    source = chat_source(str(write(tmp_path / "in.jsonl", [row])), validation_fraction=0.0)
    reformat(source, tmp_path / "out", tests=False)
    empty = {"role": "assistant", "content": ""}
    (line,) = lines(tmp_path / "out" / "train.jsonl")
    assert line == {"real": [*history, {**empty, "content": real}], "generated": [*history, empty]}
    again = chat_source(str(tmp_path / "out" / "train.jsonl"), validation_fraction=0.0).load("train")
    assert [spin_row_of(record)[1:] for record in again.records] == [(history, real, True)]


def test_a_test_of_another_time_does_not_stay(tmp_path):
    rows = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(40)]
    path, out = str(write(tmp_path / "in.jsonl", rows)), tmp_path / "out"
    first = reformat(chat_source(path, validation_fraction=0.25), out)
    assert first["counts"]["test"]["kept"] == len(lines(out / "test.jsonl")) > 0
    (out / "train.txt").write_text("not SPIN's\n")
    reformat(chat_source(path, validation_fraction=0.0), out, tests=False)
    assert {split: len(rows) for split, rows in read_chats(out).rows.items()} == {"train": 40}


def test_parquet_and_the_published_arguments(tmp_path, monkeypatch, capsys):
    from datasets import Dataset

    rows = [{"messages": turns(f"q {i}", f"a {i}")} for i in range(40)]
    Dataset.from_list(rows).to_parquet(tmp_path / "chats.parquet")
    monkeypatch.chdir(tmp_path)
    assert main(["spin", "reformat", "--data", "chats.parquet", "--test_fraction", "0.25"]) == 0
    train, test = (lines(tmp_path / "formatted" / f"{split}.jsonl") for split in ("train", "test"))
    assert len(train) + len(test) == 40
    assert 3 < len(test) < 20
    assert not {row["real"][0]["content"] for row in train} & {row["real"][0]["content"] for row in test}
    assert f"train: {len(train)} chats: formatted" in capsys.readouterr().out


def test_a_real_answer_that_was_cut_stays_cut(tmp_path):
    """In SFT of the formatted chats, and when they are formatted again."""
    rows = [{"prompt": f"q {i}", "completion": f"a {i}", "finished": i % 2 == 0} for i in range(8)]
    reformat(
        chat_source(str(write(tmp_path / "in.jsonl", rows)), validation_fraction=0.0), tmp_path / "one", False
    )
    path = tmp_path / "one" / "train.jsonl"
    reformat(chat_source(str(path), validation_fraction=0.0), tmp_path / "two", False)
    assert (tmp_path / "two" / "train.jsonl").read_bytes() == path.read_bytes()
    learned = list(SpinChats(str(path), validation_fraction=0.0).load("train").records)
    assert [record.finished for record in learned] == [i % 2 == 0 for i in range(8)]
    whole = write(tmp_path / "published.jsonl", [{"real": turns("q", "a"), "generated": []}])
    (record,) = SpinChats(str(whole), validation_fraction=0.0).load("train").records
    assert record.finished
    with pytest.raises(UserError, match="no column 'real'; its columns are: prompt, completion, finished"):
        SpinChats(str(tmp_path / "in.jsonl")).load("train")


def test_the_test_has_a_limit_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(60)])
    words = ["spin", "reformat", "--data", "in.jsonl", "--test_fraction", "0.5", "--limit", "9"]

    def sizes(*more: str) -> list[int]:
        assert main([*words, *more]) == 0
        return [len(lines(tmp_path / "formatted" / f"{split}.jsonl")) for split in ("train", "test")]

    assert sizes() == [9, 9]
    assert sizes("--test_limit", "2") == [9, 2]
    assert main([*words, "--test_fraction", "0", "--test_limit", "2"]) == 2
    assert "--test_limit 2: has no effect with --test_fraction 0" in capsys.readouterr().err


def test_columns_that_are_no_chat_are_named(tmp_path):
    path = write(tmp_path / "in.jsonl", [{"question": "one?", "reply": "two"}])
    with pytest.raises(UserError, match=r"in.jsonl: its columns are question, reply; a chat needs messages"):
        chat_source(str(path))
