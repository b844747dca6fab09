"""The ledger: whole rows after any kill, one writer for each part, other settings refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from trainer.ledger import Ledger
from trainer.schema import UserError


def rows(*keys: str) -> list[dict]:
    return [{"key": key, "text": f"о {key}\u2028"} for key in keys]


def test_rows_are_found_again_by_any_writer(tmp_path) -> None:
    with Ledger(tmp_path, {"seed": 0}, "a") as first:
        first.add(rows("1", "2"))
    with Ledger(tmp_path, {"seed": 0}, "b") as second:
        assert second.missing(["3", "1", "4"]) == ["3", "4"]
        second.add(rows("2", "3"))
    found = Ledger(tmp_path, {"seed": 0}, "c").rows
    assert [found[key] for key in "123"] == rows("1", "2", "3")
    assert (tmp_path / "parts" / "b.jsonl").read_bytes().count(b"\n") == 1


def test_a_torn_line_is_cut_off_by_its_writer(tmp_path) -> None:
    with Ledger(tmp_path, {}) as ledger:
        ledger.add(rows("1"))
    with open(ledger.own, "ab") as stream:
        stream.write(b'{"key": "2", "te')
    assert list(Ledger(tmp_path, {}).rows) == ["1"]
    with Ledger(tmp_path, {}) as again:
        again.add(rows("2"))
    assert list(Ledger(tmp_path, {}).rows) == ["1", "2"]


def test_other_settings_are_refused_by_name(tmp_path) -> None:
    Ledger(tmp_path, {"seed": 0, "n": 4})
    with pytest.raises(UserError, match=r"seed was 0, is 1.*another folder"):
        Ledger(tmp_path, {"seed": 1, "n": 4})


def test_two_writers_of_one_part_are_refused(tmp_path) -> None:
    with Ledger(tmp_path, {}) as first, Ledger(tmp_path, {}) as second:
        first.add(rows("1"))
        with pytest.raises(UserError, match="another process"):
            second.add(rows("2"))


def test_rows_that_differ_are_refused(tmp_path) -> None:
    for writer, text in (("a", "x"), ("b", "y")):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{writer}.jsonl").write_text(json.dumps({"key": "1", "text": text}) + "\n")
    with pytest.raises(UserError, match=r"b\.jsonl: the row of '1' differs"):
        Ledger(tmp_path, {})


@pytest.mark.parametrize("line", ["nonsense", '{"text": "no key"}', "[]"])
def test_what_is_no_row_is_named(tmp_path, line) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.jsonl").write_text(f'{{"key": "1"}}\n{line}\n')
    with pytest.raises(UserError, match=r"0\.jsonl, line 2"):
        Ledger(tmp_path, {})


def test_a_full_disk_leaves_whole_rows_and_its_error_names_the_file(tmp_path) -> None:
    """A file that may not grow further stands for the full disk: the row that did not fit is not there in half."""
    code = f"""
import resource, signal
from trainer.ledger import Ledger
from trainer.provenance import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger({str(tmp_path)!r}, {{}})
ledger.add([{{"key": "1", "text": "x" * 100}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    ledger.add([{{"key": "2", "text": "y" * 500}}])
except OSError as error:
    print(error.filename)
try:
    write_text({str(tmp_path / "pairs.jsonl")!r}, "y" * 500)
except OSError as error:
    print(error.filename)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.add([{{"key": "3", "text": "z" * 500}}])
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    named = [str(Ledger(tmp_path, {}).own), str(tmp_path / "pairs.jsonl")]
    assert done.stdout.splitlines() == named, done.stderr
    assert not list(tmp_path.glob("*pairs.jsonl*"))
    assert list(Ledger(tmp_path, {}).rows) == ["1", "3"]
