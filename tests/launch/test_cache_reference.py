"""`tandem cache-reference`: built once, gone on with after a kill, used without the reference's weights."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.cli import main
from launch.commands import cache_reference
from tests.launch.helpers import ROOT, fit_config, tandem
from trainer.policy import logprobs
from trainer.policy.reference_files import LOCK, RECORD, merged

PAIRS = 146


def built(config: Path, folder: Path, *more: str) -> None:
    assert main(["cache-reference", "--config", str(config), "--output", str(folder), *more]) == 0


def content(folder: Path) -> np.ndarray:
    """All records, by key."""
    return merged(*(np.fromfile(path, RECORD) for path in folder.glob("*.records")))


def test_it_is_built_once_whatever_the_forwards(tmp_path, tiny_llama, capsys) -> None:
    config = fit_config(tmp_path, tiny_llama)
    built(config, tmp_path / "kept")
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{PAIRS} pairs ({PAIRS} new) in ")
    assert line.endswith(f"s: {tmp_path / 'kept'}")
    built(config, tmp_path / "kept")
    assert f"{PAIRS} pairs (0 new)" in capsys.readouterr().out
    built(config, tmp_path / "single", "--data.token_budget", "1")
    built(config, tmp_path / "padded", "--data.layout", "concatenated")
    expected = content(tmp_path / "kept")
    assert len(expected) == PAIRS
    for name in ("single", "padded"):
        found = content(tmp_path / name)
        assert (found["key"] == expected["key"]).all()
        assert (found["chosen_tokens"] == expected["chosen_tokens"]).all()
        for side in ("chosen", "rejected"):
            np.testing.assert_allclose(found[side], expected[side], rtol=1e-6, atol=1e-5)
    assert len(list((tmp_path / "kept").glob("*.records"))) == 1


def test_a_fit_takes_its_log_probs_from_it(tmp_path, tiny_llama) -> None:
    config = fit_config(tmp_path, tiny_llama, steps=3)
    content_ = yaml.safe_load(config.read_text())
    content_["model"]["init_args"]["reference"] = {"kind": "cached", "cache": str(tmp_path / "kept")}
    cached = tmp_path / "cached.yaml"
    cached.write_text(yaml.safe_dump(content_))
    fit = ["fit", "--config", str(cached), "--run", str(tmp_path / "run"), "--threads", "1"]
    # The folder is the config's own.
    assert main(["cache-reference", "--config", str(cached)]) == 0
    done = tandem(fit)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["model"]["reference"]["kind"] == "cached"
    assert manifest["model"]["reference"]["log_probs"]["entries"] == PAIRS
    assert manifest["reference"]["before"] == manifest["reference"]["after"]


@pytest.mark.slow
def test_a_killed_build_is_gone_on_with(tmp_path, tiny_llama, capsys) -> None:
    config = fit_config(tmp_path, tiny_llama)
    texts = yaml.safe_load((tmp_path / "texts.yaml").read_text())
    texts["init_args"]["count"] = 3000
    (tmp_path / "texts.yaml").write_text(yaml.safe_dump(texts))
    kept, settings = tmp_path / "kept", ["--data.token_budget", "1", "--threads", "1"]
    command = [
        sys.executable,
        "-m",
        "launch",
        "cache-reference",
        "--config",
        str(config),
        "--output",
        str(kept),
    ]
    with subprocess.Popen([*command, *settings], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while not (kept.is_dir() and sum(path.stat().st_size for path in kept.glob("*.records")) > 5000):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        # Nobody else writes to it meanwhile.
        assert main(["cache-reference", "--config", str(config), "--output", str(kept)]) == 2
        assert "being written to by another process" in capsys.readouterr().err
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    before = len(content_of_killed(kept))
    built(config, kept)
    all_, new = (
        int(part.split("(")[-1].replace(",", "")) for part in capsys.readouterr().out.split(" ")[0:3:2]
    )
    assert before > 100
    assert all_ == before + new
    assert new > 100
    built(config, tmp_path / "whole")
    found, expected = content(kept), content(tmp_path / "whole")
    assert (found["key"] == expected["key"]).all()
    np.testing.assert_allclose(found["chosen"], expected["chosen"], rtol=1e-6, atol=1e-5)


def content_of_killed(folder: Path) -> np.ndarray:
    """The records that are whole."""
    (shard,) = folder.glob("*.records")
    raw = shard.read_bytes()
    return np.frombuffer(raw[: len(raw) // RECORD.itemsize * RECORD.itemsize], RECORD)


def test_what_cannot_work_is_one_line(tmp_path, tiny_llama, capsys) -> None:
    config = fit_config(tmp_path, tiny_llama)
    assert main(["cache-reference", "--config", str(config)]) == 2
    assert "--output DIR: is missing" in capsys.readouterr().err
    assert main(["cache-reference", "--config", str(config), "--output"]) == 2
    assert "--output: a value is needed" in capsys.readouterr().err
    supervised = fit_config(tmp_path, tiny_llama, kind="demonstration")
    assert main(["cache-reference", "--config", str(supervised), "--output", str(tmp_path / "x")]) == 2
    assert "SupervisedModule has no reference" in capsys.readouterr().err
    assert (
        main(["cache-reference", "--config", str(config), "--output", str(tmp_path / "x"), "--sharded"]) == 2
    )
    assert "one process only" in capsys.readouterr().err
    built(config, tmp_path / "kept")
    capsys.readouterr()
    assert main(["cache-reference", "--config", str(config), "--output", str(tmp_path / "kept"),
                 "--model.policy.dtype", "bfloat16"]) == 2  # fmt: skip
    assert "stale" in capsys.readouterr().err


def test_a_full_disk_keeps_what_is_there(tmp_path, tiny_llama, capsys, monkeypatch) -> None:
    config = fit_config(tmp_path, tiny_llama)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = cache_reference._model

    def then_full(*given: object) -> object:
        model = real(*given)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        return model

    monkeypatch.setattr(cache_reference, "_model", then_full)
    try:
        assert main(["cache-reference", "--config", str(config), "--output", str(tmp_path / "kept"),
                     "--data.token_budget", "1"]) == 2  # fmt: skip
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"tandem: error: reference.cache: {tmp_path / 'kept'}: no room (")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    monkeypatch.undo()
    there = len(content(tmp_path / "kept"))
    assert 0 < there < PAIRS
    capsys.readouterr()
    built(config, tmp_path / "kept")
    assert f"{PAIRS} pairs ({PAIRS - there} new)" in capsys.readouterr().out
    assert {path.suffix or path.name for path in (tmp_path / "kept").iterdir()} == {".records", ".json", LOCK}
    assert os.stat(tmp_path / "kept" / LOCK).st_size == 0


def test_an_output_that_can_be_no_folder_is_one_line(tmp_path, tiny_llama, capsys) -> None:
    config = fit_config(tmp_path, tiny_llama)
    (tmp_path / "afile").write_text("mine")
    for output in (tmp_path / "afile", tmp_path / "afile" / "x", Path("/proc/nowhere")):
        assert main(["cache-reference", "--config", str(config), "--output", str(output)]) == 2
        assert f"tandem: error: reference.cache: {output}" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "afile").read_text() == "mine"


def test_log_probs_that_are_not_finite_are_told(tmp_path, tiny_llama, capsys, monkeypatch) -> None:
    config = fit_config(tmp_path, tiny_llama)
    real, kept = logprobs.pair_logps, tmp_path / "kept"

    def spoiled(model: Any, batch: Any) -> Any:
        found = real(model, batch)
        found.chosen[[each == first for each in batch.keys]] = float("nan")
        return found

    built(config, tmp_path / "sound")
    first = content(tmp_path / "sound")["key"][7]
    monkeypatch.setattr(logprobs, "pair_logps", spoiled)
    capsys.readouterr()
    assert main(["cache-reference", "--config", str(config), "--output", str(kept)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the log-probs of 1 pairs are not finite, the first is" in said
    assert f"the other {PAIRS - 1} are kept" in said
    assert len(content(kept)) == PAIRS - 1
    monkeypatch.undo()
    built(config, kept)
    assert f"{PAIRS} pairs (1 new)" in capsys.readouterr().out


def test_without_a_budget_a_forward_has_a_batch_of_pairs(tmp_path, tiny_llama, monkeypatch) -> None:
    config, sizes, real = fit_config(tmp_path, tiny_llama), [], cache_reference._compute

    def watched(forward: Any, work: Any, cache: Any) -> None:
        sizes.extend(len(part.indices) for part in work)
        real(forward, work, cache)

    monkeypatch.setattr(cache_reference, "_compute", watched)
    built(config, tmp_path / "kept", "--data.token_budget", "null", "--data.batch_size", "20")
    assert sum(sizes) == PAIRS
    assert max(sizes) == 20
    assert sum(size < 20 for size in sizes) <= 2
