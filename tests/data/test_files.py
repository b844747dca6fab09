"""Reading files: every kind, and one clear line for everything that can be wrong with them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from trainer.data.files import read_rows
from trainer.provenance import sha256_file
from trainer.schema import UserError

ROWS = [{"a": "one", "b": "1"}, {"a": "два", "b": "2"}, {"a": 'three, "3"\nlines', "b": "007"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    import datasets

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(lines, encoding="utf-8")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        case "csv":
            datasets.Dataset.from_list(rows).to_csv(path)
        case "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
    return path


NAMES = ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.parquet", "odd [1] * name?.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    table = read_rows(str(path), columns=["a", "b"])
    assert [row for _, row in table] == ROWS
    assert [origin for origin, _ in table] == [f"{path}, row {n}" for n in (1, 2, 3)]
    assert len(table) == 3
    assert table.hashes == {str(path): sha256_file(path)}


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_origins_count_rows_not_lines(tmp_path: Path, name: str) -> None:
    """A header, blank lines and line ends in a cell make the two differ: an origin says `row`."""
    path = write(tmp_path / name, ROWS)
    if name == "x.jsonl":
        path.write_text("\n\n" + path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    origins = [origin for origin, _ in read_rows(str(path))]
    assert origins == [f"{path}, row {n}" for n in (1, 2, 3)]


def test_text_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufeffone\r\nt\x85w\u2028o\r\n\r\nlast".encode())
    lines = [row["text"].strip("\ufeff") for _, row in read_rows(str(path))]
    assert lines == ["one", "t\x85w\u2028o", "", "last"]
    packed = tmp_path / "x.txt.gz"
    packed.write_bytes(gzip.compress(b"one\ntwo\n"))
    assert [row["text"] for _, row in read_rows(str(packed))] == ["one", "two"]


def test_csv_cells_stay_as_written(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("\ufeffa,b\r\nNone,007\r\nNA,\r\n".encode())
    assert [row for _, row in read_rows(str(path))] == [{"a": "None", "b": "007"}, {"a": "NA", "b": ""}]


def test_byte_order_mark_before_json(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert [row["a"] for _, row in read_rows(str(path), columns=["a"])] == ["x", "y"]


def test_a_line_of_many_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "x" * 12_000_000}) + '\n{"a": "y"}\n')
    assert [len(row["a"]) for _, row in read_rows(str(path))] == [12_000_000, 1]


def test_mixed_text_and_messages_in_one_column(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    turns = [{"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"a": "x"}) + "\n" + json.dumps({"a": turns}) + "\n")
    assert [row["a"] for _, row in read_rows(str(path))] == ["x", turns]


BROKEN = {
    "latin.txt": ("caf\xe9\n".encode("latin-1"), "latin.txt:1: not UTF-8 (byte 0xe9)"),
    "late.jsonl": (b'{"a": "x"}\n{"a": "y"}\n{"a": "\xff"}\n', "late.jsonl:3: not UTF-8 (byte 0xff)"),
    "cut.txt": ("год".encode()[:-1], "cut.txt:1: not UTF-8"),
    "utf16.csv": ("a,b\n".encode("utf-16"), "utf16.csv:1: not UTF-8"),
    "empty.jsonl": (b"", "empty.jsonl: is empty"),
    "blank.txt": (b"\n  \r\n\n", "blank.txt: is empty"),
    "packed_empty.txt.gz": (gzip.compress(b""), "packed_empty.txt.gz: is empty"),
    "broken.jsonl": (b'{"a": "x"}\n{"a": \n{"a": "z"}\n', "broken.jsonl:2: not valid JSON"),
    "list.jsonl": (b'"x"\n"y"\n', "list.jsonl:1: a JSON object is wanted, not str"),
    "scalar.json": (b'{"a": ', "scalar.json: cannot be read as JSON"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "ragged.csv:3: 3 cells for 2 columns; quote a cell"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv:1: the header names 'a' twice"),
    "header.csv": (b"a,b\n", "header.csv: has no rows"),
    "text.jsonl.gz": (b'{"a": "x"}\n', "text.jsonl.gz: not a whole gzip file"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": "x"}\n' * 99)[:-9], "cut.jsonl.gz: not a whole gzip file"),
    "text.parquet": (b"nonsense", "text.parquet: cannot be read as parquet"),
    "data.xlsx": (b"PK", "data.xlsx: cannot tell the kind of file"),
    "data.parquet.gz": (b"PK", "data.parquet.gz: cannot tell the kind of file"),
    "nosuffix": (b"x\n", "nosuffix: cannot tell the kind of file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(path)))
    said = str(caught.value)
    assert message in said
    assert str(path) in said
    assert "\n" not in said


def test_a_bad_byte_beyond_the_first_block(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\n" * 400_000 + b"\xc3(\n")
    with pytest.raises(UserError, match=r"x\.txt:400001: not UTF-8"):
        read_rows(str(path))


def test_missing_things_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(UserError, match=r"x.jsonl: no column 'chosen', 'c'; its columns are: a, b"):
        read_rows(str(path), columns=["chosen", "a", "c"])
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        read_rows(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"data/gone\.jsonl: no such file"):
        read_rows("data/gone.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match="split and revision belong to hub"):
        read_rows(str(path), split="train")


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", ROWS[:1])
    assert len(read_rows(str(path))) == 1
    write(path, ROWS)
    assert len(read_rows(str(path))) == 3


def test_the_hub_is_refused_offline_and_named_when_out_of_reach() -> None:
    with pytest.raises(UserError, match=r"nobody/nothing: .*offline refuses"):
        read_rows("nobody/nothing", offline=True)
    # HF_HUB_OFFLINE is set in tests: huggingface_hub itself then refuses, as it does without a network.
    with pytest.raises(UserError, match=r"nobody/nothing: .* not to be had from the hub") as caught:
        read_rows("nobody/nothing")
    assert "\n" not in str(caught.value)
