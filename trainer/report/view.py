"""A report's JSON turned into what the templates place: nothing here knows HTML or Markdown."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from trainer.data.homoglyphs import align, is_substituted
from trainer.report.runs import describe

Report = Mapping[str, Any]

LABELS = {"base": "Before training", "sft": "SFT", "sft_long": "SFT, same total steps", "dpo": "DPO"}
EXAMPLES, MORE_EXAMPLES, SAMPLE_STEPS = 3, 20, 6


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share and its interval, of 1, and as text; `value` None where there was nothing to count."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        return percent(self.value)

    @property
    def between(self) -> str:
        return (
            "" if self.low is None or self.high is None else f"{percent(self.low)[:-2]}–{percent(self.high)}"
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table of rates."""

    label: str
    swapped: Rate
    kept: Rate
    added: int | None = None
    sentences: int | None = None
    published: bool = False


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one stage made of a sentence: (text, kind) runs, kind being `swapped`, `changed` or empty."""

    label: str
    runs: list[tuple[str, str]]
    published: bool = False


@dataclasses.dataclass(frozen=True)
class Sentence:
    source: str
    answers: list[Answer]


def percent(value: float | None) -> str:
    """0.9765 as `97.7 %` (no-break space); a dash where there is no value."""
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def label(report: Report, stage: str) -> str:
    """What a stage is called in the tables."""
    evaluation = (report.get("stages") or {}).get(stage) or {}
    run, slash, name = stage.rpartition("/")
    given = evaluation.get("label")
    return f"{run}{slash}{given if given and given != name else LABELS.get(name, name)}"


def marked(source: str, output: str) -> list[tuple[str, str]]:
    """`output` in runs: letters exchanged for a twin (`swapped`), others not of the source (`changed`)."""
    pairs = [pair for pair in align(source, output) if pair[1] is not None]

    def kind(pair: tuple[str | None, str | None]) -> str:
        if is_substituted(*pair):
            return "swapped"
        return "" if pair[0] == pair[1] else "changed"

    return [
        ("".join(str(after) for _, after in run), name) for name, run in itertools.groupby(pairs, key=kind)
    ]


def view(report: Report) -> dict[str, Any]:
    """Everything a template places, in reading order; whatever the report lacks is empty."""
    stages = {name: stage for name, stage in (report.get("stages") or {}).items() if stage}
    pieces = _sentences(report, stages)
    return {
        "title": report.get("title") or "tandem",
        "created": str(report.get("created") or "").replace("T", " ").replace("+00:00", " UTC"),
        "machine": machine(report.get("machine") or {}),
        "headline": headline(report),
        "setting": _setting(stages),
        "rates": [_row(label(report, name), stage) for name, stage in stages.items()],
        "closer": _closer(report, stages),
        "published": _published_rates(report, stages),
        "examples": pieces[: 2 * EXAMPLES],
        "more_examples": pieces[2 * EXAMPLES :],
        "published_sentences": _published_sentences(report, stages),
        "runs": [
            {"label": label(report, name)} | describe(run)
            for name, run in (report.get("runs") or {}).items()
            if run
        ],
        "samples": _samples(report),
        "commands": list(report.get("commands") or []),
        "git": report.get("git") or "not from a git checkout",
        "code": str(report.get("code") or "")[:12],
        "versions": dict(report.get("versions") or {}),
    }


def headline(report: Report) -> str:
    """One sentence with the last stage's figures beside those from before training."""
    stages = {name: stage for name, stage in (report.get("stages") or {}).items() if stage}
    if not stages:
        count = len(report.get("runs") or {})
        return f"{count} run{'s' * (count != 1)}, none of them evaluated yet."
    finals = [name for name in stages if name.split("/")[-1] == "dpo"] or [list(stages)[-1]]
    if len(finals) > 1:
        rows = [_row(label(report, name), stages[name]) for name in finals]
        return (
            "Swapped and kept: "
            + "; ".join(f"{r.label} {r.swapped.text} and {r.kept.text}" for r in rows)
            + "."
        )
    return _one_headline(_row(label(report, finals[0]), stages[finals[0]]), finals[0], stages)


def _one_headline(row: Row, last: str, stages: Mapping[str, Any]) -> str:
    if row.swapped.value is None and row.kept.value is None:
        return f"{row.label}: the evaluation counted nothing."
    swapped = row.swapped.text + (
        f" (95\u00a0% interval {row.swapped.between})" if row.swapped.between else ""
    )
    kept = row.kept.text + (f" ({row.kept.between})" if row.kept.between else "")
    when = "Before training" if last == "base" else f"After {row.label}"
    text = f"{when} the model swaps {swapped} of the look-alike letters and keeps {kept} of everything else"
    base = stages.get("base") or {}
    if last != "base" and base.get("substitution_rate") is not None:
        text += f"; before training it swapped {percent(base['substitution_rate'])}"
    return text + "."


def machine(found: Mapping[str, Any]) -> str:
    """`2 CPU cores, CPUAccelerator on host`, as far as known."""
    cores = f"{found['cpus']} CPU cores" if found.get("cpus") else ""
    ranks = f"{found['world_size']} ranks" if (found.get("world_size") or 1) > 1 else ""
    accelerator = str(found.get("accelerator") or "").replace("Accelerator", "")
    return ", ".join(part for part in (accelerator, cores, ranks) if part)


