"""`tandem pairs`: preference pairs made by a builder, in shards and ranks that may be killed at any moment."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from launch.commands.parsing import Kind, check_output, command_parser, dispatch, instantiated, parsed
from trainer.schema import UserError

KINDS = {
    "prompts": Kind(
        "launch.commands.pairs_prompts:main", "picture the prompts before anything is generated for them"
    ),
    "best-of-n": Kind(
        "launch.commands.pairs:best_of_n",
        "sample continuations of prompts, score them, and pair the best with the worst",
    ),
    "self-judge": Kind(
        "launch.commands.pairs:self_judge",
        "have a chat model answer instructions and score its own answers, and pair the best with the worst",
    ),
    "build": Kind(
        "launch.commands.pairs:build", "make pairs with any builder that a config names by its class_path"
    ),
    "merge": Kind("launch.commands.pairs:merge", "put together what shards have made"),
    "rescore": Kind(
        "launch.commands.pairs_rescore:main",
        "have another judge score the same answers by a rubric, and compare",
    ),
    "show": Kind(
        "launch.commands.pairs_show:main", "scores, margins, lengths and examples of pairs, as a page"
    ),
}
_BUILDERS = {
    "best-of-n": "trainer.pairs.best_of_n.BestOfN",
    "self-judge": "trainer.pairs.self_judge.SelfJudge",
}
"""Kinds whose builder is settled: its settings stand in the config as they are."""
_WARNING = "warning: "


def main(arguments: Sequence[str]) -> int:
    """Run `tandem pairs KIND`; returns the exit status."""
    return dispatch("pairs", KINDS, arguments)


def build_parser(kind: str) -> ArgumentParser:
    """The arguments of `tandem pairs best-of-n`, `self-judge` and `build`."""
    from trainer.pairs.building import PairBuilder

    made = command_parser(f"pairs {kind}", f"{KINDS[kind].told[0].upper()}{KINDS[kind].told[1:]}.")
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    made.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the pairs.")
    made.add_argument(
        "--shard", type=str, default="1/1", metavar="I/N", help="Every N-th prompt, from the I-th: 3/16."
    )
    made.add_argument("--threads", type=PositiveInt | None, help="CPU threads; 1 is best for tiny models.")
    made.add_argument("--device", type=str | None, help="Of the ranks of torchrun or srun: cpu or cuda.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    if kind in _BUILDERS:
        made.add_class_arguments(_builder(kind), as_group=False, sub_configs=True)
    else:
        made.add_subclass_arguments(PairBuilder, "builder", required=True)
    return made


def best_of_n(arguments: Sequence[str]) -> int:
    """Run `tandem pairs best-of-n`; returns the exit status."""
    return _settled("best-of-n", arguments)


def self_judge(arguments: Sequence[str]) -> int:
    """Run `tandem pairs self-judge`; returns the exit status."""
    return _settled("self-judge", arguments)


def build(arguments: Sequence[str]) -> int:
    """Run `tandem pairs build`; returns the exit status."""
    parser, given, made = _read("build", arguments)
    return _run(made.builder, given, _settings(parser, given, "build"))


def _builder(kind: str) -> Any:
    module, name = _BUILDERS[kind].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _settled(kind: str, arguments: Sequence[str]) -> int:
    """Run a kind whose builder is settled."""
    parser, given, made = _read(kind, arguments)
    settings = _settings(parser, given, kind)
    built = _builder(kind)(**{name: getattr(made, name) for name in settings["init_args"]})
    return _run(built, given, settings)


def _read(kind: str, arguments: Sequence[str]) -> tuple[ArgumentParser, Namespace, Namespace]:
    """The parser, the settings, and the settings with their objects built."""
    from launch.quiet import quiet

    quiet()
    parser = build_parser(kind)
    given = parsed(parser, arguments)
    return parser, given, instantiated(parser, given)


def _settings(parser: ArgumentParser, given: Namespace, kind: str) -> dict[str, Any]:
    """The builder's class path and settings, as `launch.building.build` takes them."""
    plain = json.loads(parser.dump(given, format="json", skip_none=False))
    if kind == "build":
        whole: dict[str, Any] = plain["builder"]
        return whole
    own = ("config", "output", "shard", "threads", "device", "offline")
    return {
        "class_path": _BUILDERS[kind],
        "init_args": {name: value for name, value in plain.items() if name not in own},
    }


