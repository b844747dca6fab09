"""A report's JSON turned into what the templates place: nothing here knows HTML or Markdown."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.data.homoglyphs import language, marked
from trainer.report import reward_view, self_play_view, win_rate_view
from trainer.report.pairs_view import headline as pairs_headline
from trainer.report.pairs_view import pairs_view
from trainer.report.runs import describe, machine, provenance
from trainer.report.texts import facts, kept, readable

Report = Mapping[str, Any]

LABELS = {"base": "Before training", "sft": "SFT", "sft_long": "SFT, same total steps", "dpo": "DPO"}
EXAMPLES, MORE_EXAMPLES, SAMPLE_STEPS = 3, 20, 6
_EVALUATED = ("stages", "rewards", "win_rates")
# What a manifest says that its card does not: it stands below, or is too long.
_NOT_FACTS = ("kind", "status", "label", "versions", "git", "code", "files", "started", "ended")


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
    """What one stage made of a sentence, `marked`; without a label it keeps a column empty."""

    label: str
    runs: Sequence[tuple[str, str]]
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
    found = [(report.get(part) or {}).get(stage) or {} for part in _EVALUATED]
    run, slash, name = stage.rpartition("/")
    given = next((readable(each["label"]) for each in found if each.get("label")), None)
    return f"{run}{slash}{given if given and given != name else LABELS.get(name, name)}"


def view(report: Report) -> dict[str, Any]:
    """Everything a template places, in reading order; whatever the report lacks is empty."""
    stages = {name: stage for name, stage in (report.get("stages") or {}).items() if stage}
    runs = {name: run for name, run in (report.get("runs") or {}).items() if run}
    pieces = _sentences(report, stages)

    def called(stage: str) -> str:
        return label(report, stage)

    return {
        "title": report.get("title") or "tandem",
        "created": str(report.get("created") or "").replace("T", " ").replace("+00:00", " UTC"),
        "machine": "; ".join(dict.fromkeys(filter(None, map(machine, runs.values())))),
        "headline": headline(report),
        "setting": _setting(stages),
        "rates": [_row(label(report, name), stage) for name, stage in stages.items()],
        "closer": _closer(report, stages),
        "published": _published_rates(report, stages),
        "rewards": reward_view.reward_view(report.get("rewards") or {}, called),
        "win_rates": win_rate_view.win_rate_view(report.get("win_rates") or {}, called),
        "self_play": self_play_view.self_play_view(report.get("self_play") or {}),
        "pairs": [pairs_view(each, name) for name, each in _pairs(report).items()],
        "made": [_made(report, name, made) for name, made in (report.get("made") or {}).items() if made],
        "examples": pieces[: 2 * EXAMPLES],
        "more_examples": pieces[2 * EXAMPLES :],
        "published_sentences": _published_sentences(report, stages),
        "runs": [{"label": label(report, name)} | describe(run) for name, run in runs.items()],
        "samples": _samples(report),
        "commands": list(report.get("commands") or []),
        "provenance": provenance(
            {label(report, name): run for name, run in runs.items()},
            {
                label(report, name): each
                for part in _EVALUATED
                for name, each in (report.get(part) or {}).items()
                if each
            },
            report.get("report") or {},
        ),
    }


def _pairs(report: Report) -> dict[str, Any]:
    """The pairs' summaries by what they are called: `Pairs, without prompts` in pairs_without_prompts/."""
    return {_pairs_title(name): each for name, each in (report.get("pairs") or {}).items()}


def _pairs_title(stage: str) -> str:
    run, slash, name = stage.rpartition("/")
    first, _, rest = name.partition("_")
    told = f"Pairs{', ' * bool(rest)}{rest.replace('_', ' ')}" if first == "pairs" else f"Pairs: {name}"
    return f"{run}{slash}{told}"


def _made(report: Report, name: str, made: Mapping[str, Any]) -> dict[str, Any]:
    told = {key: value for key, value in made.items() if key not in _NOT_FACTS}
    return {"label": label(report, name), "kind": readable(made.get("kind") or ""), "facts": facts(told)[:24]}


def headline(report: Report) -> str:
    """A line for each kind of evaluation, with the last stage's figures beside those from before training."""

    def called(stage: str) -> str:
        return label(report, stage)

    told = [
        _letters_headline(report),
        reward_view.headline(report.get("rewards") or {}, called),
        win_rate_view.headline(report.get("win_rates") or {}, called),
        self_play_view.headline(report.get("self_play") or {}),
    ]
    if any(told):
        return "\n".join(filter(None, told))
    if pairs := _pairs(report):
        return "\n".join(
            f"{name}: {pairs_headline(each)}" if len(pairs) > 1 else pairs_headline(each)
            for name, each in pairs.items()
        )
    count = len(report.get("runs") or {})
    return f"{count} run{'s' * (count != 1)}, none of them evaluated yet."


