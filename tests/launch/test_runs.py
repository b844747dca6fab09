"""A run's folder: what `--overwrite` puts aside comes back after a kill."""

from __future__ import annotations

from pathlib import Path

from launch.runs import Replaced, made, open_run


def a_run(folder: Path, word: str) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "weights").write_text(word)
    (folder / "manifest.json").write_text(word)


def test_a_kill_before_the_first_batch_brings_the_old_run_back(tmp_path) -> None:
    a_run(tmp_path, "old")
    Replaced(tmp_path, made(tmp_path)).put_aside()
    a_run(tmp_path, "new")
    # The attempt is killed here; the next one looks at the folder.
    start = open_run(tmp_path, None, overwrite=True, first=True)
    assert (tmp_path / "manifest.json").read_text() == "old"
    assert (tmp_path / "checkpoints" / "weights").read_text() == "old"
    assert len(start.replaced.paths) == 2
    assert not (tmp_path / ".replaced").exists()


def test_a_kill_while_the_old_run_is_removed_keeps_the_new_one(tmp_path) -> None:
    a_run(tmp_path, "old")
    replaced = Replaced(tmp_path, made(tmp_path))
    replaced.put_aside()
    a_run(tmp_path, "new")
    replaced.aside.rename(tmp_path / ".dropped")
    open_run(tmp_path, None, overwrite=True, first=True)
    assert (tmp_path / "manifest.json").read_text() == "new"
    assert not (tmp_path / ".dropped").exists()
