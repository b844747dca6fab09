"""`tandem scratch`: small models trained from scratch on given texts, to try a recipe out where no other model is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from launch.commands.parsing import command_parser
from trainer.schema import UserError

KINDS = {
    "parts": "deal texts to files that share none, by their content",
    "generator": "train a language model (GPT-2's architecture) and its tokenizer",
    "classifier": "train a classifier (DistilBERT's architecture) and its tokenizer",
}


def main(arguments: Sequence[str]) -> int:
    """Run `tandem scratch KIND`; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, KINDS))
        print("usage: tandem scratch KIND [...]\n\nkinds:")
        print("\n".join(f"  {name:<{width}}  {told}" for name, told in KINDS.items()))
        print("\n`tandem scratch KIND --help` shows its settings.")
        return 0 if arguments else 2
    kind, *rest = arguments
    if kind not in KINDS:
        raise UserError(f"scratch {kind}: no such kind; there is {', '.join(KINDS)}")
    return _parts(rest) if kind == "parts" else _model(kind, rest)


def parts_parser() -> ArgumentParser:
    """The arguments of `tandem scratch parts`."""
    made = command_parser(
        "scratch parts",
        "Deal the texts of a file to parts, by their content: OUTPUT/NAME.jsonl for each share. A generator, its"
        " reward, a second reward and the prompts then know nothing of each other's texts.",
    )
    made.add_argument(
        "--path", type=str, required=True, metavar="FILE", help="Texts, with or without labels."
    )
    made.add_argument("--column", type=str, default="text", help="The texts' column.")
    made.add_argument("--label", type=str | None, default="label", help="The labels' column, or null.")
    made.add_argument(
        "--shares", type=dict[str, float], required=True, metavar="JSON", help='Such as {"a": 0.7, "b": 0.3}.'
    )
    made.add_argument(
        "--join",
        type=dict[str, list[str]] | None,
        metavar="JSON",
        help='Further files, such as {"texts": ["a", "b"]}.',
    )
    made.add_argument("--limit", type=int | None, help="The first so many rows.")
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the parts.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def _parts(arguments: Sequence[str]) -> int:
    given = parts_parser().parse_args(list(arguments))
    from launch.scratch.texts import Texts, write_parts

    texts = Texts(given.path, given.column, given.label or "", limit=given.limit, offline=given.offline)
    counts = write_parts(texts, given.shares, Path(given.output), given.label is not None, given.join)
    for name, count in counts.items():
        print(f"{name}: {count:,} texts")
    return 0


def model_parser(kind: str) -> ArgumentParser:
    """The arguments of `tandem scratch generator` and `tandem scratch classifier`."""
    from launch.scratch.training import Settings

    made = command_parser(f"scratch {kind}", f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}, from scratch.")
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the model.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    made.add_class_arguments(Settings, as_group=False)
    return made


def _model(kind: str, arguments: Sequence[str]) -> int:
    from launch.errors import check_yaml, config_files, describe, user_error_in
    from launch.quiet import quiet

    for file in config_files(arguments):
        check_yaml(file)
    quiet()
    from jsonargparse import ArgumentError

    from launch.scratch.training import Settings, make_classifier, make_generator

    parser = model_parser(kind)
    try:
        given = parser.instantiate(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise user_error_in(error) or UserError(describe(error, config_files(arguments))) from error
    settings = Settings(
        **{name: getattr(given, name) for name in ("texts", "shape", "learning", "seed", "threads")}
    )
    output = Path(given.output)
    if output.exists() and not (
        output.is_dir() and (not any(output.iterdir()) or (output / "scratch.json").is_file())
    ):
        raise UserError(f"--output {output}: holds something else; give a new folder")
    make = make_generator if kind == "generator" else make_classifier
    figures = make(settings, output)
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    print(f"written to {output}", file=sys.stderr)
    return 0
