"""Files of pairs: a test split that shares no prompt with the others, and broken rows, dropped and listed."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from trainer.data.preferences import DemonstrationFile, PreferenceFile
from trainer.schema import UserError

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_rlhf" / "harmless-base.jsonl.gz"


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(prompt: Any = "p", chosen: Any = "c", rejected: Any = "r") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompts(source: PreferenceFile, split: Any) -> set[str]:
    return {str(record.prompt) for record in source.load(split).records}


def test_three_splits_share_no_prompt(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", *(row(f"p{n % 100}", f"c{n}") for n in range(300)))
    source = PreferenceFile(path, validation_fraction=0.2, test_fraction=0.3)
    splits = {split: prompts(source, split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 100
    assert 15 < len(splits["test"]) < 45
    assert 5 < len(splits["validation"]) < 30
    loaded = source.load("test")
    assert loaded.counts["other_splits"] == 300 - len(loaded.records)
    assert source.fingerprint("test") == loaded.hashes


def test_a_test_split_takes_nothing_from_a_named_validation_file(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", *(row(f"p{n}") for n in range(100)))
    other = write(tmp_path / "y.jsonl", *(row(f"p{n}") for n in range(50, 150)))
    source = PreferenceFile(path, validation_path=other, test_fraction=0.3)
    splits = [prompts(source, split) for split in ("train", "validation", "test")]
    assert not splits[0] & splits[1]
    assert not splits[2] & (splits[0] | splits[1])
    assert splits[2] <= {f"p{n}" for n in range(100)}


def test_without_a_test_fraction_the_splits_are_what_they_were(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", *(row(f"p{n}") for n in range(100)))
    plain, none = (
        PreferenceFile(path, validation_fraction=0.2),
        PreferenceFile(path, None, None, None, 0.2, 0.0),
    )
    assert prompts(plain, "validation") == prompts(none, "validation")
    with pytest.raises(UserError, match=r"no test split is set \(test_fraction\)"):
        none.load("test")
    with pytest.raises(UserError, match="test_fraction is 1"):
        PreferenceFile(path, test_fraction=1)


BROKEN = [row("p", None), row(), row("p", 3), row("q", [{"role": "human", "content": "x"}], "r"), row(None)]


def test_broken_rows_are_dropped_counted_and_listed(tmp_path, caplog) -> None:
    path = write(tmp_path / "x.jsonl", *BROKEN)
    with pytest.raises(UserError, match="row 1: column 'chosen' is missing"):
        PreferenceFile(path, validation_fraction=0).load("train")
    source = PreferenceFile(path, validation_fraction=0, broken="drop")
    with caplog.at_level(logging.WARNING):
        loaded = source.load("train")
    assert (loaded.counts["kept"], loaded.counts["dropped_broken"]) == (1, 4)
    lines = caplog.messages[0].split("\n")
    assert lines[0] == "4 broken rows are left out:"
    assert [line.split(": ")[0] for line in lines[1:]] == [f"{path}, row {n}" for n in (1, 3, 4, 5)]
    assert "role 'human'" in lines[3]


LINES = [b'{"prompt": "p", ', b'"text"', b'{"prompt": "\xff"}', b'{"chosen": "\\ud83d"}', b"[" * 100_000]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_that_cannot_be_read_are_broken_rows(tmp_path, caplog, pack) -> None:
    good = json.dumps(row()).encode()
    path = tmp_path / ("x.jsonl.gz" if pack is gzip.compress else "x.jsonl")
    path.write_bytes(pack(b"\n".join([good, b"", *LINES, json.dumps(row("q")).encode()])))
    with pytest.raises(UserError, match=r"x\.jsonl(\.gz)?:\d: not"):
        PreferenceFile(str(path), validation_fraction=0).load("train")
    source = PreferenceFile(str(path), validation_fraction=0, broken="drop")
    with caplog.at_level(logging.WARNING):
        loaded = source.load("train")
    assert [record.prompt for record in loaded.records] == ["p", "q"]
    assert (loaded.counts["rows"], loaded.counts["dropped_broken"]) == (7, 5)
    told = caplog.messages[0].split("\n")[1:]
    assert [line.split(": ")[0] for line in told] == [f"{path}:{n}" for n in (3, 4, 5, 6, 7)]
    assert [origin for origin, _ in source.left_out("train")] == [f"{path}, row {n}" for n in range(2, 7)]
    assert source.load("train").records[1].origin == f"{path}, row 7"


def test_broken_lines_of_a_named_validation_file(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", row("p"), row("q"))
    other = tmp_path / "y.jsonl"
    other.write_bytes(b"no\n" + json.dumps(row("p")).encode())
    source = PreferenceFile(path, validation_path=str(other), broken="drop")
    assert prompts(source, "train") == {"q"}
    assert source.load("validation").counts["dropped_broken"] == 1


def test_a_file_of_broken_lines_only_is_refused(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"no\nneither\n")
    with pytest.raises(UserError, match=r"all 2 lines are broken; the first: .*x\.jsonl:1: not valid JSON"):
        PreferenceFile(str(tmp_path / "x.jsonl"), broken="drop").load("train")
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    with pytest.raises(UserError, match="not a whole gzip file"):
        PreferenceFile(str(tmp_path / "y.jsonl.gz"), broken="drop").load("train")


def test_a_long_list_is_cut(tmp_path, caplog) -> None:
    path = write(tmp_path / "x.jsonl", row(), *(row("p", None) for _ in range(25)))
    with caplog.at_level(logging.WARNING):
        PreferenceFile(path, validation_fraction=0, broken="drop").load("train")
    assert caplog.messages[0].endswith("\nand 15 more")
    assert len(caplog.messages[0].split("\n")) == 12


def test_where_all_rows_are_broken_the_settings_are(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", {"chosen": "c", "rejected": "r"}, {"chosen": "d", "rejected": "r"})
    with pytest.raises(UserError, match=r"all 2 rows are broken; the first: .*set prompt_ends"):
        PreferenceFile(path, broken="drop").load("train")
    with pytest.raises(UserError, match="prompt_ends is for plain text"):
        PreferenceFile(write(tmp_path / "y.jsonl", row()), broken="drop", prompt_ends="A:").load("train")


def test_empty_completions_follow_their_own_setting(tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", row(), row("p", ""))
    with pytest.raises(UserError, match="row 2: column 'chosen' is empty"):
        PreferenceFile(path, broken="drop", validation_fraction=0).load("train")
    with pytest.raises(UserError, match="broken is 'keep'"):
        PreferenceFile(path, broken="keep")  # type: ignore[arg-type]


def test_every_row_that_no_split_has_is_told(tmp_path) -> None:
    rows = [row(), row(), row("p", "c", "c"), row("p", None), row("p", " ")]
    source = PreferenceFile(
        write(tmp_path / "x.jsonl", *rows), validation_fraction=0, broken="drop", empty="drop"
    )
    told = [(origin.split(", ")[-1], why.split(": ")[-1]) for origin, why in source.left_out("train")]
    assert told == [
        ("row 2", "duplicate"),
        ("row 3", "identical"),
        ("row 4", "column 'chosen' is missing or null; it should hold text or messages"),
        ("row 5", "column 'chosen' is empty; give a completion, or set empty to drop"),
    ]


def test_demonstrations_have_the_same_settings(tmp_path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "c" if n else None} for n in range(50)]
    source = DemonstrationFile(write(tmp_path / "x.jsonl", *rows), test_fraction=0.5, broken="drop")
    counts = {split: source.load(split).counts for split in ("train", "validation", "test")}
    assert sum(count["kept"] for count in counts.values()) == 49
    assert {count["dropped_broken"] for count in counts.values()} == {1}


@pytest.mark.skipif(not HH.is_file(), reason=f"the real dialogues are not at {HH}")
def test_real_dialogues_in_three_splits() -> None:
    source = PreferenceFile(
        str(HH), prompt_ends="\n\nAssistant:", test_fraction=0.1, empty="drop", broken="drop"
    )
    splits = {split: prompts(source, split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values()))
    assert 80 < len(splits["test"]) < 160
    assert all(why for _, why in source.left_out("train"))
