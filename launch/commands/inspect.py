"""`tandem inspect`: every token of one example, where the prompt ends, what is scored, BOS and EOS counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.schema import TokenizedPreference, UserError


def main(arguments: Sequence[str]) -> int:
    """Run `tandem inspect`; its arguments are those of `fit`, and --index, --split."""
    from jsonargparse import ArgumentParser

    own = ArgumentParser(add_help=False, exit_on_error=False)
    own.add_argument("--index", type=int, default=0)
    own.add_argument("--split", choices=["train", "validation"], default="train")
    if any(word in ("-h", "--help") for word in arguments):
        print(_HELP)
        return 0
    mine, rest = _parted(arguments)
    given = own.parse_args(mine)
    example, tokenizer, count = _example(rest, given.index, given.split)
    show(example, tokenizer, f"{given.split} example {given.index} of {count}, id {example.id}")
    return 0


_HELP = """\
usage: tandem inspect --config FILE [--config FILE ...] [--index N] [--split NAME] [settings of fit]

Shows one example as the model will see it: every token, where the prompt ends, what is scored, how often
BOS and EOS come.

  --config FILE   a config as for `tandem fit`; later files override earlier ones
  --index N       which example, from 0 (default 0)
  --split NAME    train (default) or validation
  ...             any setting of `tandem fit`, such as --data.max_length 256
"""


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that are inspect's own, and those of the config."""
    mine: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--index", "--split"):
            mine += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word.startswith(("--index=", "--split=")):
            mine.append(word)
        else:
            rest.append(word)
    return mine, rest


def _example(arguments: Sequence[str], index: int, split: str) -> tuple[Any, Any, int]:
    from launch.fit import TandemCLI
    from launch.models import config_tokenizer
    from launch.quiet import quiet

    quiet()
    cli = TandemCLI(arguments, "inspect")
    data = cli.data_only()
    tokenizer = data.tokenizer = config_tokenizer(cli.config)
    data.setup("fit" if split == "train" else "validate")
    examples = data.examples[split]
    if not -len(examples) <= index < len(examples):
        raise UserError(f"--index {index}: the {split} split has examples 0 to {len(examples) - 1}")
    return examples[index], tokenizer, len(examples)


def show(example: Any, tokenizer: Any, title: str) -> None:
    """Print one table for each completion: a demonstration has one, a pair two."""
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{title}[/bold]", highlight=False)
    pair = isinstance(example, TokenizedPreference)
    parts = ("chosen", "rejected") if pair else ("completion",)
    for part in parts:
        console.print(table(example.prompt, getattr(example, part), part, tokenizer))
        console.print(
            summary(example.prompt, getattr(example, part), tokenizer), highlight=False, soft_wrap=True
        )


def table(prompt: list[int], completion: list[int], part: str, tokenizer: Any) -> Any:
    """A rich table of one sequence: position, id, token, which part it is of, whether it is scored."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=f"prompt + {part}", title_justify="left")
    for name in ("position", "id"):
        made.add_column(name, justify="right")
    for name in ("token", "part", "scored"):
        made.add_column(name)
    for position, token in enumerate([*prompt, *completion]):
        inside = position >= len(prompt)
        style = "green" if inside else "dim"
        words = Text(_shown(token, tokenizer), style=style)
        made.add_row(str(position), str(token), words, part if inside else "prompt", "yes" if inside else "")
        if position == len(prompt) - 1:
            made.add_section()
    return made


def summary(prompt: list[int], completion: list[int], tokenizer: Any) -> str:
    """How long the parts are, and how often BOS and EOS come."""
    whole = [*prompt, *completion]
    counts = ", ".join(
        f"{name} {_times(whole.count(token))}" if token is not None else f"no {name} in this tokenizer"
        for name, token in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id))
    )
    return f"{len(prompt)} prompt tokens, {len(completion)} scored; {counts}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _shown(token: int, tokenizer: Any) -> str:
    """A token as text, blanks and line ends visible; its own name where it is no whole character."""
    name = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids:
        return str(name)
    text = tokenizer.decode([token])
    return str(name) if "\ufffd" in text else repr(text)
