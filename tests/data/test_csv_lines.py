"""CSV row by row: what is read, what is a broken row, and that `broken: drop` leaves out no more than those."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.files import read_rows
from trainer.data.lines import BrokenLine
from trainer.data.preferences import PreferenceFile
from trainer.schema import UserError


def write(path: Path, raw: bytes) -> str:
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


GOOD = {
    "quoted": (b'a,b\n"1, 2","say ""so"""\n', [["1, 2", 'say "so"']]),
    "lines in cells": (b'a,b\r\n"1\r\n2",3\r\n', [["1\r\n2", "3"]]),
    "blank lines": (b"\n \na,b\n\n  \n1,2\n\n", [["1", "2"]]),
    "empty cells": (b"a,b\n,\n", [["", ""]]),
    "missing cells": (b"a,b\n1\n2,3\n", [["1", None], ["2", "3"]]),
    "a mark at the front": (b'\xef\xbb\xbf"a","b"\n1,2\n', [["1", "2"]]),
    "no line end": (b"a,b\n1,2", [["1", "2"]]),
    "returns alone": (b"a,b\r1,2\r", [["1", "2"]]),
    "words and numbers": (b"a,b\n007,NA\n", [["007", "NA"]]),
    "a long cell": (b"a,b\n" + b"x" * 200_000 + b",2\n", [["x" * 200_000, "2"]]),
    "quotes in the middle": (b'a,b\nx"y"z,2\n', [['x"y"z', "2"]]),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_rows_are_as_written(tmp_path, name, suffix, tolerant) -> None:
    raw, rows = GOOD[name]
    table = read_rows(write(tmp_path / f"x.{suffix}", raw), tolerant=tolerant)
    assert len(table) == len(rows)
    assert [list(row.values()) for _, row in table] == rows
    assert table.available == ("a", "b")


BAD = {
    "too many cells": (b"a,b\n1,2\n3,4,5\n6,7\n", r"x\.csv:3: 3 cells for 2 columns"),
    "not UTF-8": (b"a,b\n1,2\n3,caf\xe9\n6,7\n", r"x\.csv:3: (is )?not UTF-8"),
    "behind lines in a cell": (b'a,b\n"1\n\n",2\n3,4,5\n6,7\n', r"x\.csv:5: 3 cells"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_is_named_or_left_out(tmp_path, name) -> None:
    raw, message = BAD[name]
    path = write(tmp_path / "x.csv", raw)
    with pytest.raises(UserError, match=message):
        read_rows(path)
    found = [row for _, row in read_rows(path, tolerant=True).with_broken()]
    assert [isinstance(row, BrokenLine) for row in found] == [False, True, False]
    assert found[2] == {"a": "6", "b": "7"}


def test_every_row_with_one_cell_too_many_is_not_read_one_column_off(tmp_path) -> None:
    """pandas takes the first cells for an index there."""
    path = write(tmp_path / "x.csv", b"a,b\n1,2,3\n4,5,6\n")
    with pytest.raises(UserError, match=r"x\.csv:2: 3 cells for 2 columns"):
        read_rows(path)
    with pytest.raises(UserError, match=r"all 2 lines are broken; the first: .*x\.csv:2"):
        read_rows(path, tolerant=True)


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'a,b\n1,2\n3,"4\n5,6\n7,8\n', r"x\.csv:3: a quote is opened and never closed"),
        (b"a,a\n1,2\n", r"x\.csv:1: the header names 'a' twice"),
        (b"a,\xff\n1,2\n", r"x\.csv:1: .*not UTF-8"),
        (b"a,b\n", r"x\.csv: has no rows"),
        (b"\n\n", r"x\.csv: is empty"),
    ],
)
def test_what_no_row_can_be_told_from_is_refused(tmp_path, raw, message, tolerant) -> None:
    with pytest.raises(UserError, match=message):
        read_rows(write(tmp_path / "x.csv", raw), tolerant=tolerant)


def test_broken_rows_of_preferences_are_dropped_and_counted(tmp_path) -> None:
    rows = [b"Is it?,Yes,No", b"Was it,that,this,other", b"And?,\xff,No", b"Cut,off", b"Is it not?,No,Yes"]
    path = write(tmp_path / "x.csv", b"prompt,chosen,rejected\n" + b"\n".join(rows) + b"\n")
    found = PreferenceFile(path, broken="drop", validation_fraction=0.0).load("train")
    assert [record.prompt for record in found.records] == ["Is it?", "Is it not?"]
    assert (found.counts["rows"], found.counts["kept"], found.counts["dropped_broken"]) == (5, 2, 3)
    with pytest.raises(UserError, match=r"x\.csv:4: not UTF-8"):
        PreferenceFile(path, validation_fraction=0.0).load("train")


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2), min_size=1))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows) -> None:
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(written.getvalue().encode())
    assert [list(row.values()) for _, row in read_rows(str(path))] == rows
