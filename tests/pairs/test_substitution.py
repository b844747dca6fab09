"""Letters: what pairs are made, in which ratio, and that no text is in two splits, in either language."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.helps import help_of
from trainer.data.corpus import generate_texts
from trainer.data.homoglyphs import substitute
from trainer.data.sources import (
    GeneratedTexts,
    HubTexts,
    Language,
    LineTexts,
    TableTexts,
    TextRow,
    Texts,
    TextSource,
    content_key,
    unique_texts,
)
from trainer.pairs.substitution import STAGE_SHARES, Letters, stage_of
from trainer.schema import Demonstration, Preference, Split, UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "letters"
PARTS: tuple[tuple[str, Split], ...] = (
    ("sft", "train"),
    ("sft", "validation"),
    ("dpo", "train"),
    ("dpo", "validation"),
    ("evaluation", "test"),
)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave nothing in the user's cache of `datasets`."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


class Given(TextSource):
    """Rows as they are given."""

    def __init__(self, rows: Sequence[TextRow]) -> None:
        self.rows = list(rows)

    def load(self) -> Texts:
        return Texts(self.rows, {"given": "0"})


def parts(texts: TextSource, **options: object) -> dict[tuple[str, Split], list[Demonstration]]:
    """The demonstrations of every stage and split."""
    made = {}
    for stage, split in PARTS:
        letters = Letters(texts, "demonstration", stage, validation_fraction=0.2, **options)  # type: ignore[arg-type]
        made[stage, split] = letters.load(split).records if records_left(letters, split) else []
    return made  # type: ignore[return-value]


def records_left(letters: Letters, split: Split) -> bool:
    """Whether the split has texts in every language that is asked for; tiny data leave some without."""
    try:
        letters.select(split)
    except UserError as error:
        if "is left for stage" in str(error):
            return False
        raise
    return True


def text_of(record: Demonstration) -> str:
    return str(record.prompt).removeprefix("Repeat: ").removesuffix("\n")


def assert_disjoint(made: dict[tuple[str, Split], list[Demonstration]]) -> None:
    keys = {part: {content_key(text_of(record)) for record in records} for part, records in made.items()}
    for (a, in_a), (b, in_b) in itertools.combinations(keys.items(), 2):
        assert not in_a & in_b, f"a text is in {a} and in {b}"
    for part, records in made.items():
        assert len(keys[part]) == len(records), f"a text is twice in {part}"


@pytest.fixture(scope="module")
def generated() -> TextSource:
    return GeneratedTexts(count=400)


def test_a_preference_prefers_the_exchanged_text(generated: TextSource) -> None:
    loaded = Letters(generated, "preference", "dpo").load("train")
    assert len(loaded.records) > 100
    assert loaded.counts["kept"] == len(loaded.records)
    for record in loaded.records:
        assert isinstance(record, Preference)
        assert record.prompt == f"Repeat: {record.rejected}\n"
        assert record.chosen == substitute(str(record.rejected)) != record.rejected
        assert record.origin
    assert len({record.id for record in loaded.records}) == len(loaded.records)
    assert loaded.hashes


def test_a_demonstration_shows_the_exchanged_text(generated: TextSource) -> None:
    letters = Letters(generated, "demonstration", "sft", capitals=True, instruction="Say {text} again: ")
    assert letters.prompt_template == "Say {text} again: "
    for record in letters.load("train").records:
        text = str(record.prompt).removeprefix("Say ").removesuffix(" again: ")
        assert record.completion == substitute(text, capitals=True)


def test_braces_in_texts_and_instructions_are_letters() -> None:
    rows = [TextRow({"en": f"{{text}} {{0}} so {n}"}, f"row {n}") for n in range(60)]
    letters = Letters(Given(rows), "demonstration", "sft", russian=0.0, instruction="{a} {text} {}")
    for record in letters.load("train").records:
        assert re.fullmatch(r"\{a\} \{text\} \{0\} so \d+ \{\}", str(record.prompt))


@pytest.mark.parametrize("russian", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_ratio_is_the_stated_one(generated: TextSource, russian: float) -> None:
    loaded = Letters(generated, "preference", "dpo", russian=russian).load("train")
    counts = loaded.counts
    assert counts["kept"] == counts["kept_ru"] + counts["kept_en"] == len(loaded.records)
    assert abs(counts["kept_ru"] - russian * counts["kept"]) <= 0.5 + 1e-6
    assert sum(record.id.startswith("ru-") for record in loaded.records) == counts["kept_ru"]


def test_every_text_is_accounted_for(generated: TextSource) -> None:
    for limit in (None, 10):
        counts = Letters(generated, "preference", "dpo", limit=limit, max_characters=60).load("train").counts
        lost = sum(value for name, value in counts.items() if name.startswith("dropped_"))
        before = counts["dropped_blank"] + counts["dropped_duplicate"]
        assert counts["kept"] + lost - before + counts["other_splits"] == counts["texts"]
        assert counts["texts"] + before == counts["rows"]  # one language a row
        assert limit is None or counts["kept"] == limit
        assert counts["dropped_too_long"] > 0


def test_a_text_without_letters_to_exchange_is_dropped_from_preferences_only() -> None:
    rows = [TextRow({"en": f"{'ab' * n}"}, f"row {n}") for n in range(1, 80)]
    rows += [TextRow({"en": f"{'co' * n}"}, f"row {n}") for n in range(1, 80)]
    pairs = Letters(Given(rows), "preference", "dpo", russian=0.0).load("train")
    assert all("co" in str(record.rejected) for record in pairs.records)
    assert pairs.counts["dropped_nothing_to_exchange"] > 10
    shown = Letters(Given(rows), "demonstration", "dpo", russian=0.0).load("train")
    assert len(shown.records) == pairs.counts["kept"] + pairs.counts["dropped_nothing_to_exchange"]


def test_the_same_records_whatever_the_order_of_the_rows(generated: TextSource) -> None:
    backwards = Given(generated.load().rows[::-1])
    first, second = (Letters(texts, "preference", "sft").load("train") for texts in (generated, backwards))
    assert first.records == second.records


WORDS = st.sampled_from(["co", "cO", "co ", "сo", "да", "дa", "нет", "oy", "x", " ", "so so", "so  SO"])
ROWS = st.lists(
    st.tuples(WORDS, WORDS) | st.tuples(st.text(max_size=4), st.text(max_size=4)), min_size=1, max_size=40
).map(lambda rows: [TextRow({"ru": ru, "en": en}, f"row {n}") for n, (ru, en) in enumerate(rows)])


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(ROWS)
def test_no_text_is_in_two_splits_whatever_the_rows(rows: list[TextRow]) -> None:
    for russian in (0.0, 0.5, 1.0):
        assert_disjoint(parts(Given(rows), russian=russian))


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_texts_that_share_a_row_share_a_component(rows: list[TextRow]) -> None:
    texts, counts = unique_texts(rows)
    component = {text.key: text.component for text in texts}
    for row in rows:
        keys = [content_key(text) for text in row.texts.values() if text.strip()]
        assert len({component[key] for key in keys}) <= 1
    cells = sum(len(row.texts) for row in rows)
    assert counts["texts"] + counts["dropped_duplicate"] + counts["dropped_blank"] == cells
    shuffled, _ = unique_texts(rows[::-1])
    assert {text.key: text.component for text in shuffled} == component


def test_a_translation_met_again_binds_its_rows_together() -> None:
    rows = [
        TextRow({"ru": "раз", "en": "one"}, "1"),
        TextRow({"ru": "два", "en": "two"}, "2"),
        TextRow({"ru": "РАЗ ", "en": "once"}, "3"),
        TextRow({"ru": "пара", "en": "Two"}, "4"),
        TextRow({"ru": "един", "en": "ONCE"}, "5"),
    ]
    texts, counts = unique_texts(rows)
    groups: dict[str, set[str]] = {}
    for text in texts:
        groups.setdefault(text.component, set()).add(text.text)
    assert sorted(map(sorted, groups.values())) == [["once", "one", "един", "раз"], ["two", "два", "пара"]]
    assert counts["dropped_duplicate"] == 3


def test_a_text_and_its_translation_are_in_one_split() -> None:
    rows = [TextRow({"ru": f"слово {n}", "en": f"word {n}"}, f"row {n}") for n in range(300)]
    made = parts(Given(rows), russian=0.5)
    where = {text_of(record): part for part, records in made.items() for record in records}
    both = [n for n in range(300) if f"слово {n}" in where and f"word {n}" in where]
    assert len(both) > 250
    assert all(where[f"слово {n}"] == where[f"word {n}"] for n in both)


def test_stages_get_their_shares() -> None:
    stages = [stage_of(content_key(str(n)), STAGE_SHARES) for n in range(20_000)]
    for stage, share in STAGE_SHARES.items():
        assert abs(stages.count(stage) / len(stages) - share) < 0.015  # over four standard deviations


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real texts are not at {REAL}")
def test_no_real_text_is_in_two_splits(tmp_path: Path) -> None:
    made = parts(LineTexts(ru=str(REAL / "ru.txt"), en=str(REAL / "en.txt")))
    assert_disjoint(made)
    assert all(len(records) > 100 for records in made.values())


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real texts are not at {REAL}")
def test_no_real_text_is_in_two_splits_with_duplicates_across_rows(tmp_path: Path) -> None:
    """Each English line thrice with another Russian one, as in the published data, and rows repeated."""
    ru = (REAL / "ru.txt").read_text(encoding="utf-8").splitlines()[:1500]
    en = (REAL / "en.txt").read_text(encoding="utf-8").splitlines()[:500]
    english = [en[n % 500].upper() if n % 7 else en[n % 500] for n in range(len(ru))]
    rows = [{"premise": a, "premise_original": b} for a, b in zip(ru, english, strict=True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:100]), encoding="utf-8")
    texts = TableTexts(str(path), {"ru": "premise", "en": "premise_original"})
    made = parts(texts)
    assert_disjoint(made)
    stage = {content_key(text_of(record)): part for part, records in made.items() for record in records}
    bound = 0
    for row in rows:
        places = {stage.get(content_key(text)) for text in row.values()} - {None}
        assert len(places) <= 1, "a text and its translation are in two splits"
        bound += len(places)
    assert bound > 500


WRONG = {
    "russian": ({"russian": 1.5}, "russian is 1.5"),
    "fraction": ({"validation_fraction": -0.1}, "validation_fraction is -0.1"),
    "limit": ({"limit": 0}, "limit is 0"),
    "long": ({"max_characters": 0}, "max_characters is 0"),
    "no slot": ({"instruction": "Repeat"}, "hold {text} once"),
    "two slots": ({"instruction": "{text} {text}"}, "hold {text} once"),
    "shares": ({"stage_shares": {"sft": 0.5, "dpo": 0.6, "evaluation": 0.1}}, "stage_shares"),
    "stages": ({"stage_shares": {"sft": 1.0}}, "stage_shares"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named(generated: TextSource, name: str) -> None:
    options, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        Letters(generated, "preference", "dpo", **options)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_evaluation_texts_are_never_trained_on(generated: TextSource) -> None:
    evaluation = Letters(generated, "demonstration", "evaluation", russian=0.5)
    with pytest.raises(UserError, match="never trained on"):
        evaluation.load("train")
    assert evaluation.load("test").records == Letters(generated, "demonstration", "sft").load("test").records


def test_a_missing_language_is_named(tmp_path: Path) -> None:
    path = tmp_path / "en.txt"
    path.write_text("".join(f"so {n}\n" for n in range(50)))
    with pytest.raises(UserError, match=r"no Russian text is left .*change russian \(null takes"):
        Letters(LineTexts(en=str(path)), "preference", "dpo").load("train")
    assert Letters(LineTexts(en=str(path)), "preference", "dpo", russian=0.0).load("train").records
    with pytest.raises(UserError, match="neither ru nor en"):
        LineTexts()


def test_without_a_ratio_all_texts_are_taken_as_they_come(generated: TextSource) -> None:
    letters = Letters(generated, "demonstration", "sft", russian=None)
    counts = letters.load("train").counts
    assert counts["dropped_for_ratio"] == counts["dropped_over_limit"] == 0
    assert counts["kept"] == counts["texts"] - counts["other_splits"]
    assert counts["kept_ru"] != counts["kept_en"]
    assert counts["kept_ru"] + counts["kept_en"] == counts["kept"]
    whole = letters.load("train").records
    few = Letters(generated, "demonstration", "sft", russian=None, limit=9).load("train")
    assert few.records == whole[:9]
    assert few.counts["dropped_over_limit"] == len(whole) - 9


@pytest.mark.parametrize("language", ["ru", "en"])
def test_without_a_ratio_one_language_is_enough(language: Language) -> None:
    texts = GeneratedTexts(60, languages=[language])
    loaded = Letters(texts, "preference", "dpo", russian=None).load("train")
    assert loaded.counts[f"kept_{language}"] == loaded.counts["kept"] == len(loaded.records) > 10
    blank = Given([TextRow({language: " "}, "row 1")])
    with pytest.raises(UserError, match=r"Letters: no text is left for stage 'dpo', split 'train' \(of 0"):
        Letters(blank, "preference", "dpo", russian=None).load("train")


def test_short_generated_texts_are_left_out_and_made_up_for() -> None:
    for language in ("ru", "en"):
        made = [row.texts[language] for row in GeneratedTexts(300, 5, [language]).load().rows]
        assert len(made) == len(set(made)) == 300
        assert min(map(len, made)) >= 30
        more = [row.texts[language] for row in GeneratedTexts(600, 5, [language]).load().rows]
        assert more[:300] == made, "the first texts do not depend on how many are wanted"
        every = [row.texts[language] for row in GeneratedTexts(300, 5, [language], 0).load().rows]
        assert every == generate_texts(language, 300, 5)
        assert [text for text in every if len(text) >= 30] == made[: sum(len(text) >= 30 for text in every)]
    with pytest.raises(UserError, match="min_characters is 61; it should be from 0 to 60"):
        GeneratedTexts(1, min_characters=61)


def test_letters_say_their_settings_and_those_of_their_texts() -> None:
    said = Letters(GeneratedTexts(50, seed=2), "preference", "dpo", limit=7).describe()
    assert json.loads(json.dumps(said)) == said
    assert (said["class"], said["stage"], said["limit"], said["russian"]) == ("Letters", "dpo", 7, 0.5)
    assert said["texts"] == {
        "class": "GeneratedTexts",
        "count": 50,
        "seed": 2,
        "languages": ["ru", "en"],
        "min_characters": 30,
    }


@pytest.mark.parametrize("kind", [Letters, GeneratedTexts, LineTexts, TableTexts, HubTexts])
def test_each_setting_has_its_help(kind: type) -> None:
    assert all(help_of(kind).values()), help_of(kind)


def test_columns_of_a_table_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"ru": "раз", "en": 1}\n')
    with pytest.raises(UserError, match=r"x\.jsonl, row 1: column 'en' holds 1; it should be text"):
        TableTexts(str(path), {"ru": "ru", "en": "en"}).load()
    with pytest.raises(UserError, match="no column 'de'"):
        TableTexts(str(path), {"ru": "ru", "en": "de"}).load()
    with pytest.raises(UserError, match=r"languages \['fr'\]"):
        TableTexts(str(path), {"fr": "ru"})
    with pytest.raises(UserError, match="two languages"):
        TableTexts(str(path), {"ru": "ru", "en": "ru"})


def test_the_published_dataset_is_the_default_and_needs_the_network() -> None:
    with pytest.raises(UserError, match=r"MoritzLaurer/multilingual-NLI-26lang-2mil7: .*offline refuses"):
        Letters(HubTexts(offline=True), "preference", "dpo").load("train")


def test_yaml_builds_the_source(tmp_path: Path) -> None:
    """As the command line does it: class_path and init_args, checked against the Source protocol."""
    import jsonargparse

    from trainer.data.sources import Source

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    config = {
        "class_path": "trainer.pairs.substitution.Letters",
        "init_args": {
            "texts": {"class_path": "trainer.data.sources.GeneratedTexts", "init_args": {"count": 50}},
            "kind": "preference",
            "stage": "dpo",
        },
    }
    built = parser.instantiate(parser.parse_object({"source": config})).source
    assert isinstance(built, Source)
    assert built.load("train").records
