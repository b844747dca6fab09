"""Tokens that outlive a run: found again, rebuilt where damaged or made of something else, built by one process."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_preferences import row, write
from tests.data.tokenizers_of_kinds import KINDS
from trainer.data import preferences
from trainer.data.cache import token_store
from trainer.data.datamodule import PreferenceData, SupervisedData
from trainer.data.preferences import DemonstrationFile, PreferenceFile
from trainer.data.sources import Loaded
from trainer.data.store import TokenStore, write_store
from trainer.data.tokenize import tokenize_preferences
from trainer.schema import Preference, TokenizedPreference, UserError

ROWS = [row(f"prompt {i}", f" chosen {i * i}", f" rejected {i}") for i in range(60)]
PAIR = TokenizedPreference([1, 2], [3], [4, 5], "x")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "x.jsonl", *ROWS)


def ready(source: Any, cache: Path, kind: str = "llama3", **settings: Any) -> PreferenceData:
    data = PreferenceData(source, cache=str(cache), **settings)
    data.tokenizer = KINDS[kind]()
    data.setup("fit")
    return data


def entries(cache: Path) -> list[str]:
    return sorted(found.name for found in cache.iterdir())


def test_the_second_run_reads_no_record(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first = ready(PreferenceFile(path), tmp_path / "cache")
    assert list(first.examples["train"]) == tokenize_preferences(
        PreferenceFile(path).load("train").records, first.tokenizer
    )
    assert first.counts["train"]["rows"] == 60
    assert first.counts["train"]["kept"] == len(first.examples["train"])
    assert len(entries(tmp_path / "cache")) == 2, "train and validation, and no lock or leftover"

    monkeypatch.setattr(preferences, "read_rows", None)
    second = ready(PreferenceFile(path), tmp_path / "cache")
    assert second.describe() == first.describe()
    for split in ("train", "validation"):
        assert list(second.examples[split]) == list(first.examples[split])
    assert capsys.readouterr().err == ""


def test_the_default_folder(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "all"))
    data = PreferenceData(PreferenceFile(path))
    data.tokenizer = KINDS["gpt2"]()
    data.setup("fit")
    assert len(entries(tmp_path / "all" / "tokens")) == 2


OTHER: dict[str, dict[str, Any]] = {
    "limit": {"max_length": 60},
    "overlong": {"overlong": "drop"},
    "tokenizer": {"kind": "gpt2"},
    "setting": {"source": {"validation_fraction": 0.5}},
    "columns": {"source": {"columns": {"chosen": "rejected", "rejected": "chosen"}}},
}


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_another_entry(path: str, tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    ready(PreferenceFile(path), cache)
    settings = {**OTHER[name]}
    source = PreferenceFile(path, **settings.pop("source", {}))
    data = ready(source, cache, **settings)
    assert len(entries(cache)) == 4
    assert list(data.examples["train"]) == tokenize_preferences(
        source.load("train").records, data.tokenizer, data.limits
    )


def test_a_file_that_changed_is_another_entry_whatever_its_time(path: str, tmp_path: Path) -> None:
    cache, before = tmp_path / "cache", os.stat(path)
    first = ready(PreferenceFile(path), cache)
    text = Path(path).read_text().replace("chosen 9", "chosen 8")
    Path(path).write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size
    second = ready(PreferenceFile(path), cache)
    assert len(entries(cache)) == 4
    assert list(second.examples["train"]) != list(first.examples["train"])
    assert second.hashes != first.hashes


def test_a_chat_template_that_changed_is_another_entry(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}]
    path = write(tmp_path / "x.jsonl", *(row(turns, f"a {i}", f"b {i}") for i in range(9)))
    found = []
    for mark in ("<%s>", "[%s]"):
        data = PreferenceData(PreferenceFile(path, validation_fraction=0), cache=str(tmp_path / "cache"))
        data.tokenizer = KINDS["gpt2"]()
        template = str(data.tokenizer.chat_template)
        for role in ("assistant", "{{ m['role'] }}"):
            template = template.replace(f"<{role}>", mark % role)
        data.tokenizer.chat_template = template
        data.setup("fit")
        found.append(data.tokenizer.decode(data.examples["train"][0].prompt))
    assert found[0].endswith("<assistant>")
    assert found[1].endswith("[assistant]")


def test_pairs_and_demonstrations_of_one_file_are_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(given | {"completion": "c"} for given in ROWS))
    ready(PreferenceFile(path), tmp_path / "cache")
    data = SupervisedData(DemonstrationFile(path), cache=str(tmp_path / "cache"))
    data.tokenizer = KINDS["llama3"]()
    data.setup("fit")
    assert len(entries(tmp_path / "cache")) == 4
    assert hasattr(data.examples["train"][0], "completion")


def test_a_damaged_entry_is_told_and_made_again(path: str, tmp_path: Path, capsys: Any) -> None:
    cache = tmp_path / "cache"
    expected = list(ready(PreferenceFile(path), cache).examples["train"])
    for tokens in cache.glob("*/tokens.bin"):
        raw = bytearray(tokens.read_bytes())
        raw[3] ^= 64
        tokens.write_bytes(raw)
    assert list(ready(PreferenceFile(path), cache).examples["train"]) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("tokens.bin: its SHA-256 is not the manifest's; tokenising again" in line for line in lines)
    ready(PreferenceFile(path), cache)
    assert capsys.readouterr().err == "", "whole again"


def test_a_file_that_changes_while_it_is_read_leaves_no_entry(path: str, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Restless(PreferenceFile):
        def fingerprint(self, split: Any) -> dict[str, str]:
            return super().fingerprint(split)

        def stream(self, split: Any) -> Loaded:
            loaded = super().stream(split)
            Path(self.path).write_text(Path(self.path).read_text().replace("prompt 1", "prompt 2"))
            return loaded

    with pytest.raises(UserError, match="changed while they were read"):
        ready(Restless(path), tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_an_error_leaves_nothing(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="over max_length 5"):
        ready(PreferenceFile(path), tmp_path / "cache", max_length=5)
    assert entries(tmp_path / "cache") == []


class Plain:
    """A user's source: no `fingerprint`, and records that come one by one, with counts that are final at the end."""

    prompt_template = None

    def __init__(self) -> None:
        self.counts = {"kept": 0}

    def describe(self) -> dict[str, Any]:
        return {}

    def load(self, split: Any) -> Loaded:
        return Loaded(self._records(), self.counts, {})

    def _records(self) -> Iterator[Preference]:
        for i in range(30):
            self.counts["kept"] += 1
            yield Preference(f"p {i}", "a", "b", str(i))