def _rate(summary: Mapping[str, Any], name: str) -> Rate:
    low, high = summary.get(f"{name}_interval") or (None, None)
    return Rate(summary.get(f"{name}_rate"), low, high)


def _row(name: str, summary: Mapping[str, Any], published: bool = False) -> Row:
    swapped, kept = _rate(summary, "substitution"), _rate(summary, "keep")
    return Row(name, swapped, kept, summary.get("added"), summary.get("sentences"), published)


def _setting(stages: Mapping[str, Any]) -> str:
    """`400 sentences, cut at 48 characters, greedy decoding`."""
    found = []
    for stage in stages.values():
        settings = stage.get("settings") or {}
        parts = [f"{stage['sentences']} sentences"] if stage.get("sentences") else []
        parts += [f"cut at {settings['cut']} characters"] if settings.get("cut") else []
        parts += [f"{settings['decoding']} decoding"] if settings.get("decoding") else []
        found.append(", ".join(parts))
    return "; ".join(dict.fromkeys(filter(None, found)))


def _closer(report: Report, stages: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same rates by language, for whole lines, and with capitals counted: a table for each."""
    tables = []
    wanted: list[tuple[str, tuple[str, ...]]] = [
        ("Russian sentences", ("languages", "ru")),
        ("English sentences", ("languages", "en")),
    ]
    wanted += [
        ("Whole lines, without the cut", ("whole_lines",)),
        ("Capitals counted as look-alikes too", ("capitals",)),
    ]
    for title, keys in wanted:
        rows = []
        for name, stage in stages.items():
            part: Any = stage
            for key in keys:
                part = (part or {}).get(key)
            if part:
                rows.append(_row(label(report, name), part))
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def _published_rates(report: Report, stages: Mapping[str, Any]) -> list[Row]:
    rows = [
        _row(label(report, name), stage["published"])
        for name, stage in stages.items()
        if stage.get("published")
    ]
    if not rows:
        return []
    for name, summary in (report.get("published") or {}).items():
        rows.append(_row(_theirs(name), summary, published=True))
    return rows


def _outputs(stages: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """stage -> source -> output."""
    return {
        name: {row["source"]: row["output"] for row in stage.get("examples") or []}
        for name, stage in stages.items()
    }


def _sentences(report: Report, stages: Mapping[str, Any]) -> list[Sentence]:
    """The first sentences of each language by turns, as they come."""
    outputs = {name: found for name, found in _outputs(stages).items() if found}
    if not outputs:
        return []
    sources = [
        source
        for source in next(iter(outputs.values()))
        if all(source in found for found in outputs.values())
    ]
    russian = [source for source in sources if _is_russian(source)]
    english = [source for source in sources if not _is_russian(source)]
    turns = [s for pair in itertools.zip_longest(russian, english) for s in pair if s is not None]
    shown = turns[: 2 * EXAMPLES + MORE_EXAMPLES]
    return [_sentence(report, source, outputs) for source in shown]


def _sentence(report: Report, source: str, outputs: Mapping[str, Mapping[str, str]]) -> Sentence:
    answers = [Answer(label(report, name), marked(source, found[source])) for name, found in outputs.items()]
    return Sentence(source, answers)


def _published_sentences(report: Report, stages: Mapping[str, Any]) -> list[Sentence]:
    ours = _outputs({name: stage["published"] for name, stage in stages.items() if stage.get("published")})
    if not ours:
        return []
    theirs = _outputs(report.get("published") or {})
    sources = list(dict.fromkeys(source for found in [*theirs.values(), *ours.values()] for source in found))
    sentences = []
    for source in sources:
        answers = [
            Answer(label(report, name), marked(source, found[source]))
            for name, found in ours.items()
            if source in found
        ]
        answers += [
            Answer(_theirs(name), marked(source, found[source]), published=True)
            for name, found in theirs.items()
            if source in found
        ]
        sentences.append(Sentence(source, answers))
    return sentences


def _theirs(stage: str) -> str:
    return "Published, before training" if stage == "base" else f"Published {LABELS.get(stage, stage)}"


def _is_russian(text: str) -> bool:
    return any("а" <= char <= "я" for char in text.lower())


def _samples(report: Report) -> list[dict[str, Any]]:
    """For each run its first two prompts, answered at a few steps from the first to the last."""
    shown = []
    for name, rows in (report.get("samples") or {}).items():
        prompts = list(dict.fromkeys(row.get("prompt") for row in rows if row.get("prompt")))[:2]
        for prompt in prompts:
            answers = [row for row in rows if row.get("prompt") == prompt and row.get("policy") is not None]
            picked = _spread(answers, SAMPLE_STEPS)
            steps = [(row.get("step"), marked(prompt, row["policy"])) for row in picked]
            shown.append({"label": label(report, name), "prompt": prompt, "steps": steps})
    return shown


def _spread(rows: list[Any], count: int) -> list[Any]:
    if len(rows) <= count:
        return rows
    return [rows[round(place * (len(rows) - 1) / (count - 1))] for place in range(count)]
