"""A judge by the name of what it is made of: a .gguf file, the .yaml of a judge, or a transformers model."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch
import yaml

from trainer.judges import Judge
from trainer.judges.llamacpp import LlamaCppJudge
from trainer.judges.scored import TransformersJudge
from trainer.schema import UserError, failure


def judge_named(name: str) -> Judge:
    """The judge: llama.cpp for `FILE.gguf`, the class and settings of `FILE.yaml`, else a model's folder or hub id.

    A transformers model is in bfloat16 on a GPU, and in float32 without one. Raises `UserError` for a YAML file that
    describes no judge.
    """
    if name.lower().endswith(".gguf"):
        return LlamaCppJudge(name)
    if Path(name).suffix in (".yaml", ".yml"):
        return _described(name)
    return TransformersJudge(name, dtype="bfloat16" if torch.cuda.is_available() else "float32")


def _described(path: str) -> Judge:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"judge {path}: cannot be read ({failure(error)}); give the YAML file of a judge"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise UserError(f"judge {path}: describes no judge; it should hold class_path and init_args")
    kind, given = _class(path, content["class_path"]), content.get("init_args") or {}
    if not isinstance(given, dict):
        raise UserError(f"judge {path}: init_args is {given!r}; it should hold settings by their names")
    try:
        inspect.signature(kind).bind(**given)
    except TypeError as error:
        raise UserError(f"judge {path}: init_args: {error}; see `{content['class_path']}`") from error
    try:
        made: Judge = kind(**given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"judge {path}: {content['class_path']} cannot be made ({failure(error)})") from error
    return made


def _class(path: str, name: str) -> Any:
    module, _, last = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), last)
    except Exception as error:  # an import runs a user's code
        raise UserError(f"judge {path}: class_path {name!r} cannot be loaded ({failure(error)})") from error
    if not (inspect.isclass(kind) and issubclass(kind, Judge)):
        raise UserError(f"judge {path}: class_path {name!r} is no trainer.judges.Judge")
    return kind
