from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import PortableCheckpointIO, newest_valid, point, resolve, verify
from trainer.policy.folders import ASIDE, PARTIAL
from trainer.schema import UserError

ABOUT = {"adapter_config": {"peft_type": "IA3"}, "base": {"name": "b", "kind": "folder", "digest": "d"}}


def state(step: int, size: int = 16) -> dict:
    """A checkpoint's dict, as small as it may be."""
    name = "base_model.model.layers.0.k_proj.ia3_l.default"
    tensor = torch.full((size, 1), float(step))
    return {
        "global_step": step,
        "epoch": 0,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {name: tensor},
        "optimizer_states": [{"state": {0: {"exp_avg": tensor}}}],
        "tandem": ABOUT,
    }


def save(folder: Path, step: int, size: int = 16) -> Path:
    path = folder / f"step-{step:08d}"
    PortableCheckpointIO().save_checkpoint(state(step, size), path)
    return path


def step_of(path: Path) -> int:
    checkpoint = PortableCheckpointIO().load_checkpoint(path)
    (tensor,) = checkpoint["state_dict"].values()
    assert (tensor == checkpoint["global_step"]).all()
    assert torch.equal(checkpoint["optimizer_states"][0]["state"][0]["exp_avg"], tensor)
    return checkpoint["global_step"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_newest_sound_one_is_found_and_damage_is_named(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    paths = [save(folder, step) for step in (9, 10, 100, 20)]
    point(folder / "best", paths[0])
    assert newest_valid(tmp_path) == newest_valid(folder) == paths[2]
    flip(paths[2] / "adapter_model.safetensors")
    (paths[3] / "resume" / "state.json").unlink()
    assert newest_valid(tmp_path) == paths[1]
    assert "step-00000100/adapter_model.safetensors: damaged" in caplog.text
    assert "step-00000020/resume/state.json: missing" in caplog.text
    (paths[1] / "manifest.json").write_text("{}")
    assert newest_valid(tmp_path) == paths[0]
    flip(paths[0] / "manifest.json")
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "nowhere") is None


def test_a_path_means_the_best_the_last_or_the_newest(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    paths = [save(folder, step) for step in (1, 2, 3)]
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert resolve(tmp_path / "run") == resolve(folder) == paths[2]
    point(folder / "last", paths[1])
    assert resolve(tmp_path / "run") == paths[1]
    point(folder / "best", paths[0])
    assert resolve(tmp_path / "run") == resolve(str(folder)) == resolve(folder / "best") == paths[0]
    assert resolve(paths[2]) == paths[2]
    assert os.readlink(folder / "best") == "step-00000001"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert step_of(tmp_path / "moved") == 1
    with pytest.raises(UserError, match="no such file or folder"):
        resolve(tmp_path / "nowhere")


def test_a_second_save_under_one_name_replaces_the_first(tmp_path):
    path = save(tmp_path, 1)
    PortableCheckpointIO().save_checkpoint(state(2), path)
    assert step_of(path) == 2
    assert list(tmp_path.iterdir()) == [path]


FILE_OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def save_and_be_killed(folder: Path, name: str, step: int, moment: int) -> bool:
    """Save in a child process that kills itself at its `moment`-th file operation; False if there is none."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in FILE_OPERATIONS and str(folder) in str(arguments[0]):
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            PortableCheckpointIO().save_checkpoint(state(step), folder / name)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", ["step-00000002", "step-00000001"])
def test_a_kill_at_any_moment_leaves_what_was_there_and_no_half_folder(tmp_path, name):
    """A saving process is killed at each of its file operations in turn: under a new name, and a used one."""
    first = save(tmp_path, 1)
    outcomes, moment, killed, hidden = [], 0, True, False
    while killed:
        moment += 1
        killed = save_and_be_killed(tmp_path, name, 2, moment)
        for path in tmp_path.iterdir():
            assert path.name.startswith(".") or verify(path), moment
        found = newest_valid(tmp_path)
        assert found is not None, moment
        outcomes.append(step_of(found))
        hidden |= found.name.startswith(".")
        if name != first.name:
            assert step_of(first) == 1
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        PortableCheckpointIO().save_checkpoint(state(1), first)
        assert list(tmp_path.iterdir()) == [first], "the next save clears half folders away"
    assert len(outcomes) > 20
    assert outcomes == sorted(outcomes), "once the new one is there, it stays"
    assert set(outcomes) == {1, 2}
    assert hidden == (name == first.name), "between the renames the old one is found where it stepped aside"


def test_readers_change_nothing(tmp_path):
    """A reader cannot tell a slow saver from a killed one, so it leaves their folders alone."""
    save(tmp_path, 1)
    live = tmp_path / f".step-00000009.elsewhere.1{PARTIAL}"
    aside = tmp_path / f".step-00000001.elsewhere.1{ASIDE}"
    for folder in (live, aside):
        folder.mkdir()
        os.utime(folder, (0, 0))
    assert newest_valid(tmp_path) == resolve(tmp_path) == tmp_path / "step-00000001"
    assert live.is_dir()
    assert aside.is_dir()


def test_a_slow_save_elsewhere_is_left_alone_while_its_file_grows(tmp_path):
    """A folder's own time stands still while a file inside is written."""
    live = tmp_path / f".step-00000009.elsewhere.1{PARTIAL}"
    (live / "resume").mkdir(parents=True)
    growing = live / "resume" / "tensors.safetensors"
    growing.write_bytes(b"half")
    for path in (live, growing.parent):
        os.utime(path, (0, 0))
    save(tmp_path, 1)
    assert growing.is_file()
    os.utime(growing, (0, 0))
    save(tmp_path, 2)
    assert not live.exists()


def test_a_kill_at_a_random_time_too(tmp_path):
    for delay in (0.01, 0.03, 0.05, 0.1, 0.2):
        child = os.fork()
        if child == 0:
            for step in range(1, 10_000):
                save(tmp_path, step, 300_000)
        while newest_valid(tmp_path) is None:
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert step_of(newest_valid(tmp_path)) >= 1
        for path in tmp_path.iterdir():
            assert path.name.startswith(".") or verify(path)


def test_a_full_disk_is_one_clear_error_and_the_last_good_one_stays(tmp_path):
    """Beyond a process's file size limit every write fails, as on a full disk."""
    first = save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"not written, what was there before is untouched.*step-00000002"
        ) as raised:
            save(tmp_path, 2, 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [first]
    assert step_of(first) == 1


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        first = save(disk, 1)
        with pytest.raises(OSError, match=r"No space left on device.*step-00000002") as raised:
            save(disk, 2, 200_000)
        assert raised.value.errno == errno.ENOSPC
        assert "\n" not in str(raised.value)
        assert list(disk.iterdir()) == [first]
        assert step_of(first) == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="step-00000001"):
        save(tmp_path / "file", 1)


def test_only_our_own_leavings_are_cleared_away(tmp_path):
    mine = (".bashrc.old", ".notes.partial", ".other-host.json")
    for name in mine:
        (tmp_path / name).write_text("mine")
    live = tmp_path / f".step-00000009.elsewhere.1{PARTIAL}"
    live.mkdir()
    save(tmp_path, 1)
    assert newest_valid(tmp_path) is not None
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert live.is_dir(), "another machine's process may still be writing it"
    os.utime(live, (0, 0))
    save(tmp_path, 2)
    assert not live.exists()
