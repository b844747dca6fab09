"""Instructions: OpenAssistant's rows as they are, filter by filter, and any list; parts as those of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.pairs.instructions import OASST, InstructionPrompts
from trainer.pairs.prompts import TextPrompts
from trainer.schema import UserError


def row(text: str | None, **changes: Any) -> dict[str, Any]:
    """A row of OpenAssistant/oasst1, with the columns that it has."""
    kept = {
        "message_id": "m",
        "parent_id": None,
        "message_tree_id": "m",
        "text": text,
        "role": "prompter",
        "lang": "ru",
    }
    return kept | {"rank": None, "deleted": False, "review_result": True} | changes


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(path)


ROWS = [
    row("  Как испечь хлеб? "),
    row("Как испечь хлеб?"),
    row("Назови три города"),
    row("How do I bake bread?", lang="en"),
    row("Вот так.", role="assistant", parent_id="m"),
    row("А ещё?", parent_id="m"),
    row("Удалено", deleted=True),
    row("Отклонено", review_result=False),
    row("Не просмотрено", review_result=None),
    row(" "),
]


def test_first_turns_of_people_in_one_language(tmp_path) -> None:
    found = InstructionPrompts(write(tmp_path / "oasst.jsonl", *ROWS), part="all").load()
    assert {prompt.text for prompt in found.prompts} == {"Как испечь хлеб?", "Назови три города"}
    assert found.counts == {
        "rows": 10, "kept": 2, "dropped_duplicate": 1, "other_parts": 0, "dropped_lang": 1, "dropped_role": 1,
        "dropped_parent_id": 1, "dropped_deleted": 1, "dropped_review_result": 2, "dropped_blank": 1,
        "dropped_over_limit": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"lang": ["ru", "en"]}, {"How do I bake bread?"}),
        ({"deleted": True}, {"Удалено"}),
        ({"review_result": None}, {"Не просмотрено"}),
        ({"role": "assistant", "parent_id": "m"}, {"Вот так."}),
    ],
)
def test_each_filter_can_be_another(tmp_path, change, more) -> None:
    path = write(tmp_path / "oasst.jsonl", *ROWS)
    usual = {"Как испечь хлеб?", "Назови три города"}
    found = {
        each.text for each in InstructionPrompts(path, where={**OASST, **change}, part="all").load().prompts
    }
    assert found == (usual | more if "lang" in change else more)


def test_a_filter_can_be_left_out(tmp_path) -> None:
    path = write(tmp_path / "oasst.jsonl", *ROWS)
    where = {name: wanted for name, wanted in OASST.items() if name not in ("lang", "review_result")}
    found = {each.text for each in InstructionPrompts(path, where=where, part="all").load().prompts}
    assert found == {
        "Как испечь хлеб?",
        "Назови три города",
        "How do I bake bread?",
        "Отклонено",
        "Не просмотрено",
    }


def test_a_csv_has_words_only(tmp_path) -> None:
    (tmp_path / "oasst.csv").write_text(
        "text,role,parent_id,lang,deleted,review_result\n"
        "Раз,prompter,,ru,False,True\nДва,prompter,,ru,True,True\nТри,prompter,m,ru,false,true\n"
    )
    found = InstructionPrompts(str(tmp_path / "oasst.csv"), part="all").load()
    assert [each.text for each in found.prompts] == ["Раз"]


def test_any_list_in_the_parts_that_texts_have(tmp_path) -> None:
    lines = [f"Задание номер {number}" for number in range(100)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    path = str(tmp_path / "list.txt")
    for part in ("train", "held_out", "all"):
        fraction = None if part == "all" else 0.3
        own = InstructionPrompts(path, where={}, part=part, held_out_fraction=fraction, limit=20).load()
        texts = TextPrompts(path, tokens=None, part=part, held_out_fraction=fraction, limit=20).load()
        assert own.prompts == texts.prompts
        assert own.counts == texts.counts
        assert len(own.prompts) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"no column 'role', 'parent_id'.*set where to \{\} for a plain list"),
        ({"where": {}, "column": "instruction"}, r"no column 'instruction'; its columns are: text$"),
        ({"where": {}, "limit": 0}, "limit is 0; it should be 1 or more"),
        ({"where": {}, "part": "test"}, "part is 'test'"),
        (
            {"where": {}, "part": "all", "held_out_fraction": 0.2},
            "held_out_fraction has no effect with part: all",
        ),
        ({"where": {"text": "x"}}, r"no prompt is left for part 'train' \(rows 1, .*dropped_text 1"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, settings, message) -> None:
    (tmp_path / "list.txt").write_text("Назови город")
    with pytest.raises(UserError, match=message) as caught:
        InstructionPrompts(str(tmp_path / "list.txt"), **settings).load()
    assert "list.txt" in str(caught.value)