def _letters_headline(report: Report) -> str:
    stages = {name: stage for name, stage in (report.get("stages") or {}).items() if stage}
    if not stages:
        return ""
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
    wanted: list[tuple[str, tuple[str, ...], str]] = [
        ("Russian sentences", ("languages", "ru"), ""),
        ("English sentences", ("languages", "en"), ""),
        ("Whole lines, without the cut", ("whole_lines",), _left_out(report, stages)),
        ("Capitals and lower case together", ("capitals",), _capitals(report, stages)),
    ]
    for title, keys, note in wanted:
        rows = []
        for name, stage in stages.items():
            part: Any = stage
            for key in keys:
                part = (part or {}).get(key)
            if part:
                rows.append(_row(label(report, name), part))
        if rows:
            tables.append({"title": title, "rows": rows, "note": note})
    return tables


def _left_out(report: Report, stages: Mapping[str, Any]) -> str:
    counts = {
        label(report, name): (stage.get("whole_lines") or {}).get("dropped_overlong")
        for name, stage in stages.items()
    }
    if not any(counts.values()):
        return ""
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values()))} lines are longer than the model's positions and left out."
    told = "; ".join(f"{name}: {count or 0}" for name, count in counts.items())
    return f"Lines left out, longer than the model's positions. {told}."


def _capitals(report: Report, stages: Mapping[str, Any]) -> str:
    """What the table of capitals counts; the capitals alone are what it counts more than the table above."""
    note = (
        "The same answers, with C, Y and O counted as look-alike letters beside c, y and o. Training swaps"
        " capitals only where its `capitals` setting is on."
    )
    alone = []
    for name, stage in stages.items():
        counts = stage.get("capitals") or {}
        both, lower = counts.get("eligible") or 0, stage.get("eligible") or 0
        if both > lower > 0:
            swapped = counts["substituted"] - stage["substituted"]
            alone.append(f"{label(report, name)}: {swapped} of {both - lower}")
    return f"{note} Of the capitals alone were swapped: {'; '.join(alone)}." if alone else note


def _published_rates(report: Report, stages: Mapping[str, Any]) -> list[Row]:
    """Each stage of ours, with the published scores of the same stage below it."""
    ours = {name: stage["published"] for name, stage in stages.items() if stage.get("published")}
    if not ours:
        return []
    theirs = dict(report.get("published") or {})
    rows = []
    for name, summary in ours.items():
        rows.append(_row(label(report, name), summary))
        if name in theirs:
            rows.append(_row(_theirs(name), theirs.pop(name), published=True))
    return rows + [_row(_theirs(name), summary, published=True) for name, summary in theirs.items()]


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
    russian = [source for source in sources if language(source) == "ru"]
    english = [source for source in sources if language(source) == "en"]
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
        # In the columns of ours, so that each published answer stands below the one of the same stage.
        columns = list(ours) if set(theirs) <= set(ours) else list(theirs)
        answers += [
            Answer(_theirs(name), marked(source, theirs[name][source]), published=True)
            if source in theirs.get(name, {})
            else Answer("", [], published=True)
            for name in (columns if theirs else ())
        ]
        sentences.append(Sentence(source, answers))
    return sentences


def _theirs(stage: str) -> str:
    return "Published, before training" if stage == "base" else f"Published {LABELS.get(stage, stage)}"


def _samples(report: Report) -> list[dict[str, Any]]:
    """For each run its first two prompts, answered at a few steps from the first to the last.

    Only where letters were swapped does an answer repeat its prompt, and its letters are marked.
    """
    repeats = not any(report.get(part) for part in ("rewards", "win_rates", "pairs"))
    shown = []
    for name, rows in (report.get("samples") or {}).items():
        prompts = list(dict.fromkeys(row.get("prompt") for row in rows if row.get("prompt")))[:2]
        for prompt in prompts:
            answers = [row for row in rows if row.get("prompt") == prompt and row.get("policy") is not None]
            picked = _spread(answers, SAMPLE_STEPS)
            steps = [
                (row.get("step"), marked(prompt, row["policy"]) if repeats else [(kept(row["policy"]), "")])
                for row in picked
            ]
            shown.append(
                {
                    "label": label(report, name),
                    "prompt": prompt if repeats else readable(prompt),
                    "steps": steps,
                }
            )
    return shown


def _spread(rows: list[Any], count: int) -> list[Any]:
    if len(rows) <= count:
        return rows
    return [rows[round(place * (len(rows) - 1) / (count - 1))] for place in range(count)]
