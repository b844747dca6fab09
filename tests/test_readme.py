"""The README's Python runs as it stands, and its commands and configs exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ten_lines_of_python(tmp_path, monkeypatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    rows = [
        {"prompt": f"Repeat: word {i}\n", "chosen": f"wоrd {i}", "rejected": f"word {i}"} for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert "max_steps=100" in code
    exec(compile(code.replace("max_steps=100", "max_steps=2"), "README.md", "exec"), {})
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ROOT / "configs/models/tiny_letters")
    assert PeftModel.from_pretrained(base, tmp_path / "my_adapter").peft_config["default"].peft_type == "IA3"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[\w/]+(?:\.yaml)?", README))))
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_commands_exist() -> None:
    from launch.cli import COMMANDS

    assert set(re.findall(r"`tandem ([a-z-]+)", README)) <= set(COMMANDS)
    for command in COMMANDS:
        assert f"tandem {command}" in README
