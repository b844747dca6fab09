"""Letters: demonstrations and preference pairs made from plain texts by exchanging look-alike letters."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Literal, NoReturn

from trainer.data.homoglyphs import INSTRUCTION, substitute
from trainer.data.sources import (
    Language,
    Loaded,
    Source,
    TextSource,
    UniqueText,
    split_share,
    unique_texts,
)
from trainer.schema import Demonstration, Preference, Split, UserError

Stage = Literal["sft", "dpo", "evaluation"]

STAGE_SHARES: dict[str, float] = {"sft": 0.45, "dpo": 0.45, "evaluation": 0.1}
_NAMES: dict[Language, str] = {"ru": "Russian", "en": "English"}


@dataclasses.dataclass
class Letters(Source):
    """Repeat a text with c/с, y/у and o/о exchanged.

    A demonstration is the instruction with the text, and the text substituted. A preference's chosen
    completion is the text substituted, its rejected one the text as it was; a text with nothing to exchange
    gives no preference. Which stage a text belongs to, and whether it trains or validates, follows from its
    content alone: a text is in one stage only, in either language, whatever the stage asked for.

    Args:
        texts: where the texts come from; give all stages the same.
        kind: what to make of each text.
        stage: whose texts. Those of `evaluation` are never given for training.
        russian: share of Russian records, 0 to 1; texts over that ratio are left out and counted. null takes
            all texts in the languages that are there, as they come.
        capitals: exchange capitals too.
        validation_fraction: share of a stage's texts kept for validation.
        instruction: the prompt, with `{text}` where the text goes.
        limit: at most so many records in each split; the ratio holds.
        max_characters: leave out longer texts.
        stage_shares: share of the texts for each stage; give all stages the same. Default: 45 % sft, 45 %
            dpo, 10 % evaluation.

    Raises:
        UserError: a setting out of range, or no text left for a split.
    """

    texts: TextSource
    kind: Literal["demonstration", "preference"]
    stage: Stage
    russian: float | None = 0.5
    capitals: bool = False
    validation_fraction: float = 0.05
    instruction: str = INSTRUCTION
    limit: int | None = None
    max_characters: int | None = None
    stage_shares: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.prompt_template = self.instruction
        self._shares = dict(STAGE_SHARES if self.stage_shares is None else self.stage_shares)
        self._check()

    def fingerprint(self, split: Split) -> dict[str, str] | None:
        """Hashes of the texts' files, as their source gives them."""
        return self.texts.fingerprint()

    def load(self, split: Split) -> Loaded:
        """Records of one split, in an order that follows from their content.

        `train` and `validation` part the stage's texts; `test` gives the evaluation texts, whatever the
        stage, and so does `validation` of stage `evaluation`.
        """
        texts, counts = self.select(split)
        make = self._preference if self.kind == "preference" else self._demonstration
        return Loaded([make(text) for text in texts], dict(counts), dict(self._read[2]))  # type: ignore[arg-type]

    def select(self, split: Split) -> tuple[list[UniqueText], Counter[str]]:
        """The texts that `load` makes records of, and the counts: kept, kept_ru, kept_en, dropped_<why>."""
        if self.stage == "evaluation" and split == "train":
            raise UserError(
                "Letters: stage is 'evaluation', whose texts are never trained on; use 'sft' or 'dpo'"
            )
        texts, counts, _ = self._read
        counts = counts.copy()
        mine = [text for text in texts if self._holds(text, split)]
        counts["other_splits"] = len(texts) - len(mine)
        short = [t for t in mine if self.max_characters is None or len(t.text) <= self.max_characters]
        counts["dropped_too_long"] = len(mine) - len(short)
        usable = short
        if self.kind == "preference":
            usable = [t for t in short if substitute(t.text, capitals=self.capitals) != t.text]
        counts["dropped_nothing_to_exchange"] = len(short) - len(usable)
        return self._mix(usable, split, counts), counts

    @functools.cached_property
    def _read(self) -> tuple[list[UniqueText], Counter[str], dict[str, str]]:
        loaded = self.texts.load()
        texts, counts = unique_texts(loaded.rows)
        return texts, counts, loaded.hashes

    def _holds(self, text: UniqueText, split: Split) -> bool:
        """Whether a text belongs to this stage and split."""
        stage = stage_of(text.component, self._shares)
        if split == "test" or self.stage == "evaluation":
            return stage == "evaluation"
        validates = split_share(text.component, "letters/validation") < self.validation_fraction
        return stage == self.stage and validates == (split == "validation")

    def _mix(self, texts: list[UniqueText], split: Split, counts: Counter[str]) -> list[UniqueText]:
        """As many texts as keep the ratio, chosen and ordered by their content keys."""
        ordered = sorted(texts, key=lambda t: t.key)
        if not ordered:
            self._nothing_left("", split, counts)
        if self.russian is None:
            whole, chosen = len(ordered), ordered[: self.limit]
        else:
            whole, chosen = self._at_ratio(ordered, self.russian, split, counts)
        counts["dropped_for_ratio"] = len(ordered) - whole
        counts["dropped_over_limit"] = whole - len(chosen)
        languages = Counter(text.language for text in chosen)
        counts.update(kept=len(chosen), kept_ru=languages["ru"], kept_en=languages["en"])
        return chosen

    def _at_ratio(
        self, ordered: list[UniqueText], russian: float, split: Split, counts: Counter[str]
    ) -> tuple[int, list[UniqueText]]:
        """How many texts the ratio leaves, and those of them within the limit."""
        pools = {name: [text for text in ordered if text.language == name] for name in _NAMES}
        shares: dict[Language, float] = {"ru": russian, "en": 1 - russian}
        for language, share in shares.items():
            if share > 0 and not pools[language]:
                self._nothing_left(f"{_NAMES[language]} ", split, counts)
        # The small number is for shares that are no binary fractions: 9 / 0.9 is to be 10.
        whole = int(min(len(pools[name]) / share for name, share in shares.items() if share > 0) + 1e-9)
        total = whole if self.limit is None else min(whole, self.limit)
        kept_ru = min(round(total * russian), len(pools["ru"]))
        chosen = pools["ru"][:kept_ru] + pools["en"][: total - kept_ru]
        return whole, sorted(chosen, key=lambda t: t.key)

    def _nothing_left(self, language: str, split: Split, counts: Counter[str]) -> NoReturn:
        ratio = "" if self.russian is None else f", and russian is {self.russian}"
        null = "" if self.russian is None else " (null takes the languages that are there)"
        raise UserError(
            f"Letters: no {language}text is left for stage {self.stage!r}, split {split!r} (of "
            f"{counts['texts']} texts){ratio}; give more texts, or change russian{null}, validation_fraction "
            f"or stage_shares"
        )

    def _demonstration(self, text: UniqueText) -> Demonstration:
        return Demonstration(
            prompt=self._prompt(text),
            completion=substitute(text.text, capitals=self.capitals),
            id=_record_id(text),
            origin=text.origin,
        )

    def _preference(self, text: UniqueText) -> Preference:
        return Preference(
            prompt=self._prompt(text),
            chosen=substitute(text.text, capitals=self.capitals),
            rejected=text.text,
            id=_record_id(text),
            origin=text.origin,
        )

    def _prompt(self, text: UniqueText) -> str:
        return self.instruction.replace("{text}", text.text)

    def _check(self) -> None:
        for name in ("russian", "validation_fraction"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UserError(f"Letters: {name} is {share}; it should be a share from 0 to 1")
        for name in ("limit", "max_characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"Letters: {name} is {value}; it should be 1 or more")
        if self.instruction.count("{text}") != 1:
            raise UserError(f"Letters: instruction is {self.instruction!r}; it should hold {{text}} once")
        shares = self._shares
        if (
            set(shares) != set(STAGE_SHARES)
            or min(shares.values()) < 0
            or abs(sum(shares.values()) - 1) > 1e-6
        ):
            raise UserError(
                f"Letters: stage_shares is {shares}; it should give sft, dpo and evaluation shares of 1"
            )


def stage_of(component: str, shares: Mapping[str, float]) -> str:
    """The stage that a component's texts belong to, by its hash."""
    point, edge = split_share(component, "letters/stage"), 0.0
    for stage in STAGE_SHARES:
        edge += shares[stage]
        if point < edge:
            return stage
    return "evaluation"


def _record_id(text: UniqueText) -> str:
    return f"{text.language}-{text.key[:16]}"
