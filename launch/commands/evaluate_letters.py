"""`tandem evaluate letters`: how well a model exchanges look-alike letters on given texts."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from launch.commands.parsing import add_model, command_parser
from trainer.schema import UserError


def parser() -> ArgumentParser:
    """The arguments of `tandem evaluate letters`."""
    made = command_parser(
        "evaluate letters",
        "Let a model answer each text greedily and score it: how many of the letters that have a twin were"
        " exchanged (substitution rate), how many other characters were kept (keep rate), with intervals.",
    )
    add_model(made)
    made.add_argument(
        "--texts",
        type=str,
        nargs="+",
        required=True,
        metavar="FILE",
        help="Texts: .txt (one a line), .jsonl, .json, .csv, .parquet; or the .yaml of a text source or of a"
        " config of `fit` (a run's config.yaml), of which the evaluation split is taken.",
    )
    made.add_argument(
        "--column", type=str, default="text", help="Column of the texts, in files that have columns."
    )
    made.add_argument(
        "--stage_shares",
        type=dict[str, float] | None,
        metavar="JSON",
        help="Split of a .yaml's texts, as the stages were trained with. Default: the config's own, or ours.",
    )
    made.add_argument("--output", type=str, required=True, metavar="FILE", help="JSON file for the result.")
    made.add_argument("--limit", type=int | None, help="Take the first so many texts of each file.")
    made.add_argument("--cut", type=int | None, help="Keep the first so many characters of each text.")
    made.add_argument("--capitals", action="store_true", help="Count capitals as exchangeable too.")
    made.add_argument(
        "--instruction", type=str | None, help="Prompt, with {text}. Default: the adapter's, or ours."
    )
    made.add_argument(
        "--overlong",
        type=Literal["refuse", "drop"],
        default="refuse",
        help="What to do with texts for which the model has no positions; `drop` counts them.",
    )
    made.add_argument(
        "--full", action="store_true", help="Also the published sentences, whole lines, and capitals."
    )
    made.add_argument("--label", type=str, default="", help="Name in the report.")
    made.add_argument("--batch_size", type=int, default=64, help="Prompts answered at once.")
    made.add_argument(
        "--max_new_tokens", type=int | None, help="Longest answer. Default: enough for each text."
    )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem evaluate letters`; returns the exit status."""
    return letters(parser().parse_args(list(arguments)))


def letters(given: Namespace) -> int:
    """Evaluate and write the result; rates go to stdout, one line each."""
    from launch.ending import leave_together
    from launch.models import answering, is_first
    from trainer.data.homoglyphs import INSTRUCTION
    from trainer.evaluation.letters import evaluate_in_full, evaluate_letters
    from trainer.provenance import versions, write_json

    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit {given.limit}: should be 1 or more")
    if Path(given.output).is_dir():
        raise UserError(
            f"--output {given.output}: is a folder; give a file such as {given.output}/evaluation.json"
        )
    if given.stage_shares and not all(map(_is_yaml, given.texts)):
        raise UserError("--stage_shares: parts the texts of .yaml files only; leave it out")
    texts, files = read_all(given.texts, given.column, given.limit, given.stage_shares)
    ready = answering(given)
    settings: dict[str, Any] = {
        "instruction": given.instruction or ready.prompt_template or INSTRUCTION,
        "capitals": given.capitals,
        "cut": given.cut,
        "batch_size": given.batch_size,
        "max_new_tokens": given.max_new_tokens,
        "overlong": given.overlong,
        "progress": is_first(),
    }
    if given.full:
        result = evaluate_in_full(ready.model, ready.tokenizer, texts, label=given.label, **settings)
    else:
        result = evaluate_letters(ready.model, ready.tokenizer, texts, **settings) | {"label": given.label}
    speaks = is_first()
    leave_together()
    if not speaks:
        return 0
    result |= {"model": ready.description, "texts": files, "versions": versions()}
    write_json(given.output, result)
    for line in lines(result):
        print(line)
    print(f"written to {given.output}", file=sys.stderr)
    return 0


def lines(result: dict[str, Any]) -> list[str]:
    """The rates as people read them."""
    told = []
    for name, words in (("substitution", "substituted"), ("keep", "kept")):
        rate, interval = result[f"{name}_rate"], result[f"{name}_interval"]
        if rate is None:
            told.append(f"{words}: nothing to count")
        else:
            told.append(f"{words}: {rate:.1%} ({interval[0]:.1%} to {interval[1]:.1%})")
    return [*told, f"sentences: {result['sentences']}"]


def _is_yaml(name: str) -> bool:
    return Path(name).suffix.lower() in (".yaml", ".yml")


def read_all(
    names: Sequence[str], column: str, limit: int | None, shares: dict[str, float] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The texts of all files, `limit` of each, and file -> SHA-256 (or what stands for it)."""
    from trainer.data.sources import read_rows
    from trainer.evaluation.letters import read_texts
    from trainer.provenance import sha256_file

    texts: list[str] = []
    hashes: dict[str, str] = {}
    for name in names:
        suffix = Path(name).suffix.lower()
        if _is_yaml(name):
            found, more = held_out(name, shares)
            texts += found[:limit]
            hashes |= more
        elif suffix in (".txt", ""):
            texts += read_texts(name, limit)
            hashes[name] = sha256_file(name)
        else:
            table = read_rows(name, columns=[column], offline=True)
            found = [str(row[column]).strip() for _, row in table if row[column] is not None]
            texts += [text for text in found if text][:limit]
            hashes |= table.hashes
    if not texts:
        raise UserError(f"--texts {' '.join(names)}: no text in it")
    return texts, hashes


def held_out(name: str, shares: dict[str, float] | None = None) -> tuple[list[str], dict[str, str]]:
    """The evaluation texts of a YAML's texts: those that no stage with these shares ever trains on."""
    from launch.sources import letters_of

    source = letters_of(name, "demonstration", "evaluation", shares)
    texts, _ = source.select("test")
    return [text.text for text in texts], source.load("test").hashes
