"""How well a model exchanges the look-alike letters: rates by aligning source and output.

`substitution_rate`: of the source's swappable letters (lower case unless `capitals`), how many came out as
their twin. `keep_rate`: of all its other characters (spaces and marks too), how many came out as they were.
Both count over the source, so that a lost letter counts against the model; what the output adds is `added`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from peft import PeftModel
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.data.homoglyphs import INSTRUCTION, SWAP, SWAP_CAPITALS, align, language
from trainer.data.tokenize import tokenize_prompt
from trainer.evaluation.intervals import ratio_interval
from trainer.evaluation.published_letters import PUBLISHED
from trainer.generation import Sampling, generate
from trainer.schema import UserError

Overlong = Literal["refuse", "drop"]


@dataclasses.dataclass(frozen=True)
class LetterCounts:
    """Counts of one sentence: swappable letters and how many were exchanged, others and how many were kept.

    `added` are output characters that stand for none of the source.
    """

    eligible: int
    substituted: int
    others: int
    kept: int
    added: int = 0


def score(source: str, output: str, capitals: bool = False) -> LetterCounts:
    """Count what became of each character of `source`, by Levenshtein alignment with twins taken as equal."""
    swap = SWAP_CAPITALS if capitals else SWAP
    eligible = substituted = others = kept = added = 0
    for before, after in align(source, output):
        if before is None:
            added += 1
        elif before in swap:
            eligible += 1
            substituted += after == swap[before]
        else:
            others += 1
            kept += after == before
    return LetterCounts(eligible, substituted, others, kept, added)


def summarize(pairs: Sequence[tuple[str, str]], capitals: bool = False) -> dict[str, Any]:
    """Rates over (source, output) pairs, with 95 % intervals, counts, and the same for each language.

    A rate is a ratio of sums over all sentences; it and its interval are None where there is nothing to
    count.
    """
    counts = [score(source, output, capitals) for source, output in pairs]
    languages = [language(source) for source, _ in pairs]
    summary = _rates(counts)
    summary["languages"] = {
        name: _rates([count for count, tongue in zip(counts, languages, strict=True) if tongue == name])
        for name in sorted(set(languages))
    }
    return summary


def evaluate_letters(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str = INSTRUCTION,
    capitals: bool = False,
    cut: int | None = None,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    overlong: Overlong = "refuse",
    progress: bool = False,
) -> dict[str, Any]:
    """Let the model answer each text greedily and score it: rates, intervals, counts, and all `examples`.

    `cut` keeps the first characters of each text. Without `max_new_tokens` an answer may be twice as long as
    the longest text, and 16 tokens more. A text for which prompt and equally long answer exceed the model's
    positions is refused (`UserError` that names it) or dropped and counted in `dropped_overlong`.
    """
    sources = _cut(texts, cut)
    if "{text}" not in instruction:
        raise UserError(
            f"instruction: {instruction!r} has no place for the text; write {{text}} where it belongs"
        )
    prompts = [tokenize_prompt(instruction.replace("{text}", source), tokenizer) for source in sources]
    lengths = [len(tokenizer.encode(source, add_special_tokens=False)) for source in sources]
    fits = _fitting(model, prompts, lengths, overlong)
    if not fits:
        raise UserError(f"texts: none of the {len(sources)} fits the model's positions; cut them (--cut 48)")
    limit = max_new_tokens or 2 * max(lengths[index] for index in fits) + 16
    answers = generate(
        model,
        tokenizer,
        [prompts[index] for index in fits],
        Sampling(max_new_tokens=limit),
        keys=[f"text {index + 1}" for index in fits],
        batch_size=batch_size,
        progress=progress,
    )
    pairs = [(sources[index], answer.text) for index, answer in zip(fits, answers, strict=True)]
    return summarize(pairs, capitals) | {
        "finished": sum(answer.finished for answer in answers),
        "dropped_overlong": len(sources) - len(fits),
        "settings": {
            "instruction": instruction,
            "capitals": capitals,
            "cut": cut,
            "max_new_tokens": limit,
            "decoding": "greedy",
        },
        "examples": [{"source": source, "output": output} for source, output in pairs],
    }


def evaluate_in_full(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    label: str = "",
    instruction: str = INSTRUCTION,
    cut: int | None = None,
    capitals: bool = False,
    batch_size: int = 64,
    max_new_tokens: int | None = None,
    overlong: Overlong = "refuse",
    progress: bool = False,
) -> dict[str, Any]:
    """`evaluate_letters`, and beside it the five published sentences, whole lines, and capitals.

    `overlong` is for the texts themselves; `published` and `whole_lines` have the same keys again, and always
    drop and count what the model has no positions for (`whole_lines` is None where there was no cut).
    `capitals` scores the same outputs with capitals and lower case both counted as swappable.
    """
    settings: dict[str, Any] = {
        "instruction": instruction,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    settings |= {"capitals": capitals, "progress": progress}
    result = evaluate_letters(model, tokenizer, texts, cut=cut, overlong=overlong, **settings)
    sentences = [row.source for row in PUBLISHED]
    result["label"] = label
    result["published"] = evaluate_letters(model, tokenizer, sentences, overlong="drop", **settings)
    result["whole_lines"] = None
    if cut is not None:
        result["whole_lines"] = evaluate_letters(model, tokenizer, texts, overlong="drop", **settings)
    result["capitals"] = summarize(
        [(row["source"], row["output"]) for row in result["examples"]], capitals=True
    )
    return result


def published_scores() -> dict[str, dict[str, Any]]:
    """The published answers by this module's own scorer: `base`, `sft`, `dpo` -> summary and `examples`."""
    scores = {}
    for stage in ("base", "sft", "dpo"):
        pairs = [(row.source, getattr(row, stage)) for row in PUBLISHED]
        examples = [{"source": source, "output": output} for source, output in pairs]
        scores[stage] = summarize(pairs) | {"examples": examples}
    return scores


