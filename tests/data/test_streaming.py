"""Records one by one: the same as all at once, whatever is in the file, and in no more memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.test_preferences import row, write
from tests.data.tokenizers_of_kinds import KINDS
from trainer.data.digests import Digests
from trainer.data.files import fingerprint, read_rows
from trainer.data.preferences import PreferenceFile
from trainer.data.sources import HubTexts, LineTexts, TableTexts
from trainer.schema import UserError


def test_a_stream_is_what_load_gives_and_its_counts_are_final_at_the_end(tmp_path: Path) -> None:
    rows = [row(f"p{i}", f"c{i}", f"r{i % 7}") for i in range(200)]
    rows += [row("p3", "c3", "r3"), row("x", "same", "same"), row("y", "", "r"), row("p5", "c5", "r5")]
    path = write(tmp_path / "x.jsonl", *rows)
    other = write(tmp_path / "v.jsonl", row("p10"), row("p11"), row("p10", "a", "b"))
    for settings in ({}, {"limit": 20}, {"validation_path": other}, {"validation_fraction": 0}):
        source = PreferenceFile(path, empty="drop", **settings)  # type: ignore[arg-type]
        for split in ("train", "validation"):
            loaded, stream = source.load(split), source.stream(split)
            assert list(stream.records) == loaded.records
            assert stream.counts == loaded.counts
            assert stream.hashes == loaded.hashes == dict(loaded.hashes | {})
            assert stream.hashes.items() <= source.fingerprint(split).items()
    assert source.load("train").counts["dropped_duplicate"] == 2


def test_a_stream_takes_rows_only_as_it_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(row(f"p{i}") for i in range(50)))
    stream = PreferenceFile(path, validation_fraction=0).stream("train")
    assert stream.counts["kept"] == 0
    records = iter(stream.records)
    assert [next(records).prompt for _ in range(3)] == ["p0", "p1", "p2"]
    assert stream.counts["kept"] == 3


LINES = {
    "a number without end": (
        b'{"a": ' + b"1" * 5000 + b"}",
        r"x\.jsonl:2: cannot be read \(Exceeds the limit",
    ),
    "UTF-16": ('{"a": "é"}'.encode("utf-16-le"), r"x\.jsonl:2: "),
    "a lone surrogate": (b'{"a": "\\ud83d"}', r"x\.jsonl:2: holds half a character"),
    "two on a line": (b'{"a": "x"} {"a": "y"}', r"x\.jsonl:2: not valid JSON \(Extra data at column 12\)"),
    "null": (b"null", r"x\.jsonl:2: a JSON object is wanted, not NoneType"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"x\.jsonl:2: is nested too deep"),
    "cut": (b'{"a": "x', r"x\.jsonl:2: not valid JSON"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_broken_line_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    line, message = LINES[name]
    raw = b'{"a": "whole \\ud83d\\ude00"}\n' + line + b"\n"
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    with pytest.raises(UserError, match=message.replace("jsonl", suffix.replace(".", r"\."), 1)):
        read_rows(str(path))


def test_rows_of_json_lines_are_as_written(tmp_path: Path) -> None:
    """No column's type is guessed from the others' rows: dates stay text, numbers and lists stay apart."""
    rows = [{"a": "2020-01-01T00:00:00", "n": 1}, {"b": "x", "a": None}, {"a": ["1", {"k": 2.5}], "n": "1"}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(given) + "\r\n\n" for given in rows))
    table = read_rows(str(path), columns=["n"], optional=["b", "a", "z"])
    assert table.available == ("a", "n", "b")
    names = ("a", "n", "b")
    assert [given for _, given in table] == [{name: given.get(name) for name in names} for given in rows]


def test_fingerprints_say_what_would_be_read(tmp_path: Path) -> None:
    lines, table = tmp_path / "x.txt", tmp_path / "x.csv"
    lines.write_text("one\n")
    table.write_text("a,b\n1,2\n")
    texts = LineTexts(en=str(lines))
    assert texts.fingerprint() == texts.load().hashes
    columns = TableTexts(str(table), {"en": "a"})
    assert columns.fingerprint() == columns.load().hashes == fingerprint(str(table))
    with pytest.raises(UserError, match="offline refuses"):
        HubTexts(offline=True).fingerprint()
    with pytest.raises(UserError, match="no such file"):
        fingerprint(str(tmp_path / "gone.jsonl"))


DIGESTS = st.lists(st.binary(min_size=2, max_size=2).map(lambda raw: (raw * 12).hex()), max_size=300)


@given(DIGESTS)
def test_digests_are_a_set(digests: list[str]) -> None:
    found, expected = Digests(), set()
    for digest in digests:
        if digest == "0" * 48:
            continue
        assert (digest in found) == (digest in expected)
        assert found.add(digest) == (digest not in expected)
        expected.add(digest)
        assert digest in found
    assert len(found) == len(expected)


def test_many_digests() -> None:
    names = [f"{i * 2654435761 % 2**96 + 1:024x}" for i in range(20_000)]
    found = Digests()
    assert all(found.add(name) for name in names)
    assert not any(found.add(name) for name in names)
    assert len(found) == 20_000


# --- memory ---------------------------------------------------------------------------------------------------

MEASURED = """
import json, resource, sys
from transformers import AutoTokenizer
from trainer.data.datamodule import PreferenceData
from trainer.data.preferences import PreferenceFile

path, tokenizer, cache = sys.argv[1:]
data = PreferenceData(PreferenceFile(path), batch_size=16, cache=cache)
data.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data.setup("fit")
pairs = sum(batch.pairs for batch in data.train_dataloader())
print(json.dumps([before / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, pairs]))
"""


@pytest.mark.slow
def test_a_hundred_times_the_pairs_take_no_more_memory(tmp_path: Path) -> None:
    """From the file to the last batch, in processes of their own: tokenised first, then found in the cache."""
    KINDS["llama3"]().save_pretrained(tmp_path / "tokenizer")
    peaks = {}
    for count in (1_000, 100_000):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as stream:
            for i in range(count):
                given = row(f"the prompt of number {i} ", f"the coat {i} is chosen", f"no {i}")
                stream.write(json.dumps(given) + "\n")
        for time in ("first", "again"):
            command = [sys.executable, "-c", MEASURED, path, tmp_path / "tokenizer", tmp_path / "cache"]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
            before, peak, pairs = json.loads(done.stdout.splitlines()[-1])
            assert 0.9 * count < pairs < count
            peaks[count, time] = peak
            assert peak - before < 60, "MB that data takes, whatever there is of it"
    for time in ("first", "again"):
        assert peaks[100_000, time] - peaks[1_000, time] < 25, peaks
