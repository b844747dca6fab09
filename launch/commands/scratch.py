"""`tandem scratch`: small models trained from scratch on given texts, to try a recipe out where no other model is."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from launch.commands.parsing import Kind, check_output, command_parser, dispatch, instantiated, parsed
from trainer.schema import UserError

KINDS = {
    "parts": Kind("launch.commands.scratch:parts", "deal texts to files that share none, by their content"),
    "halves": Kind("launch.commands.scratch:halves", "cut lines in two: how the first half goes on"),
    "lessons": Kind(
        "launch.commands.scratch:lessons", "make chats of questions, answers and marks, for small chat models"
    ),
    "generator": Kind(
        "launch.commands.scratch:generator", "train a language model (GPT-2's architecture) and its tokenizer"
    ),
    "chat": Kind(
        "launch.commands.scratch:chat", "train a chat model (GPT-2's architecture) and its tokenizer"
    ),
    "classifier": Kind(
        "launch.commands.scratch:classifier",
        "train a classifier (DistilBERT's architecture) and its tokenizer",
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Run `tandem scratch KIND`; returns the exit status."""
    return dispatch("scratch", KINDS, arguments)


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


def parts(arguments: Sequence[str]) -> int:
    """Run `tandem scratch parts`; returns the exit status."""
    given = parsed(parts_parser(), arguments)
    from launch.scratch.texts import Texts, write_parts

    texts = Texts(given.path, given.column, given.label or "", limit=given.limit, offline=given.offline)
    counts = write_parts(texts, given.shares, check_output(given.output), given.label is not None, given.join)
    for name, count in counts.items():
        print(f"{name}: {count:,} texts")
    return 0


def halves_parser() -> ArgumentParser:
    """The arguments of `tandem scratch halves`."""
    made = command_parser(
        "scratch halves",
        "Cut lines in two by their words: a prompt, and how it really goes on. OUTPUT/train.jsonl, test.jsonl, and"
        " texts.jsonl with train's whole lines.",
    )
    made.add_argument(
        "--path",
        type=str,
        nargs="+",
        required=True,
        metavar="FILE",
        help="Text files, one text a line, or the .yaml of a text source.",
    )
    made.add_argument(
        "--test_fraction", type=float, default=0.2, help="Share of the lines kept for the test."
    )
    made.add_argument("--shortest", type=int, default=4, help="Leave out lines of fewer words.")
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the halves.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def halves(arguments: Sequence[str]) -> int:
    """Run `tandem scratch halves`; returns the exit status."""
    given = parsed(halves_parser(), arguments)
    from launch.scratch.texts import read_lines, write_halves

    output = check_output(given.output)
    for name, count in write_halves(
        read_lines(given.path), output, given.test_fraction, given.shortest
    ).items():
        print(f"{name}: {count:,} lines")
    return 0


def lessons_parser() -> ArgumentParser:
    """The arguments of `tandem scratch lessons`."""
    from launch.scratch.lessons import Lessons

    made = command_parser(
        "scratch lessons",
        "Make instructions, chats of a model that answers them in manners good and bad and gives marks by a rubric, and"
        " chats of a judge that only gives marks.",
    )
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    made.add_class_arguments(Lessons, as_group=False)
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the chats.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def lessons(arguments: Sequence[str]) -> int:
    """Run `tandem scratch lessons`; returns the exit status."""
    given = parsed(lessons_parser(), arguments)
    from launch.scratch.lessons import Lessons, write_lessons

    settings = Lessons(**{each.name: getattr(given, each.name) for each in dataclasses.fields(Lessons)})
    for name, count in write_lessons(settings, check_output(given.output)).items():
        print(f"{name}: {count:,} rows")
    return 0


def model_parser(kind: str) -> ArgumentParser:
    """The arguments of `tandem scratch generator`, `chat` and `classifier`."""
    from launch.scratch.chats import ChatSettings
    from launch.scratch.training import Settings

    told = KINDS[kind].told
    made = command_parser(f"scratch {kind}", f"{told[0].upper()}{told[1:]}, from scratch.")
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the model.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    made.add_class_arguments(ChatSettings if kind == "chat" else Settings, as_group=False)
    return made


def generator(arguments: Sequence[str]) -> int:
    """Run `tandem scratch generator`; returns the exit status."""
    return _model("generator", arguments)


def chat(arguments: Sequence[str]) -> int:
    """Run `tandem scratch chat`; returns the exit status."""
    return _model("chat", arguments)


def classifier(arguments: Sequence[str]) -> int:
    """Run `tandem scratch classifier`; returns the exit status."""
    return _model("classifier", arguments)


def _model(kind: str, arguments: Sequence[str]) -> int:
    from launch.quiet import quiet

    quiet()
    from launch.scratch.chats import ChatSettings, make_chat
    from launch.scratch.training import Settings, make_classifier, make_generator

    parser = model_parser(kind)
    given = instantiated(parser, parsed(parser, arguments))
    kept: Any = ChatSettings if kind == "chat" else Settings
    settings = kept(**{each.name: getattr(given, each.name) for each in dataclasses.fields(kept)})
    output = check_output(given.output)
    if output.exists() and any(output.iterdir()) and not (output / "scratch.json").is_file():
        raise UserError(f"--output {output}: holds something else; give a new folder")
    makers: dict[str, Any] = {"generator": make_generator, "chat": make_chat, "classifier": make_classifier}
    figures = makers[kind](settings, output)
    for name, value in figures.items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value:.4g}")
    print(f"written to {output}", file=sys.stderr)
    return 0
