"""`tandem pairs prompts`: numbers by hand, the page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from trainer.pairs.instructions import InstructionPrompts
from trainer.pairs.prompts_told import tell

ROWS = [
    ("Назови столицу Франции.", "ru", True),
    ("назови столицу  Франции", "ru", True),
    ("Что такое море?", "ru", True),
    ("Переведи:\nthe sea and all the ships that are on it", "ru", True),
    ("2 + 2 =", "ru", True),
    ("What is the sea?", "en", True),
    ("Что такое рожь?", "ru", False),
    ("<b>Что</b> будет </script><script>alert(1)</script>?", "ru", True),
]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    lines = [
        json.dumps(
            {
                "text": text,
                "role": "prompter",
                "parent_id": None,
                "lang": lang,
                "deleted": False,
                "review_result": taken,
            }
        )
        for text, lang, taken in ROWS
    ]
    (tmp_path / "oasst.jsonl").write_text("\n".join(lines))
    return tmp_path / "oasst.jsonl"


def test_numbers_by_hand(asked: Path) -> None:
    source = InstructionPrompts(str(asked), part="all")
    found = tell(source, source.load())
    assert found["prompts"] == 6
    assert found["counts"]["dropped_lang"] == 1
    assert found["counts"]["dropped_review_result"] == 1
    assert found["alike"] == 1
    assert found["scripts"] == {"Cyrillic": 3, "Latin": 2, "no letters": 1}
    assert dict(found["openings"])["назови"] == 2
    assert found["questions"] == pytest.approx(2 / 6)
    assert found["several_lines"] == pytest.approx(1 / 6)
    lengths = sorted(len(text) for text, lang, taken in ROWS if lang == "ru" and taken)
    assert (found["characters"]["min"], found["characters"]["max"]) == (lengths[0], lengths[-1])
    assert sum(found["characters"]["counts"]) + found["characters"]["outside"] == 6
    assert found["examples"]["shortest"][0] == "2 + 2 ="
    assert found["examples"]["longest"][0] == ROWS[-1][0]


def test_the_page(asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {
        "class_path": "trainer.pairs.instructions.InstructionPrompts",
        "init_args": {"path": str(asked), "part": "all"},
    }
    assert (
        main(["pairs", "prompts", "--prompts", json.dumps(prompts), "--output", str(tmp_path / "page")]) == 0
    )
    page = Path(capsys.readouterr().out.strip())
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "page" / "prompts.html"
    assert "6 prompts" in html
    assert "Left out: lang" in html
    assert "Назови столицу Франции." in html
    assert "<script>" not in html
    assert json.loads((tmp_path / "page" / "prompts.json").read_text())["prompts"] == 6


def test_prompts_cut_by_tokens_want_a_tokenizer(
    asked: Path, tmp_path: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {
        "class_path": "trainer.pairs.prompts.TextPrompts",
        "init_args": {"path": str(asked), "tokens": 4, "part": "all"},
    }
    words = ["pairs", "prompts", "--prompts", json.dumps(prompts), "--output", str(tmp_path / "page")]
    assert main(words) != 0
    assert "need a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "page" / "prompts.html").exists()
    assert main([*words, "--tokenizer", "/nowhere"]) == 2
    assert "error: --tokenizer: /nowhere" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(tiny_gpt2)]) == 0
    assert json.loads((tmp_path / "page" / "prompts.json").read_text())["words"]["max"] <= 4
