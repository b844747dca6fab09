"""Objects from settings alone, without a whole config."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from launch.errors import describe
from trainer.schema import UserError


def build(kind: type, content: Any, path: str) -> Any:
    """An object of a class path and its settings; a `UserError` names the file and what is wrong."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "made", required=True)
    try:
        settings = parser.parse_object({"made": content})
    except ArgumentError as error:
        raise UserError(f"{path}: {describe(error)}") from error
    return parser.instantiate(settings).made