def read_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones; the first `limit` of them.

    Raises `UserError` that names the file (and line) if it is missing, not UTF-8, or has no text.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: no such file; give a text file with one text on each line") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from error
    # Not splitlines(): it also breaks at U+2028 and the like, which are characters of a text here.
    texts = [line.strip() for line in content.split("\n") if line.strip()]
    if not texts:
        raise UserError(f"{path}: it has no text; give a file with one text on each line")
    return texts[:limit]


def interval(hits: Sequence[int], totals: Sequence[int]) -> list[float] | None:
    """95 % interval of sum(hits) / sum(totals): percentile bootstrap over sentences, the same at each call.

    Where resampling shows no spread (one sentence, or all alike) it is Wilson's score interval over the
    letters. None where there is nothing to count.
    """
    rows = [(hit, total) for hit, total in zip(hits, totals, strict=True) if total]
    if not rows:
        return None
    hit, total = (np.array(column) for column in zip(*rows, strict=True))
    if len(rows) > 1 and not np.allclose(hit / total, hit[0] / total[0]):
        low, high = ratio_interval(hit, total)
        if low < high:
            return [low, high]
    wilson = stats.binomtest(int(hit.sum()), int(total.sum())).proportion_ci(method="wilson")
    return [float(wilson.low), float(wilson.high)]


def _rates(counts: Sequence[LetterCounts]) -> dict[str, Any]:
    columns = {
        field.name: [getattr(count, field.name) for count in counts]
        for field in dataclasses.fields(LetterCounts)
    }
    sums = {name: sum(column) for name, column in columns.items()}
    return {
        "substitution_rate": sums["substituted"] / sums["eligible"] if sums["eligible"] else None,
        "substitution_interval": interval(columns["substituted"], columns["eligible"]),
        "keep_rate": sums["kept"] / sums["others"] if sums["others"] else None,
        "keep_interval": interval(columns["kept"], columns["others"]),
        "sentences": len(counts),
        **sums,
    }


def _cut(texts: Sequence[str], cut: int | None) -> list[str]:
    if cut is not None and cut < 1:
        raise UserError(f"cut: {cut} is not possible; give 1 or more characters, or leave it out")
    sources = [text[:cut].strip() for text in texts]
    if not sources or not all(sources):
        raise UserError(
            "texts: there are none, or one of them is empty; give at least one character for each"
        )
    return sources


def _fitting(
    model: PreTrainedModel | PeftModel, prompts: list[list[int]], lengths: list[int], overlong: Overlong
) -> list[int]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needs = [len(prompt) + length + 1 for prompt, length in zip(prompts, lengths, strict=True)]
    fits = [index for index, need in enumerate(needs) if positions is None or need <= positions]
    if overlong == "refuse" and len(fits) < len(needs):
        first = min(set(range(len(needs))) - set(fits))
        raise UserError(
            f"text {first + 1}: {lengths[first]} tokens; with its prompt and an equally long answer it needs"
            f" {needs[first]} positions and the model has {positions}; cut the texts (--cut 48), or leave out"
            " and count such as this one (--overlong drop)"
        )
    return fits
