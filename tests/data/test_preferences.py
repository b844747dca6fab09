"""Preference and demonstration files: plain, chat, implicit prompts, splits, what is dropped or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.helps import help_of
from trainer.data.preferences import DemonstrationFile, PreferenceFile
from trainer.data.show import render_summary, summarize_source
from trainer.schema import UserError

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_rlhf" / "harmless-base.jsonl.gz"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def row(prompt: Any = "p", chosen: Any = "c", rejected: Any = "r") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def load(path: Path, *rows: dict[str, Any], **options: Any) -> Any:
    return PreferenceFile(write(path / "x.jsonl", *rows), validation_fraction=0, **options).load("train")


USER, ANSWER, OTHER = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")


def test_plain_pairs(tmp_path: Path) -> None:
    loaded = load(tmp_path, row("p1", "c1", "r1"), row("", "c2", "r2"))
    assert [(r.prompt, r.chosen, r.rejected) for r in loaded.records] == [
        ("p1", "c1", "r1"),
        ("", "c2", "r2"),
    ]
    assert loaded.records[1].origin == f"{tmp_path / 'x.jsonl'}, row 2"
    assert loaded.counts["kept"] == loaded.counts["rows"] == 2
    assert len({r.id for r in loaded.records}) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        row(None, [USER, ANSWER], [USER, OTHER]),
        row("q", [USER, ANSWER], [USER, OTHER]),
        row("q", [ANSWER], [OTHER]),
        row([USER], [ANSWER], [OTHER]),
        row([USER], [USER, ANSWER], [USER, OTHER]),
    ],
)
def test_every_way_of_writing_a_chat_pair_means_the_same(tmp_path: Path, given: dict[str, Any]) -> None:
    (record,) = load(tmp_path, given).records
    assert (record.prompt, record.chosen, record.rejected) == ([USER], [ANSWER], [OTHER])


@pytest.mark.parametrize("prompt", ["q", " q\n", "s", "s\nq", "", None])
def test_a_prompt_in_words_may_say_what_the_shared_turns_say(tmp_path: Path, prompt: str | None) -> None:
    shared = [turn("system", "s"), USER]
    (record,) = load(tmp_path, row(prompt, [*shared, ANSWER], [*shared, OTHER])).records
    assert (record.prompt, record.chosen, record.rejected) == (shared, [ANSWER], [OTHER])


def test_a_chat_prompt_with_plain_answers(tmp_path: Path) -> None:
    (record,) = load(tmp_path, row([USER], "a", "b")).records
    assert (record.prompt, record.chosen, record.rejected) == ([USER], "a", "b")


def test_the_implicit_prompt_is_all_shared_turns(tmp_path: Path) -> None:
    more = turn("user", "and?")
    given = {"chosen": [USER, ANSWER, more, ANSWER], "rejected": [USER, ANSWER, more, OTHER]}
    (record,) = load(tmp_path, given).records
    assert record.prompt == [USER, ANSWER, more]
    assert (record.chosen, record.rejected) == ([ANSWER], [OTHER])


def test_dialogues_that_part_early_are_dropped_and_counted(tmp_path: Path) -> None:
    more = turn("user", "and?")
    loaded = load(
        tmp_path,
        {"chosen": [USER, ANSWER, more, ANSWER], "rejected": [USER, OTHER, more, ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [more, OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    )
    assert loaded.counts["dropped_prompts_differ"] == 2
    assert loaded.counts["kept"] == len(loaded.records) == 1


def test_identical_and_repeated_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    chat = {"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    loaded = load(tmp_path, row(), row(), row("p", "r", "c"), row("p", "c", "c"), chat)
    assert [(r.chosen, r.rejected) for r in loaded.records] == [("c", "r"), ("r", "c")]
    assert loaded.counts["dropped_duplicate"] == 1
    assert loaded.counts["dropped_identical"] == 2


def test_prompts_found_by_their_end(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        {"chosen": "H: q\nA: no\nH: q\nA: yes", "rejected": "H: q\nA: no\nH: q\nA: never"},
        {"chosen": "H: q\nA: yes", "rejected": "H: other\nA: never"},
        {"chosen": "H: q\nA: yes", "rejected": "H: q\nA: no\nH: more\nA: never"},
        {"chosen": "nothing", "rejected": "at all"},
        prompt_ends="\nA:",
    )
    (record,) = loaded.records
    assert (record.prompt, record.chosen, record.rejected) == ("H: q\nA: no\nH: q\nA:", " yes", " never")
    assert loaded.counts["dropped_prompts_differ"] == 3


def test_other_column_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"q": "p", "good": "c", "bad": "r"})
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    (record,) = PreferenceFile(path, columns=columns, validation_fraction=0).load("train").records
    assert (record.prompt, record.chosen, record.rejected) == ("p", "c", "r")


def test_no_prompt_is_in_both_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(row(f"p{n % 50}", f"c{n}") for n in range(300)))
    source = PreferenceFile(path, validation_fraction=0.3)
    train, validation = source.load("train"), source.load("validation")
    assert len(train.records) + len(validation.records) == 300
    assert train.counts["other_splits"] == len(validation.records) > 20
    assert not {r.prompt for r in train.records} & {r.prompt for r in validation.records}


def test_validation_from_its_own_file_and_limits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *(row(f"p{n}") for n in range(9)))
    other = write(tmp_path / "y.jsonl", row("v"))
    source = PreferenceFile(path, validation_path=other, limit=4)
    train = source.load("train")
    assert [r.prompt for r in train.records] == ["p0", "p1", "p2", "p3"]
    assert train.counts["dropped_over_limit"] == 5
    validation = source.load("validation")
    assert [r.prompt for r in validation.records] == ["v"]
    assert list(validation.hashes) == [other]


def test_no_prompt_of_a_named_validation_file_is_trained_on(tmp_path: Path) -> None:
    """Whatever the order, the answers and the limit of the validation records."""
    path = write(tmp_path / "x.jsonl", row("p0"), row("p1", "c1"), row("p2"), row("p2", "c2"), row("p3"))
    other = write(tmp_path / "y.jsonl", row("p1"), row("v"), row("p2"), row("p3", "same", "same"))
    source = PreferenceFile(path, validation_path=other, limit=2)
    train = source.load("train")
    assert [r.prompt for r in train.records] == ["p0", "p3"], "p3's pair says nothing, so nothing validates"
    assert train.counts["dropped_in_validation"] == 3
    assert len(source.load("validation").records) == 2
    assert "dropped_in_validation" not in source.load("validation").counts


def test_no_prompt_of_a_named_validation_file_is_demonstrated(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *({"messages": [turn("user", word), ANSWER]} for word in "abc"))
    other = write(tmp_path / "y.jsonl", {"messages": [turn("user", "b"), OTHER]})
    train = DemonstrationFile(path, validation_path=other).load("train")
    assert [r.prompt[0]["content"] for r in train.records] == ["a", "c"]
    assert train.counts["dropped_in_validation"] == 1


REFUSED = {
    "empty": ([row("p", "")], {}, r"x\.jsonl, row 1: column 'chosen' is empty"),
    "blank": ([row(), row("p", "c", " \n")], {}, r"x\.jsonl, row 2: column 'rejected' is empty"),
    "empty turn": (
        [row(None, [USER, turn("assistant", "")], [USER, OTHER])],
        {},
        r"ends with an empty answer",
    ),
    "null": ([row(), row("p", None)], {}, r"x\.jsonl, row 2: column 'chosen' is missing or null"),
    "absent": (
        [row(), {"prompt": "p", "chosen": "c"}],
        {},
        r"x\.jsonl, row 2: column 'rejected' is missing or null",
    ),
    "number": ([row("p", 3)], {}, r"column 'chosen' holds 3; it should be text or a list of messages"),
    "no turns": ([row([], "c")], {}, r"column 'prompt' holds \[\]"),
    "role": (
        [row(None, [turn("human", "q"), ANSWER], [USER, OTHER])],
        {},
        r"role 'human'; it should be one of system",
    ),
    "no content": (
        [row(None, [{"role": "user"}, ANSWER], [USER, OTHER])],
        {},
        "should have role and content",
    ),
    "user last": ([row(None, [USER, USER], [USER, OTHER])], {}, "ends with 'user'"),
    "halves": ([row("p", "c", [OTHER])], {}, "one of chosen and rejected is text"),
    "no column": (
        [{"prompt": "p", "good": "c"}],
        {},
        r"no column 'chosen', 'rejected'; its columns are: prompt, good",
    ),
    "mapped": ([row()], {"columns": {"prompt": "question"}}, "no column 'question'"),
    "mapping": ([row()], {"columns": {"answer": "chosen"}}, r"columns maps \['answer'\]"),
    "no prompt": ([{"chosen": "c", "rejected": "r"}], {}, "no prompt in column 'prompt'; .* set prompt_ends"),
    "two prompts": (
        [row("q", [USER, ANSWER], [USER, OTHER]), row("another", [USER, ANSWER], [USER, OTHER])],
        {},
        r"x\.jsonl, row 2: column 'prompt' holds 'another', .* share other first turns \('q'\)",
    ),
    "idle end": ([row()], {"prompt_ends": "A:"}, "prompt_ends is for plain text without"),
    "empty end": ([row()], {"prompt_ends": ""}, "prompt_ends is empty"),
    "limit": ([row()], {"limit": 0}, "limit is 0"),
    "local split": ([row()], {"split": "train"}, "split and revision belong to hub"),
    "empty rule": ([row()], {"empty": "keep"}, "empty is 'keep'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    rows, options, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, *rows, **options)
    assert "\n" not in str(caught.value)
    assert "x.jsonl" in str(caught.value)


def test_empty_completions_can_be_dropped_instead(tmp_path: Path) -> None:
    loaded = load(tmp_path, row("p", ""), row(), row("p", "c", " "), empty="drop")
    assert loaded.counts["dropped_empty"] == 2
    assert loaded.counts["kept"] == 1


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", row())
    with pytest.raises(UserError, match="no test split"):
        PreferenceFile(path).load("test")
    with pytest.raises(UserError, match="validation data is named; give one"):
        PreferenceFile(path, validation_path=path, validation_fraction=0.1)
    with pytest.raises(UserError, match="validation_fraction is 1"):
        PreferenceFile(path, validation_fraction=1)


def test_demonstrations_plain_and_chat(tmp_path: Path) -> None:
    system = turn("system", "s")
    expected: list[tuple[dict[str, Any], Any, Any]] = [
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "q", "completion": [ANSWER]}, [USER], [ANSWER]),
        ({"prompt": [USER], "completion": "a"}, [USER], "a"),
        ({"messages": [system, USER, ANSWER]}, [system, USER], [ANSWER]),
        ({"prompt": "q", "messages": [USER, OTHER, USER, ANSWER]}, [USER, OTHER, USER], [ANSWER]),
    ]
    for n, (given, prompt, completion) in enumerate(expected):
        path = write(tmp_path / f"{n}.jsonl", given, given)
        loaded = DemonstrationFile(path, validation_fraction=0).load("train")
        (record,) = loaded.records
        assert (record.prompt, record.completion) == (prompt, completion)
        assert loaded.counts["dropped_duplicate"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "p", "completion": ""}, r"x\.jsonl, row 1: column 'completion' is empty"),
        ({"messages": [ANSWER]}, "has one turn"),
        ({"messages": [ANSWER, USER]}, "ends with 'user'"),
        ({"messages": "text"}, "list of messages"),
        ({"text": "t"}, r"no column 'prompt', 'completion'; its columns are: text"),
        ({"completion": "t"}, r"no column 'prompt'"),
    ],
)
def test_wrong_demonstrations_are_named(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DemonstrationFile(write(tmp_path / "x.jsonl", given)).load("train")


@pytest.mark.skipif(not HH.is_file(), reason=f"the real dialogues are not at {HH}")
def test_real_dialogues() -> None:
    source = PreferenceFile(str(HH), prompt_ends="\n\nAssistant:", empty="drop", validation_fraction=0)
    loaded = source.load("train")
    assert loaded.counts["rows"] == 1200
    dropped = sum(count for name, count in loaded.counts.items() if name.startswith("dropped_"))
    assert loaded.counts["kept"] + dropped == 1200
    assert loaded.counts["kept"] > 1150
    for record in loaded.records:
        assert record.prompt.endswith("\n\nAssistant:")
        assert "\n\nAssistant:" not in record.chosen + record.rejected


def test_a_look_at_the_data(tmp_path: Path) -> None:
    rows = [row("Repeat: coat\n", "\u0441\u043eat", "coat"), row([USER], [ANSWER], [OTHER])]
    source = PreferenceFile(write(tmp_path / "x.jsonl", *rows), validation_fraction=0)
    summary = summarize_source(source, splits=("train", "test"))
    train = summary["splits"]["train"]
    assert train["kind"] == "preference"
    assert train["counts"]["kept"] == 2
    assert train["lengths"]["rejected"]["min"] == 1
    assert train["letters"]["exchangeable"] == pytest.approx(2 / 5)  # c and o of "coat" and "b"
    assert "no test split" in summary["splits"]["test"]["missing"]
    json.dumps(summary)
    text = render_summary(summary)
    assert "**\u0441\u043e**at" in text
    assert "Repeat: coat\\n" in text
    with pytest.raises(UserError, match="no test split"):
        summarize_source(source, splits=("test",))


def test_sources_say_their_settings(tmp_path: Path) -> None:
    columns = {"prompt": "q"}
    said = PreferenceFile("x.jsonl", columns=columns, prompt_ends="A:", limit=3).describe()
    assert json.loads(json.dumps(said)) == said
    assert said["class"] == "PreferenceFile"
    assert (said["path"], said["columns"], said["prompt_ends"], said["limit"]) == (
        "x.jsonl",
        columns,
        "A:",
        3,
    )
    assert DemonstrationFile("owner/name", revision="abc").describe()["revision"] == "abc"


@pytest.mark.parametrize("kind", [PreferenceFile, DemonstrationFile])
def test_settings_are_shared_and_each_has_its_help(kind: type) -> None:
    helps = help_of(kind)
    assert set(helps) >= {"path", "split", "validation_path", "columns", "empty", "limit", "offline"}
    assert ("prompt_ends" in helps) == (kind is PreferenceFile)
    assert all(helps.values()), helps
