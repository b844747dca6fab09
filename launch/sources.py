"""Sources built from YAML files alone, without a whole config: for commands that look at data."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from launch.errors import check_yaml, describe
from trainer.data.sources import TextSource
from trainer.pairs.substitution import Letters
from trainer.schema import UserError


def text_source(path: str) -> TextSource:
    """The text source that a YAML file (`class_path`, `init_args`) describes."""
    content = check_yaml(path)
    if not isinstance(content, dict) or "class_path" not in content:
        raise UserError(f"{path}: describes no text source; it should hold class_path and init_args")
    return build(TextSource, content, path)


def letters_of(texts: TextSource, stage: Literal["sft", "dpo", "evaluation"]) -> Letters:
    """The letters task over these texts, with default settings."""
    return Letters(texts, kind="demonstration", stage=stage)


def build(kind: type, content: Any, path: str) -> Any:
    """An object of a class path and its settings; a `UserError` names the file and what is wrong."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made", required=True)
    try:
        settings = parser.parse_object({"made": content})
    except ArgumentError as error:
        raise UserError(f"{path}: {describe(error)}") from error
    return parser.instantiate(settings).made
