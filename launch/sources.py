"""Sources built from YAML files alone, without a whole config: for commands that look at data."""

from __future__ import annotations

from typing import Literal

from launch.building import build
from launch.errors import check_yaml
from trainer.data.sources import TextSource
from trainer.pairs.substitution import Letters
from trainer.schema import UserError


def text_source(path: str) -> TextSource:
    """The text source that a YAML file (`class_path`, `init_args`) describes."""
    content = check_yaml(path)
    if not isinstance(content, dict) or "class_path" not in content:
        raise UserError(f"{path}: describes no text source; it should hold class_path and init_args")
    return build(TextSource, content, path)


def letters_of(
    path: str,
    kind: Literal["demonstration", "preference"],
    stage: Literal["sft", "dpo", "evaluation"],
    shares: dict[str, float] | None = None,
    limit: int | None = None,
) -> Letters:
    """The letters task over a YAML file's texts, in whatever languages they come.

    The file describes a text source; or it is a config of `fit` (a stage's, or `config.yaml` of a run): then
    texts and shares of the stages are those that it trains with, so that its split is the same.
    """
    content = check_yaml(path)
    if not isinstance(content, dict) or "data" not in content:
        texts = text_source(path)
    else:
        trained = _source_of(path)
        texts, shares = trained.texts, shares or trained.stage_shares
    return Letters(texts, kind=kind, stage=stage, russian=None, limit=limit, stage_shares=shares)


def _source_of(config: str) -> Letters:
    from launch.fit import TandemCLI

    source = TandemCLI(["--config", config], "inspect").data_only().source
    if not isinstance(source, Letters):
        raise UserError(f"{config}: data.source is {type(source).__name__}; Letters is needed here")
    return source
