"""What a run learns from: the `Source` of records, and the texts (Russian, English) that pairs are made of.

No text may be in two splits, in either language. Texts of one row are translations of each other, so rows
that share a text in any language form a component, and it is the component's hash that chooses the split.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from typing_extensions import override

from trainer.data.files import Table, fingerprint, read_rows
from trainer.data.homoglyphs import fold
from trainer.provenance import sha256_text
from trainer.schema import Demonstration, Preference, Split, UserError

__all__ = [
    "GeneratedTexts",
    "HubTexts",
    "Language",
    "LineTexts",
    "Loaded",
    "Source",
    "Streamed",
    "Table",
    "TableTexts",
    "TextRow",
    "TextSource",
    "Texts",
    "UniqueText",
    "content_key",
    "read_rows",
    "split_share",
    "streamed",
    "unique_texts",
]

Language = Literal["ru", "en"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Records of one split; `counts` (kept, dropped_<why>); `hashes` (file -> SHA-256, hub -> commit).

    `load` gives a list, or any iterable, which is read once: `counts` are final when it is.
    """

    records: Iterable[Demonstration] | Iterable[Preference]
    counts: dict[str, int]
    hashes: dict[str, str]


@runtime_checkable
class Source(Protocol):
    """Where a run's records come from. `prompt_template` holds `{text}` where prompts are made from one.

    Two methods more, where a source has them, make big data cheap. `stream(split)`: as `load`, its records read as they
    are asked for. `fingerprint(split) -> dict[str, str]`: hashes of all that its records follow from beside its
    settings and code, without reading records; tokens are then cached, and found again by it. A class that inherits
    `fingerprint` has to define its own for that: what it does with the records, and with what it imports, is known to
    it alone.

    And two that refuse, by a `UserError`, what its records were not made for: `check_tokenizer(tokenizer)` before they
    are tokenised, `check_reference(fingerprint)` before a preference run is trained or validated against that
    reference, and before its log-probs are kept.
    """

    prompt_template: str | None

    def load(self, split: Split) -> Loaded:
        """Read one split; a `UserError` names what is wrong."""
        ...

    def describe(self) -> dict[str, Any]:
        """The source's settings as plain JSON, for the run's manifest."""
        return described(self)


def streamed(source: Source, split: Split) -> Loaded:
    """A split of a source, read as it is asked for where the source can."""
    loaded: Loaded = getattr(source, "stream", source.load)(split)
    return loaded


class Streamed(Iterator[Any]):
    """Records that are read as they are asked for, and about how many there will be."""

    def __init__(self, records: Iterator[Any], expected: int) -> None:
        self._records, self._expected = records, expected

    def __next__(self) -> Any:
        return next(self._records)

    def __length_hint__(self) -> int:
        return self._expected


def described(settings: Any) -> dict[str, Any]:
    """A dataclass's name and fields as plain JSON; those that are described themselves inside."""
    fields = {field.name: _plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    return {"class": type(settings).__name__, **fields}


def _plain(value: Any) -> Any:
    if hasattr(value, "describe"):
        return value.describe()
    return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True, slots=True)
class TextRow:
    """One row of a text source: the same text in one or more languages, and where it stood."""

    texts: dict[Language, str]
    origin: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """All rows of a text source, and the hashes of what they were read from."""

    rows: list[TextRow]
    hashes: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class UniqueText:
    """One text, met once: `key` is its content key, `component` that of the component it belongs to."""

    text: str
    language: Language
    key: str
    component: str
    origin: str


class TextSource(abc.ABC):
    """Texts in Russian and English."""

    @abc.abstractmethod
    def load(self) -> Texts:
        """Read all rows; a `UserError` names what is wrong."""

    def fingerprint(self) -> dict[str, str] | None:
        """Hashes of all that the rows follow from beside settings and code; None where nothing says that."""
        return None

    def describe(self) -> dict[str, Any]:
        """The source's settings as plain JSON, for the run's manifest."""
        return described(self)


@dataclasses.dataclass
class GeneratedTexts(TextSource):
    """Texts made by the project's own generator: no file, no network.

    Args:
        count: how many of each language.
        seed: another seed gives other texts.
        languages: of `ru` and `en`.
        min_characters: leave out shorter texts, 0 to 60; more are made until there are `count`. There are so
            few short sentences that the base model may have been trained on the same ones.
    """

    count: int
    seed: int = 0
    languages: Sequence[Language] = ("ru", "en")
    min_characters: int = 30

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"GeneratedTexts: count is {self.count}; it should be 1 or more")
        if not 0 <= self.min_characters <= 60:
            raise UserError(
                f"GeneratedTexts: min_characters is {self.min_characters}; it should be from 0 to 60"
            )

    def load(self) -> Texts:
        rows: list[TextRow] = []
        hashes = {}
        for language in self.languages:
            made = self._made(language)
            hashes[f"generated/{language}/{self.count}/{self.seed}"] = sha256_text(*made)
            rows += [
                TextRow({language: text}, f"generated/{language}, row {n}") for n, text in enumerate(made, 1)
            ]
        return Texts(rows, hashes)

    @override
    def fingerprint(self) -> dict[str, str]:
        return {}

    def _made(self, language: Language) -> list[str]:
        """The first `count` texts of the generator's endless row that are long enough."""
        from trainer.data.corpus import generate_texts

        drawn = self.count
        while True:
            made = [t for t in generate_texts(language, drawn, self.seed) if len(t) >= self.min_characters]
            if len(made) >= self.count:
                return made[: self.count]
            drawn *= 2


