"""`tandem data show`: a look at the source texts before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.schema import UserError

if TYPE_CHECKING:
    from trainer.data.sources import Loaded
    from trainer.schema import Split

_LEFT_OUT = 20
_HELP = """\
usage: tandem data show --texts FILE [FILE ...]
       tandem data show --config FILE [--config FILE ...] [settings of fit]

Shows what there is to learn from: counts (kept, dropped and why), lengths, languages, splits, examples, and the first
rows that are left out, with the reason.

  --texts FILE    texts: .txt (one a line), .jsonl, .csv, .parquet, or the .yaml of a text source or a config
  --column NAME   column of the texts, in files that have columns (default text)
  --limit N       the first so many texts
  --config FILE   a config as for `tandem fit`: shows its source's records
"""


def main(arguments: Sequence[str]) -> int:
    """Run `tandem data show`; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help") or "--help" in arguments or "-h" in arguments:
        print(_HELP, end="")
        return 0 if arguments else 2
    if arguments[0] != "show":
        raise UserError(f"data {arguments[0]}: no such command; there is `data show`")
    rest = list(arguments[1:])
    print(_of_texts(rest) if any(word.split("=")[0] == "--texts" for word in rest) else _of_config(rest))
    return 0


def _of_texts(arguments: Sequence[str]) -> str:
    from launch.commands.parsing import command_parser

    parser = command_parser("data show", "Look at texts.")
    parser.add_argument("--texts", type=str, nargs="+", required=True)
    parser.add_argument("--column", type=str, default="text")
    parser.add_argument("--limit", type=int | None)
    parser.add_argument("--offline", action="store_true")
    given = parser.parse_args(list(arguments))
    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit {given.limit}: should be 1 or more")
    return "\n\n".join(_look(name, given.column, given.limit) for name in given.texts)


def _look(name: str, column: str, limit: int | None) -> str:
    from trainer.data.show import render_summary, summarize_records, summarize_source

    if Path(name).suffix in (".yaml", ".yml"):
        from launch.sources import letters_of

        source = letters_of(name, "preference", "dpo", limit=limit)
        return render_summary(summarize_source(source, splits=("train", "validation", "test")))
    from trainer.data.homoglyphs import INSTRUCTION

    part = summarize_records(_pairs(name, column, limit))
    return render_summary({"source": name, "prompt_template": INSTRUCTION, "splits": {"all texts": part}})


def _pairs(name: str, column: str, limit: int | None) -> Loaded:
    """The pairs that the letters task makes of a file's texts, all of them."""
    from launch.commands.evaluate_letters import read_all
    from trainer.data.homoglyphs import INSTRUCTION, substitute
    from trainer.data.sources import Loaded, TextRow, unique_texts
    from trainer.evaluation.letters import language
    from trainer.schema import Preference

    lines, hashes = read_all([name], column, limit)
    rows = [TextRow({language(text): text}, f"{name}, text {i}") for i, text in enumerate(lines, start=1)]
    texts, counts = unique_texts(rows)
    pairs = [
        Preference(INSTRUCTION.replace("{text}", text.text), chosen, text.text, text.key, text.origin)
        for text in texts
        if (chosen := substitute(text.text)) != text.text
    ]
    counts.update(kept=len(pairs), dropped_nothing_to_exchange=len(texts) - len(pairs))
    return Loaded(pairs, dict(counts), hashes)


def _of_config(arguments: Sequence[str]) -> str:
    if not arguments:
        raise UserError("data show: give --texts FILE or --config FILE")
    from launch.fit import TandemCLI
    from launch.quiet import quiet
    from trainer.data.show import render_summary, summarize_source

    quiet()
    source = TandemCLI(arguments, "inspect").data_only().source
    splits: tuple[Split, ...] = ("train", "validation")
    if getattr(source, "test_fraction", None):
        splits += ("test",)
    return "\n".join([render_summary(summarize_source(source, splits=splits)), *_left_out(source)])


def _left_out(source: Any) -> list[str]:
    """The first rows that no split has, and why, where the source can tell; those beyond a limit are no news."""
    if not hasattr(source, "left_out"):
        return []
    first: list[str] = []
    more = 0
    for origin, why in source.left_out("train"):
        if why == "over limit":
            continue
        if len(first) == _LEFT_OUT:
            more += 1
        else:
            # Most reasons name file and row themselves.
            named = why.startswith(origin.rpartition(", ")[0] or origin)
            first.append(f"  {why}" if named else f"  {origin}: {why}")
    told = [*first, f"  and {more:,} more"] if more else first
    return ["", "left out", *told] if told else []
