"""`tandem spin`: self-play (SPIN). A model learns to prefer real answers to those of its own last iteration.

Each kind works alone; `tandem spin --iterations T` goes through all of them, T times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from launch.commands.parsing import Kind, command_parser, dispatch, parsed
from trainer.schema import UserError

if TYPE_CHECKING:
    from trainer.policy.load import PolicyConfig

KINDS = {
    "reformat": Kind("launch.commands.spin:reformat", "any chats into SPIN's format, `generated` left empty"),
    "generate": Kind("launch.commands.spin:generate", "fill `generated` by the opponent, shard by shard"),
    "convert": Kind("launch.commands.spin:convert", "pairs of all shards, mixed with the last iteration's"),
    "train": Kind("launch.fit:fit", "`tandem fit`: the main player against the opponent"),
    "run": Kind("launch.self_play:main", "all of these, iteration by iteration (--iterations)"),
}


def main(arguments: Sequence[str]) -> int:
    """Run `tandem spin KIND`; settings without a kind are those of `run`. Returns the exit status."""
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments = ["run", *arguments]
    return dispatch("spin", KINDS, arguments)


# --- reformat -----------------------------------------------------------------------------------------------


def reformat_parser() -> ArgumentParser:
    """The arguments of `tandem spin reformat`."""
    made = _parser("reformat", "formatted")
    made.add_argument(
        "--data",
        type=str,
        required=True,
        metavar="PATH",
        help="Chats: a .jsonl, .json, .csv or .parquet file, or a hub dataset (HuggingFaceH4/ultrachat_200k) with"
        " columns messages, real, chosen and rejected, or prompt and completion (response, answer, output).",
    )
    made.add_argument(
        "--split", type=str | None, help="Of the hub dataset, to train on: train_sft. Default: train."
    )
    made.add_argument(
        "--test_data", type=str | None, metavar="PATH", help="Another file or dataset, to test on."
    )
    made.add_argument("--test_split", type=str | None, help="Of the hub dataset, to test on: test_sft.")
    made.add_argument(
        "--test_fraction",
        type=float | None,
        help="Share of the prompts kept for the test where none is named. Default: 0.05; 0: no test.",
    )
    made.add_argument("--limit", type=PositiveInt | None, help="At most so many chats to train on.")
    made.add_argument(
        "--test_limit", type=PositiveInt | None, help="At most so many to test on. Default: as --limit."
    )
    made.add_argument(
        "--broken",
        type=Literal["refuse", "drop"],
        default="refuse",
        help="What to do with rows that are no chat: stop there, or leave them out and list them.",
    )
    made.add_argument("--revision", type=str | None, help="Branch, tag or commit of the hub dataset.")
    return made


def reformat(arguments: Sequence[str]) -> int:
    """Run `tandem spin reformat`; returns the exit status."""
    given = parsed(reformat_parser(), arguments)
    from launch.quiet import quiet
    from trainer.data.self_play import chat_source
    from trainer.pairs.self_play import reformat as reformatted

    quiet()
    output, tests = _folder(given), given.test_fraction != 0
    if given.test_limit is not None and not tests:
        raise UserError(
            f"--test_limit {given.test_limit}: has no effect with --test_fraction 0; leave one of them out"
        )
    source = chat_source(
        given.data,
        given.split,
        validation_path=given.test_data,
        validation_split=given.test_split,
        validation_fraction=given.test_fraction,
        limit=given.limit,
        broken=given.broken,
        empty=given.broken,
        revision=given.revision,
        offline=given.offline,
    )
    testing = (
        None if given.test_limit is None else dataclasses.replace(cast(Any, source), limit=given.test_limit)
    )
    manifest = reformatted(source, output, tests, testing)
    _tell(manifest["counts"], "chats", output)
    if tests and not manifest["counts"]["test"]["kept"]:
        print(
            f"tandem: no chat is left to test on, so that {output} has no test.jsonl; give --test_data, or a higher"
            " --test_fraction",
            file=sys.stderr,
        )
    return 0


# --- generate -----------------------------------------------------------------------------------------------


def generate_parser() -> ArgumentParser:
    """The arguments of `tandem spin generate`."""
    made = _parser("generate", "generated/iter0")
    made.add_argument(
        "--input_dir",
        type=str,
        default="formatted",
        metavar="DIR",
        help="Chats in SPIN's format: train.jsonl, test.jsonl. Default: formatted.",
    )
    model = made.add_argument_group("the opponent: the model of the last iteration")
    model.add_argument(
        "--model",
        type=str | None,
        help="A model's folder or hub id, or an adapter (a run's folder, a checkpoint, a PEFT folder), never merged.",
    )
    model.add_argument(
        "--base_model", type=str | None, help="The adapter's base. Default: the one that it names."
    )
    model.add_argument(
        "--lora_r",
        type=NonNegativeInt,
        default=0,
        help="Need not be given: the adapter says it. 0: not looked at.",
    )
    model.add_argument("--lora_alpha", type=PositiveInt | None, help="Likewise.")
    model.add_argument("--tokenizer", type=str | None, help="Folder or hub id. Default: the base's.")
    model.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help="Of the base.")
    model.add_argument("--device", type=str | None, help="cpu, cuda, ... Default: cuda where there is one.")
    model.add_argument(
        "--sharded", action="store_true", help="Spread the weights over the ranks of torchrun or srun."
    )
    model.add_argument("--revision", type=str | None, help="Branch, tag or commit of a hub model.")
    model.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that comes with a hub model."
    )
    part = made.add_argument_group("which chats")
    part.add_argument("--shard", type=str | None, metavar="I/N", help="Every N-th, from the I-th: 3/16.")
    part.add_argument("--frac_len", type=NonNegativeInt, default=0, help="Chats of a slice. 0: all of them.")
    part.add_argument("--data_frac", type=NonNegativeInt, default=0, help="Number of the slice, from 0.")
    part.add_argument("--limit", type=PositiveInt | None, help="At most so many chats of each split.")
    asked = made.add_argument_group("how it is asked")
    asked.add_argument("--batch_size", type=PositiveInt, default=16, help="Answers generated at once.")
    asked.add_argument("--max_new_tokens", type=PositiveInt, default=256, help="Longest answer.")
    asked.add_argument(
        "--max_prompt",
        type=PositiveInt | None,
        help="Longer prompts, in tokens, get no answer and are counted.",
    )
    asked.add_argument("--do_sample", type=bool, default=True, help="false: the likeliest token each time.")
    asked.add_argument("--temperature", type=float, default=1.0, help="Of sampling; 1 is the model's own.")
    asked.add_argument("--top_k", type=int | None, help="Sample among the k likeliest tokens.")
    asked.add_argument("--top_p", type=float | None, help="Sample among the likeliest of this probability.")
    asked.add_argument("--seed", type=int, default=0, help="Of the sampling noise.")
    asked.add_argument(
        "--plain",
        action="store_true",
        help="Prompt and answer are plain text, one behind the other, for models without a chat template.",
    )
    made.add_argument("--threads", type=PositiveInt | None, help="CPU threads; 1 is best for tiny models.")
    return made


def generate(arguments: Sequence[str]) -> int:
    """Run `tandem spin generate`; returns the exit status."""
    given = parsed(generate_parser(), arguments)
    part, output = _part(given), _folder(given)
    from launch.quiet import quiet

    quiet()
    import torch

    from launch.ending import leave_together
    from launch.following import follow_parent

    if (
        "TORCHELASTIC_RUN_ID" in os.environ
    ):  # killed, torchrun would leave ranks that write what the next ones are to
        follow_parent(grace=0.0)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        # DeepSpeed, which PEFT imports where it is installed, logs to stdout: that is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            manifest = _generate(given, part, output)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"what was made is kept in {output}; the same command goes on") from stop
    leave_together()
    if manifest is not None:
        _tell(manifest["counts"], "answers", output / part.name)
    return 0


def _generate(given: Namespace, part: Any, output: Path) -> dict[str, Any] | None:
    from launch.models import join_ranks, sharded_model
    from trainer.generation import Sampling
    from trainer.pairs.self_play import Opponent, read_chats
    from trainer.pairs.self_play import generate as generated
    from trainer.policy.devices import device_named
    from trainer.policy.load import load_frozen, load_tokenizer

    names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: getattr(given, name) for name in names})
    chats = read_chats(given.input_dir, given.limit)
    config = opponent_config(given)
    tokenizer = load_tokenizer(
        given.tokenizer or config.base, config.revision, config.offline, config.trust_remote_code
    )
    fabric = join_ranks(given.device)

    def load() -> Any:
        if given.sharded:
            return sharded_model(config, fabric)
        return load_frozen(config).to(fabric.device if fabric else device_named(given.device))  # type: ignore[arg-type]

    return generated(
        Opponent(config, tokenizer, given.plain),
        load,
        chats,
        output,
        sampling,
        part,
        given.batch_size,
        given.max_prompt,
        progress=True,
    )


def opponent_config(given: Namespace) -> PolicyConfig:
    """The model that answers: `--model`, an adapter or whole weights.

    Raises:
        UserError: there is none, or `--base_model` or `--lora_...` say something else than the model does.
    """
    from trainer.policy.folders import is_adapter, resolve
    from trainer.policy.load import PolicyConfig, saved_policy

    if given.model is None:
        raise UserError("--model: is missing; give the opponent: a model's folder or hub id, or an adapter")
    settings = {name: getattr(given, name) for name in ("revision", "dtype", "offline", "trust_remote_code")}
    path = Path(given.model).expanduser()
    # A folder may hold an adapter and its base's config beside it.
    whole = (path / "config.json").is_file() and not is_adapter(path)
    folder = resolve(path) if path.exists() and not whole else None
    if folder is not None and (folder.is_file() or is_adapter(folder)):
        config = saved_policy(folder, given.base_model, **settings)
        _check_lora(given, folder)
        return config
    for name in ("base_model", "lora_r", "lora_alpha"):
        if value := getattr(given, name):
            raise UserError(f"--{name} {value}: has no effect, {given.model} is no adapter; leave it out")
    return PolicyConfig(str(folder or given.model), adapter=None, **settings)


def _check_lora(given: Namespace, folder: Path) -> None:
    from trainer.policy.load import kind_of, read_peft_config

    asked = {"lora_r": ("r", given.lora_r or None), "lora_alpha": ("lora_alpha", given.lora_alpha)}
    for option, (name, value) in asked.items():
        if value is None:
            continue
        if folder.is_file() or kind_of(saved := read_peft_config(folder)) != "lora":
            raise UserError(
                f"--{option} {value}: has no effect, {folder} holds no LoRA adapter; leave it out"
            )
        if getattr(saved, name) != value:
            raise UserError(
                f"--{option} {value}: {folder} has {getattr(saved, name)}; give that, or leave it out"
            )


def _part(given: Namespace) -> Any:
    from trainer.pairs.building import Shard
    from trainer.pairs.self_play import Part

    if given.shard is not None and (given.frac_len or given.data_frac):
        raise UserError("--shard and --frac_len are two ways to part the data; give one of them")
    if given.data_frac and not given.frac_len:
        raise UserError(
            f"--data_frac {given.data_frac}: has no effect with frac_len 0, which means all chats"
        )
    if given.frac_len:
        return Part(given.data_frac, None, given.frac_len)
    shard = Shard.parse(given.shard or "1/1")
    return Part(shard.number, shard.of)


# --- convert ------------------------------------------------------------------------------------------------


def convert_parser() -> ArgumentParser:
    """The arguments of `tandem spin convert`."""
    made = _parser("convert", "datasets/iter0")
    made.add_argument(
        "--input_dir",
        type=str,
        default="generated/iter0",
        metavar="DIR",
        help="What `generate` wrote. Default: generated/iter0.",
    )
    made.add_argument("--num_fracs", type=PositiveInt | None, help="Shards. Default: as many as they say.")
    made.add_argument(
        "--previous",
        type=str,
        nargs="+",
        default=[],
        metavar="DIR",
        help="Pairs of earlier iterations to mix in; published: those of the last one.",
    )
    return made


def convert(arguments: Sequence[str]) -> int:
    """Run `tandem spin convert`; returns the exit status."""
    given = parsed(convert_parser(), arguments)
    from launch.quiet import quiet
    from trainer.pairs.self_play_merge import convert as converted

    quiet()
    output = _folder(given)
    manifest = converted(given.input_dir, output, given.num_fracs, given.previous)
    _tell(manifest["counts"], "pairs", output)
    likeness = ", ".join(f"{split} {value:.3f}" for split, value in manifest["similarity"].items())
    print(f"similarity of generated to real: {likeness}")
    return 0


# --- what they share ----------------------------------------------------------------------------------------


def _parser(kind: str, output: str) -> ArgumentParser:
    made = command_parser(f"spin {kind}", f"{KINDS[kind].told[0].upper()}{KINDS[kind].told[1:]}.")
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    made.add_argument(
        "--output_dir", "--output", type=str, default=output, metavar="DIR", help=f"Default: {output}."
    )
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def _folder(given: Namespace) -> Path:
    output = Path(given.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: is a file; give a folder")
    return output


def _tell(counts: dict[str, dict[str, int]], what: str, output: Path) -> None:
    for split, each in counts.items():
        dropped = ", ".join(
            f"{name.removeprefix('dropped_').replace('_', ' ')} {count:,}"
            for name, count in each.items()
            if name.startswith("dropped_") and count
        )
        more = f", {each['previous']:,} of earlier iterations" if each.get("previous") else ""
        print(
            f"{split}: {each['kept']:,} {what}{more}{f'; left out: {dropped}' if dropped else ''}: {output}"
        )
