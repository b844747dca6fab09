"""A pickle in place of any file of a run, or beside it under any name that a library looks for, never runs."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from tests.launch.helpers import fit_config
from tests.policy.test_load import Malicious

PLANTED = (
    "adapter_model.bin",
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "training_args.bin",
    "checkpoint/mp_rank_00_model_states.pt",
    "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "latest",
    "hpc_ckpt_1.ckpt",
    "last.ckpt",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    assert (
        main(["fit", "--config", str(fit_config(folder, tiny_llama, steps=1)), "--run", str(folder / "run")])
        == 0
    )
    return folder


def use(folder: Path) -> None:
    """Everything that reads a run: going on with it, its weights, its report."""
    config, run = str(folder / "preference.yaml"), str(folder / "run")
    main(["fit", "--config", config, "--run", run, "--resume", "auto", "--trainer.max_steps", "2"])
    main(
        ["fit", "--config", config, "--run", str(folder / "next"), "--overwrite", "--model.policy.start", run]
    )
    main(["generate", "--adapter", run, "--prompt", "a", "--max_new_tokens", "2"])
    main(["report", run])


def test_a_pickle_instead_of_a_file_never_runs(made, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("TANDEM_DEBUG", raising=False)
    files = sorted(
        str(path.relative_to(made / "run")) for path in (made / "run").rglob("*") if path.is_file()
    )
    assert any("resume/state.json" in name for name in files)
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(made, folder, symlinks=True)
        (folder / "run" / name).write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
        use(folder)
        assert not (tmp_path / "ran").exists(), name


def test_a_pickle_that_is_planted_never_runs(made, tmp_path, monkeypatch) -> None:
    shutil.copytree(made, tmp_path / "copy", symlinks=True)
    (checkpoint,) = (p for p in (tmp_path / "copy/run/checkpoints").iterdir() if not p.is_symlink())
    for place in (tmp_path / "copy/run", checkpoint):
        for name in PLANTED:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    # Lightning looks for `hpc_ckpt_*` under SLURM.
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    use(tmp_path / "copy")
    assert not (tmp_path / "ran").exists()


def test_python_in_a_config_never_runs(made, tmp_path, capsys) -> None:
    content = yaml.safe_load((made / "preference.yaml").read_text())
    text = yaml.safe_dump(content) + f"\nx: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n"
    (tmp_path / "evil.yaml").write_text(text)
    assert main(["fit", "--config", str(tmp_path / "evil.yaml"), "--run", str(tmp_path / "run")]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_trap_works(tmp_path) -> None:
    """Unpickled, it does run: the tests above can fail."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
