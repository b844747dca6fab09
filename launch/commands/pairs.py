"""`tandem pairs`: preference pairs made by a builder, in shards and ranks that may be killed at any moment."""

from __future__ import annotations

import contextlib
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
    "best-of-n": Kind(
        "launch.commands.pairs:best_of_n",
        "sample continuations of prompts, score them, and pair the best with the worst",
    ),
    "build": Kind(
        "launch.commands.pairs:build", "make pairs with any builder that a config names by its class_path"
    ),
    "merge": Kind("launch.commands.pairs:merge", "put together what shards have made"),
    "show": Kind(
        "launch.commands.pairs_show:main", "scores, margins, lengths and examples of pairs, as a page"
    ),
}
_BEST_OF_N = "trainer.pairs.best_of_n.BestOfN"


def main(arguments: Sequence[str]) -> int:
    """Run `tandem pairs KIND`; returns the exit status."""
    return dispatch("pairs", KINDS, arguments)


def build_parser(kind: str) -> ArgumentParser:
    """The arguments of `tandem pairs best-of-n` and `tandem pairs build`."""
    from trainer.pairs.best_of_n import BestOfN
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
    if kind == "best-of-n":
        made.add_class_arguments(BestOfN, as_group=False, sub_configs=True)
    else:
        made.add_subclass_arguments(PairBuilder, "builder", required=True)
    return made


def best_of_n(arguments: Sequence[str]) -> int:
    """Run `tandem pairs best-of-n`; returns the exit status."""
    from trainer.pairs.best_of_n import BestOfN

    parser, given, made = _read("best-of-n", arguments)
    settings = _settings(parser, given, "best-of-n")
    return _run(BestOfN(**{name: getattr(made, name) for name in settings["init_args"]}), given, settings)


def build(arguments: Sequence[str]) -> int:
    """Run `tandem pairs build`; returns the exit status."""
    parser, given, made = _read("build", arguments)
    return _run(made.builder, given, _settings(parser, given, "build"))


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
        "class_path": _BEST_OF_N,
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
