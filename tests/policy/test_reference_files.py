"""The folder of reference log-probs, attacked: torn, flipped, stale, full, killed, shared."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.policy.reference_files import LOCK, MANIFEST, RECORD, CacheFolder, merged
from trainer.schema import UserError

REFERENCE = {"base": "a" * 64, "dtype": "float32", "adapter": None}


def records(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    table = np.zeros(count, RECORD)
    table["key"] = [random.bytes(16) for _ in range(count)]
    table["chosen"], table["rejected"] = random.normal(-300, 30, (2, count))
    table["chosen_tokens"], table["rejected_tokens"] = random.integers(1, 400, (2, count))
    return table


def filled(path: Path, *parts: np.ndarray, reference=REFERENCE) -> Path:
    """The parts, each appended by a writer of its own; returns the last one's file."""
    for part in parts:
        folder = CacheFolder(path, reference)
        folder.append(part)
        folder.close()
    return sorted(path.glob("*.records"))[-1]


def read(path: Path, strict: bool = False, reference=REFERENCE) -> np.ndarray:
    return CacheFolder(path, reference).read(strict)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    names = [name for name in RECORD.names if name != "crc"]
    expected = merged(expected)
    return len(found) == len(expected) and all((found[name] == expected[name]).all() for name in names)


def test_what_is_written_is_read(tmp_path) -> None:
    parts = [records(50), records(30, seed=1), records(50)]
    # Keys with zeros at either end are keys like others.
    parts[1]["key"][:3] = [b"\0" * 16, b"a" + b"\0" * 15, b"\0" * 15 + b"a"]
    filled(tmp_path / "cache", *parts)
    assert same(read(tmp_path / "cache", strict=True), np.concatenate(parts))
    assert len(read(tmp_path / "cache")) == 80
    assert len(read(tmp_path / "nowhere")) == 0


def test_a_repeated_key_keeps_what_came_first(tmp_path) -> None:
    first, second = records(5), records(5)
    second["chosen"] = 1.0
    filled(tmp_path / "cache", first, second)
    assert same(read(tmp_path / "cache"), first)


@pytest.mark.parametrize("cut", [1, 4, 35])
def test_a_torn_last_record_is_passed_over(tmp_path, cut, caplog) -> None:
    table = records(10)
    shard = filled(tmp_path / "cache", table)
    os.truncate(shard, shard.stat().st_size - cut)
    assert same(read(tmp_path / "cache", strict=True), table[:9])
    assert not caplog.records


def test_zeros_that_a_power_failure_left_are_passed_over(tmp_path) -> None:
    table = records(10)
    with open(filled(tmp_path / "cache", table), "ab") as stream:
        stream.write(b"\0" * 100)
    assert same(read(tmp_path / "cache", strict=True), table)


@pytest.mark.parametrize("byte", [0, 15, 16, 23, 24, 31, 32, 35])
def test_a_flipped_bit_is_found_and_named(tmp_path, byte, caplog) -> None:
    table = records(10)
    shard = filled(tmp_path / "cache", table)
    raw = bytearray(shard.read_bytes())
    raw[3 * RECORD.itemsize + byte] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(
        UserError, match=rf"{shard.name}: damaged, 1 of 10 records, the first at byte 108.*mends"
    ):
        read(tmp_path / "cache", strict=True)
    with caplog.at_level(logging.WARNING):
        assert same(read(tmp_path / "cache"), np.delete(table, 3))
    assert [shard.name in record.getMessage() for record in caplog.records] == [True]


def test_records_of_another_reference_are_damage(tmp_path) -> None:
    other = filled(tmp_path / "other", records(4), reference={**REFERENCE, "dtype": "bfloat16"})
    filled(tmp_path / "cache", records(4, seed=1))
    other.rename(tmp_path / "cache" / other.name)
    with pytest.raises(UserError, match="4 of 4 records"):
        read(tmp_path / "cache", strict=True)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ({"base": "b" * 64}, "base was aaaaaaaaaaaa and is bbbbbbbbbbbb"),
        ({"adapter": {"kind": "lora"}}, "adapter.*lora"),
    ],
)
def test_another_references_cache_is_stale(tmp_path, other, said) -> None:
    filled(tmp_path / "cache", records(4))
    with pytest.raises(UserError, match=rf"cache is stale.*{said}.*give another folder"):
        read(tmp_path / "cache", reference={**REFERENCE, **other})