@dataclasses.dataclass
class LineTexts(TextSource):
    """Text files of one language each, one text a line.

    Args:
        ru: file of Russian texts (.txt or .txt.gz).
        en: file of English texts (.txt or .txt.gz).
    """

    ru: str | None = None
    en: str | None = None

    def __post_init__(self) -> None:
        if self.ru is None and self.en is None:
            raise UserError("LineTexts: neither ru nor en is given; name at least one text file")

    def load(self) -> Texts:
        rows: list[TextRow] = []
        hashes: dict[str, str] = {}
        files: dict[Language, str | None] = {"ru": self.ru, "en": self.en}
        for language, path in files.items():
            if path is not None:
                table = read_rows(path, columns=["text"], offline=True)
                hashes |= table.hashes
                rows += [
                    TextRow({language: row["text"].removeprefix("\ufeff")}, origin) for origin, row in table
                ]
        return Texts(rows, hashes)

    @override
    def fingerprint(self) -> dict[str, str]:
        return {
            path: found
            for name in (self.ru, self.en)
            if name is not None
            for path, found in fingerprint(name, offline=True).items()
        }


@dataclasses.dataclass
class TableTexts(TextSource):
    """A local JSONL, JSON, CSV or parquet file with a column for each language; a row's texts say the same.

    Args:
        path: the file.
        columns: language (`ru`, `en`) -> column.
    """

    path: str
    columns: dict[str, str]

    def __post_init__(self) -> None:
        _languages(self.columns, "TableTexts")

    def load(self) -> Texts:
        table = read_rows(self.path, columns=list(self.columns.values()), offline=True)
        return Texts(list(_text_rows(table, _languages(self.columns, "TableTexts"))), table.hashes)

    @override
    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.path, offline=True)


@dataclasses.dataclass
class HubTexts(TextSource):
    """A dataset of the hub with a column for each language (needs the network); by default the published one.

    Args:
        dataset: `owner/name`.
        split: of the dataset.
        columns: language (`ru`, `en`) -> column; by default Russian `premise` and English `premise_original`.
        revision: branch, tag or commit.
        offline: refuse the network.
    """

    dataset: str = "MoritzLaurer/multilingual-NLI-26lang-2mil7"
    split: str = "ru_mnli"
    columns: dict[str, str] | None = None
    revision: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        self._columns = _languages(self.columns or {"ru": "premise", "en": "premise_original"}, "HubTexts")

    def load(self) -> Texts:
        table = read_rows(
            self.dataset,
            columns=list(self._columns.values()),
            split=self.split,
            revision=self.revision,
            offline=self.offline,
        )
        return Texts(list(_text_rows(table, self._columns)), table.hashes)

    @override
    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.dataset, self.split, self.revision, self.offline)


def _languages(columns: dict[str, str], where: str) -> dict[Language, str]:
    known: dict[Language, str] = {code: columns[code] for code in get_args(Language) if code in columns}
    unknown = sorted(set(columns) - set(known))
    if unknown or not known:
        raise UserError(
            f"{where}: columns has languages {unknown or 'none'}; it should map 'ru' and 'en' to columns"
        )
    if len(set(known.values())) < len(known):
        raise UserError(
            f"{where}: columns names {known['ru']!r} for two languages; each needs a column of its own"
        )
    return known


def _text_rows(table: Table, columns: dict[Language, str]) -> Iterator[TextRow]:
    for origin, row in table:
        texts: dict[Language, str] = {}
        for language, column in columns.items():
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise UserError(f"{origin}: column {column!r} holds {value!r}; it should be text")
            texts[language] = value or ""
        yield TextRow(texts, origin)


# --- one text, one split ------------------------------------------------------------------------------------


def content_key(text: str) -> str:
    """SHA-256 of what a text says: case, spacing, Unicode form and exchanged letters do not count."""
    plain = " ".join(unicodedata.normalize("NFKC", fold(text)).casefold().split())
    return sha256_text(plain)


def unique_texts(rows: Iterable[TextRow]) -> tuple[list[UniqueText], Counter[str]]:
    """Each text once, as first met; and counts: rows, texts, dropped_blank, dropped_duplicate."""
    counts: Counter[str] = Counter(rows=0, texts=0, dropped_blank=0, dropped_duplicate=0)
    found: dict[str, tuple[str, Language, str]] = {}
    parents: dict[str, str] = {}
    for row in rows:
        counts["rows"] += 1
        keys = []
        for language, raw in row.texts.items():
            text = raw.strip()
            if not text:
                counts["dropped_blank"] += 1
                continue
            key = content_key(text)
            keys.append(key)
            counts["dropped_duplicate"] += key in found
            found.setdefault(key, (text, language, row.origin))
        for key in keys:
            _join(parents, keys[0], key)
    counts["texts"] = len(found)
    texts = [
        UniqueText(text, lang, key, _root(parents, key), origin)
        for key, (text, lang, origin) in found.items()
    ]
    return texts, counts


def _root(parents: dict[str, str], key: str) -> str:
    parents.setdefault(key, key)
    while parents[key] != key:
        parents[key] = key = parents[parents[key]]
    return key


def _join(parents: dict[str, str], a: str, b: str) -> None:
    """Join two components; the smaller key stays root, whatever the order of the rows."""
    low, high = sorted((_root(parents, a), _root(parents, b)))
    parents[high] = low


def split_share(component: str, purpose: str) -> float:
    """A number in [0, 1) that follows from the component's content alone, another one for each purpose."""
    digest = hashlib.sha256(f"{purpose}/{component}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
