"""The dispatcher: help at once, and one line for every mistake."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import time

import pytest
import yaml

from launch.cli import COMMANDS, explain, main
from tests.launch.helpers import ROOT, fit_config, tandem
from trainer.data.lines import BrokenLine


def test_help_is_fast_and_imports_nothing_heavy():
    began = time.monotonic()
    shown = tandem(["--help"])
    assert shown.returncode == 0
    assert time.monotonic() - began < 5
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
    code = "import sys, launch.cli; launch.cli.usage(); print([m in sys.modules for m in ('torch', 'yaml')])"
    heavy = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert heavy.stdout == "[False, False]\n"


@pytest.mark.parametrize(
    "command", [["run"], ["generate"], ["evaluate", "letters"], ["report"], ["export"], ["fit"]]
)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert f"usage: tandem {' '.join(command)}" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["PreferenceModule", "SupervisedModule"])
def test_help_explains_each_setting_of_a_model(module, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", f"trainer.module.{module}"])
    check_explained(capsys.readouterr().out, "--model.policy.base", "--model.optimizer.lr")


def test_help_explains_each_setting_of_an_adapter(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "trainer.module.SupervisedModule", "--model.policy.adapter.help"])
    check_explained(
        capsys.readouterr().out, "--model.policy.adapter.preset", "--model.policy.adapter.targets"
    )


def check_explained(shown: str, *names: str) -> None:
    """Every setting has words of its own before its type; those named are among them."""
    entries = re.split(r"\n  (?=--)", shown)[1:]
    explained = {}
    for entry in entries:
        name, words = re.match(
            r"(--[^\s,]+)(?:, --\S+)*(?: \{[^}]*\}| \[?[A-Z_]+\]?)?\s*(.*)", entry, re.DOTALL
        ).groups()
        explained[name] = words[:1] not in ("", "(")
    assert set(names) <= set(explained)
    assert [name for name, well in explained.items() if not well] == []


def test_commands_without_a_jsonargparse_help(capsys):
    for command in ("data", "inspect", "evaluate"):
        assert main([command, "--help"]) == 0
        assert f"usage: tandem {command}" in capsys.readouterr().out


def complaint(arguments, capsys) -> str:
    """The one line on stderr of a command that must end with exit status 2."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("tandem: ")]
    assert [line[:15] for line in lines] == ["tandem: error: "], shown.err
    assert "Traceback" not in shown.err + shown.out
    assert shown.out == ""
    return lines[0].removeprefix("tandem: error: ")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--data.batch_sise", "3"], ["data.batch_sise", "no such setting", "`batch_size`"]),
        (["--trainer.max_step", "3"], ["trainer.max_step", "no such setting", "`max_steps`"]),
        (["--trainer.max_steps", "soon"], ["trainer.max_steps", "'soon'", "int"]),
        (["--model.policy.adapter.kind", "ia4"], ["model.policy.adapter.kind", "'ia4'", "ia3, lora"]),
        (["--model.optimizer.lr", "0"], ["optimizer.lr", "0.0 is not above 0"]),
        (["--data.batch_size", "0"], ["data.batch_size", "0 is below 1"]),
        (["--data.source.texts", "nope.yaml"], ["data.source.texts", "nope.yaml", "no such file"]),
        (["--config", "nope.yaml"], ["nope.yaml", "no such config file"]),
        (["--model.policy.base", "/nope"], ["policy.base", "/nope", "no folder"]),
        (
            ["--model.policy.base", "some/hub-model", "--offline"],
            ["policy.base", "some/hub-model", "--offline"],
        ),
        (["--data.max_length", "20"], ["over max_length 20", "truncate or drop"]),
        (["--surprise"], ["no such setting", "--surprise"]),
        (["--resume", "auto", "--overwrite"], ["--resume", "--overwrite"]),
        (["--resume", "no/such/run"], ["no/such/run", "no such file or folder"]),
        (["--trainer.default_root_dir", "elsewhere"], ["--run", "elsewhere", "two folders"]),
    ],
)
def test_mistakes_in_fit(extra, words, tmp_path, tiny_llama, capsys):
    config = fit_config(tmp_path, tiny_llama)
    line = complaint(["fit", "--config", str(config), "--run", str(tmp_path / "run"), *extra], capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("trainer:\n  max_step: 3\n", ["bad.yaml", "trainer.max_step", "no such setting", "`max_steps`"]),
        ("traner:\n  max_steps: 3\n", ["bad.yaml", "traner.max_steps", "no such setting"]),
        ("data:\n  init_args:\n    bach_size: 3\n", ["bad.yaml", "data.bach_size", "`batch_size`"]),
        (
            "model:\n  init_args:\n    policy: {dtypes: float32}\n",
            ["bad.yaml", "model.policy.dtypes", "`dtype`"],
        ),
        ("model:\n  class_path: trainer.module.Nope\n", ["bad.yaml", "model", "trainer.module", "Nope"]),
        ("trainer: [\n", ["bad.yaml", "not valid YAML", "line 2"]),
        (b"trainer: \xff\n", ["bad.yaml", "not UTF-8", "byte 9"]),
    ],
)
def test_mistakes_in_a_config_name_the_file(content, words, tmp_path, tiny_llama, capsys):
    config = fit_config(tmp_path, tiny_llama)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = complaint(["fit", "--config", str(config), "--config", str(bad)], capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], ["no command `fitt`", "did you mean `fit`"]),
        (["fit"], ["--config FILE"]),
        (["generate"], ["--prompt"]),
        (["generate", "--prompt", ""], ["--prompt", "empty"]),
        (["generate", "--prompt", "a", "--system", "b"], ["--system", "--chat"]),
        (["generate", "--prompt", "a", "--temperature", "2"], ["temperature", "do_sample"]),
        (["generate", "--prompt", "a", "--adapter", "no/such"], ["no/such", "no such file or folder"]),
        (["generate", "--prompt", "a", "--device", "toaster"], ["--device toaster"]),
        (["generate", "--prompt", "a", "--max_new_tokens", "few"], ["max_new_tokens", "'few'", "int"]),
        (["generate", "--prompt", "a", "--dtype", "int3"], ["dtype", "'int3'", "float32, bfloat16"]),
        (["evaluate", "spelling"], ["spelling", "letters"]),
        (["evaluate", "letters", "--texts", "no.txt", "--output", "o.json"], ["no.txt", "no such file"]),
        (["evaluate", "letters", "--texts", "no.txt"], ["output"]),
        (["report", "no/such/run"], ["no/such/run"]),
        (["run", "no/such.yaml"], ["no/such.yaml"]),
        (["run", "configs/letters/recipe.yaml", "--set", "bse=x"], ["--set bse", "names are base, texts"]),
        (["run", "configs/letters/recipe.yaml", "--only", "spo"], ["no stage `spo`", "dpo"]),
        (["export", "--output", "o"], ["--adapter"]),
        (["inspect", "--config", "configs/letters/sft.yaml", "--index", "x"], ["index", "'x'"]),
        (["data", "shwo"], ["shwo", "data show"]),
    ],
)
def test_mistakes_elsewhere(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = complaint(arguments, capsys)
    assert all(word in line for word in words), line


def test_texts_that_are_not_utf8_are_named_with_their_line(tmp_path, capsys):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good\n\xff\n")
    line = complaint(
        ["evaluate", "letters", "--texts", str(bad), "--output", str(tmp_path / "o.json")], capsys
    )
    assert str(bad) in line
    assert "line 2" in line


def test_a_full_disk_is_one_line():
    error = OSError(errno.ENOSPC, "No space left on device", "runs/x/adapter.safetensors")
    assert explain(error) == (
        "no space is left on the disk while writing runs/x/adapter.safetensors;"
        " what was saved before is untouched"
    )


def test_faults_of_the_program_keep_their_traceback():
    assert explain(KeyError("a fault")) is None
    assert explain(ValueError("another")) is None


def test_print_config_is_yaml_that_fit_reads(tmp_path, tiny_llama, capsys):
    config = fit_config(tmp_path, tiny_llama)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(config), "--trainer.max_steps", "7", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == 7
    assert printed["data"]["init_args"]["source"]["init_args"]["texts"]["init_args"]["count"] == 200


def test_every_kind_of_user_s_mistake_is_one_line():
    assert explain(BrokenLine("x.jsonl:3: not valid JSON")) == "x.jsonl:3: not valid JSON"
    read_only = OSError(errno.EROFS, "Read-only file system", "runs/x")
    assert explain(read_only) == "runs/x: Read-only file system"
    assert explain(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


def test_a_broken_line_at_the_shell_is_one_line(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\nno\n')
    line = complaint(
        ["pairs", "show", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "o")], capsys
    )
    assert "pairs.jsonl:2: not valid JSON" in line