def test_what_is_no_cache_is_refused_and_left_alone(tmp_path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes is no reference cache .*new folder"):
        read(tmp_path / "notes")
    with pytest.raises(UserError, match="is a file"):
        read(tmp_path / "notes" / "a.txt")
    filled(tmp_path / "cache", records(4))
    manifest = tmp_path / "cache" / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "reference": {**REFERENCE, "dtype": "bfloat16"}}))
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        read(tmp_path / "cache")
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: not valid JSON"):
        read(tmp_path / "cache")
    CacheFolder(tmp_path / "cache", REFERENCE).clear()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {LOCK}


def test_a_folder_that_became_anothers_is_not_written_to(tmp_path) -> None:
    folder = CacheFolder(tmp_path / "cache", REFERENCE)
    assert len(folder.read()) == 0
    filled(tmp_path / "cache", records(3), reference={**REFERENCE, "dtype": "bfloat16"})
    with pytest.raises(UserError, match="stale"):
        folder.append(records(3))


def test_tidied_it_is_one_sound_file(tmp_path) -> None:
    path, parts = tmp_path / "cache", [records(20, seed=seed) for seed in range(3)]
    shard = filled(path, *parts)
    raw = bytearray(shard.read_bytes())
    raw[5] ^= 1
    shard.write_bytes(raw)
    folder = CacheFolder(path, REFERENCE)
    known = merged(folder.read(), parts[2])
    foreign = path / "9.records"  # written by somebody else since then
    foreign.write_bytes(b"")
    folder.append(parts[2][:1])
    folder.tidy(known)
    assert len(list(path.glob("*.records"))) == 2
    assert foreign.exists()
    folder.append(more := records(3, seed=9))
    folder.close()
    assert same(read(path, strict=True), np.concatenate([*parts, more]))


WRITER = """
import sys, time
from pathlib import Path
from tests.policy.test_reference_files import REFERENCE, records
from trainer.policy.reference_files import CacheFolder
folder = CacheFolder(Path(sys.argv[1]), REFERENCE)
for seed in range(10**6):
    folder.append(records(7, seed=seed))
    print(seed, flush=True)
"""


def test_a_writer_keeps_others_out_until_it_is_killed(tmp_path) -> None:
    path = tmp_path / "cache"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            written = int(writer.stdout.readline())
        with pytest.raises(UserError, match="written to by another process"):
            CacheFolder(path, REFERENCE).append(records(1))
        assert len(read(path, strict=True)) >= 7 * (written + 1), "it can be read meanwhile"
        writer.send_signal(signal.SIGKILL)
    found = read(path, strict=True)
    expected = np.concatenate([records(7, seed=seed) for seed in range(written + 1)])
    assert np.isin(expected["key"], found["key"]).all()
    filled(path, records(1, seed=10**7))
    assert len(read(path, strict=True)) == len(found) + 1


def test_a_full_disk_leaves_what_was_there(tmp_path) -> None:
    path, table = tmp_path / "cache", records(40)
    folder = CacheFolder(path, REFERENCE)
    folder.append(table[:10])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        with pytest.raises(OSError):  # after 140 bytes of it
            folder.append(table[10:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    (shard,) = path.glob("*.records")
    assert shard.stat().st_size == 10 * RECORD.itemsize
    folder.append(table[10:])
    folder.close()
    assert same(read(path, strict=True), table)


def test_records_that_are_not_finite_are_passed_over(tmp_path) -> None:
    table = records(10)
    table["rejected"][4] = np.nan
    filled(tmp_path / "cache", table)
    assert same(read(tmp_path / "cache", strict=True), np.delete(table, 4))


def test_what_a_kill_left_in_the_first_write_is_swept(tmp_path) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    left = [path / f".{MANIFEST}.123.tmp", path / ".0a1b.part"]
    for each in left:
        each.write_text("{")
    assert len(read(path)) == 0
    filled(path, records(3))
    assert len(read(path, strict=True)) == 3
    assert not any(each.exists() for each in left)


def test_a_folder_that_is_refused_is_not_touched(tmp_path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="is no reference cache"):
        CacheFolder(tmp_path / "notes", REFERENCE).take()
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_a_strict_reader_needs_the_folder(tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder.*cache-reference"):
        read(tmp_path / "nowhere", strict=True)