def test_a_users_source_is_stored_for_its_run_only(tmp_path: Path) -> None:
    data = ready(Plain(), tmp_path / "cache")
    assert [example.id for example in data.examples["train"]] == [str(i) for i in range(30)]
    assert data.counts["train"]["kept"] == 30
    assert len(entries(tmp_path / "cache")) == 2
    del data
    gc.collect()
    assert entries(tmp_path / "cache") == []


class Swapped(PreferenceFile):
    """A user's class that makes other records of the same file, by a setting that is no field of it."""

    swap = False

    def stream(self, split: Any) -> Loaded:
        loaded = super().stream(split)
        records = list(loaded.records)
        if self.swap:
            records = [dataclasses.replace(r, chosen=r.rejected, rejected=r.chosen) for r in records]
        return dataclasses.replace(loaded, records=records)


def test_a_class_that_inherits_its_fingerprint_is_not_found_again(path: str, tmp_path: Path) -> None:
    found = []
    for swap in (False, True):
        source = Swapped(path)
        object.__setattr__(source, "swap", swap)
        data = ready(source, tmp_path / "cache")
        data.setup("fit")
        found.append(data.examples["train"][0])
    assert found[0].chosen == found[1].rejected != found[1].chosen
    assert all(name.startswith(".kept") for name in entries(tmp_path / "cache"))  # for their run only


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    data = SupervisedData(Plain(), cache=str(tmp_path / "cache"))
    data.tokenizer = KINDS["gpt2"]()
    with pytest.raises(UserError, match="gives Preference records where Demonstration is needed by Superv"):
        data.setup("fit")


def test_a_folder_that_cannot_be_written_is_told(path: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("no folder")
    data = ready(PreferenceFile(path), tmp_path / "file" / "cache")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "not one for each split"
    assert "file/cache: cannot be written (Not a directory); tokens go to a temporary folder" in lines[0]
    folder = data.examples["train"].folder
    assert folder.is_dir()
    del data
    gc.collect()
    assert not folder.exists()


def build(folder: Path) -> None:
    write_store(folder, [PAIR] * 4, "preference", 9, dict)


def test_an_empty_store_is_found_again(tmp_path: Path) -> None:
    def empty(folder: Path) -> None:
        write_store(folder, [], "preference", 9, dict)

    assert len(token_store(str(tmp_path), {"a": 1}, empty)) == 0
    assert len(token_store(str(tmp_path), {"a": 1}, build)) == 0


# --- other processes ------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import os, resource, signal, sys, time
from pathlib import Path
from trainer.data.cache import token_store
from trainer.data.store import write_store
from trainer.schema import TokenizedPreference

what, cache = sys.argv[1:]
PAIR = TokenizedPreference([1, 2], [3], [4, 5], "x")

def slow(folder):
    with open(Path(cache).parent / "built", "a") as log:
        log.write("once\\n")
    write_store(folder, [PAIR] * 4, "preference", 9, dict)
    time.sleep(3)

def killed(folder):
    write_store(folder, dying(), "preference", 9, dict)

def dying():
    yield from [PAIR] * 600
    os.kill(os.getpid(), signal.SIGKILL)

def big(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    write_store(folder, [PAIR] * 9999, "preference", 9, dict)

print(len(token_store(cache, {"a": 1}, {"slow": slow, "killed": killed, "big": big}[what])))
"""


def started(what: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, what, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    processes = [started("slow", tmp_path / "cache") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in said] == ["4\n"] * 2, said
    assert (tmp_path / "built").read_text() == "once\n"
    assert len(entries(tmp_path / "cache")) == 1


def test_a_killed_builder_is_no_hindrance(tmp_path: Path) -> None:
    process = started("killed", tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert any(name.startswith(".building-") for name in entries(tmp_path)), "it died in the middle"
    before = time.monotonic()
    assert list(token_store(str(tmp_path), {"a": 1}, build)) == [PAIR] * 4
    assert time.monotonic() - before < 5
    assert len(entries(tmp_path)) == 1, "what it left is gone"


def test_a_disk_without_room_is_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    process = started("big", tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    last = said.strip().splitlines()[-1]
    assert f"{tmp_path}: no room for the tokens (File too large); make room, or set data.cache" in last
    assert entries(tmp_path) == []


def test_a_store_is_not_taken_from_the_process_that_uses_it(tmp_path: Path) -> None:
    kept = token_store(str(tmp_path), None, build)
    token_store(str(tmp_path), {"a": 1}, build)
    assert isinstance(kept, TokenStore)
    assert kept.folder.is_dir()
    assert list(kept) == [PAIR] * 4