def _run(builder: Any, given: Namespace, settings: dict[str, Any]) -> int:
    import torch

    from launch.ending import leave_together
    from launch.models import is_first, join_ranks
    from trainer.pairs.building import Shard
    from trainer.pairs.building import build as built_in

    shard, output = Shard.parse(given.shard), check_output(given.output)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if join_ranks(given.device) is None and given.device is not None:
        raise UserError(
            f"--device {given.device}: has no effect in one process; set generator.device to {given.device}"
        )
    try:
        # DeepSpeed, which PEFT imports where it is installed, logs to stdout: that is for the result alone.
        with contextlib.redirect_stdout(sys.stderr):
            built = built_in(builder, output, shard, progress=True, settings=settings)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"what was made is kept in {output}; the same command goes on") from stop
    speaks = is_first()
    leave_together()
    if speaks:
        if built.manifest is None:
            print(f"{built.new:,} new; {built.missing:,} prompts of other shards are not there yet")
        else:
            _tell(built.manifest, output)
    return 0


def merge(arguments: Sequence[str]) -> int:
    """Run `tandem pairs merge`; returns the exit status."""
    from launch.building import build as built
    from launch.quiet import quiet
    from trainer.pairs.building import ABOUT, PairBuilder, read_about
    from trainer.pairs.building import merge as merged

    parser = command_parser("pairs merge", "Put together what the shards of a folder have made.")
    parser.add_argument("output", type=str, metavar="DIR", help="Folder of the pairs.")
    parser.add_argument("--offline", action="store_true", help="Never ask the network.")
    quiet()
    output = Path(parser.parse_args(list(arguments)).output)
    settings = read_about(output)["settings"]
    if settings is None:
        raise UserError(f"{output}: was begun in Python; call trainer.pairs.building.merge with its builder")
    # The checkout's own kind of builder: nothing is loaded before it is asked for texts.
    builder = built(PairBuilder, settings, str(output / ABOUT))
    _tell(merged(builder, output), output)
    return 0


def _tell(manifest: dict[str, Any], output: Path) -> None:
    """What became of the prompts, and how the scores lie."""
    counts, scores = manifest["counts"], manifest["scores"]
    print(
        f"{counts['kept']:,} pairs of {counts['prompts']:,} prompts, {counts['candidates']:,} texts: {output}"
    )
    dropped = {name.removeprefix("dropped_"): n for name, n in counts.items() if name.startswith("dropped_")}
    if any(dropped.values()):
        print("dropped: " + ", ".join(f"{name} {count:,}" for name, count in dropped.items() if count))
    print(
        f"scores: mean {scores['mean']:.3g} (sd {scores['sd']:.3g}), chosen {scores['chosen_mean']:.3g},"
        f" rejected {scores['rejected_mean']:.3g}"
    )
    if judging := manifest.get("judging"):
        for line in _told(judging):
            print(line)


def _told(judging: dict[str, Any]) -> list[str]:
    """Of self-judged pairs: ties, what could not be read, other languages, and what scores go with."""
    ties, language = judging["ties"], judging["language"]
    lines = [
        f"ties: in {ties['prompts']:,} of {ties['of']:,} prompts all answers have one score ({_percent(ties['share'])})"
    ]
    if unread := judging["unread"]:
        found = ", ".join(f"{why} {count:,}" for why, count in unread.items())
        lines.append(
            f"no score could be read from {sum(unread.values()):,} of {judging['answers']:,} answers: {found}"
        )
    lines.append(
        f"in another language than {language['wanted']}: {_percent(language['share'])} of the"
        f" {language['answers']:,} answers that could be read and have letters"
    )
    if line := mass_line(judging["mass"]):
        lines.append(line)
    length = judging["with_length"]["all"]
    lines.append(f"Spearman of score with length: {'-' if length is None else format(length, '.2f')}")
    for number, each in enumerate(judging["agreement"], start=1):
        rank = each["spearman"]
        lines.append(
            f"scored again ({number}): Spearman {'-' if rank is None else format(rank, '.2f')}, the same mark for"
            f" {_percent(each['same_rounded'])}; {_percent(each['pairs_confirmed'])} of the pairs confirmed,"
            f" {_percent(each['pairs_contradicted'])} contradicted, {_percent(each['pairs_tied'])} tied"
        )
        if (line := mass_line(each["mass"])) and line.startswith(_WARNING):
            lines.append(line)
    return lines


def mass_line(mass: dict[str, Any] | None) -> str | None:
    """How much probability the digits had, and a warning where it is little; None where nothing is known of it."""
    from trainer.pairs.scoring import LOW

    if mass is None:
        return None
    told = (
        f"probability of the digits: {_percent(mass['mean'])} on average, {_percent(mass['min'])} at the least,"
        f" below a half in {_percent(mass['below_half'])} of {mass['questions']:,} questions"
    )
    low = "; the model would mostly not have answered with a digit, so its scores say little"
    return f"{_WARNING}{told}{low}" if mass["mean"] < LOW else told


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
