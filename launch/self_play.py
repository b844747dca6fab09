"""`tandem spin --iterations T`: generate, convert, train and validate, T times, each a process of its own.

Iteration t's opponent is the adapter that iteration t - 1 has trained, on the same base. What is done is skipped, what
was cut off goes on: the steps are a recipe's (see `launch.recipe`). `lineage.json` says what came of what, and `last`
is the newest adapter.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from launch.commands.parsing import command_parser, parsed
from launch.errors import check_yaml
from launch.recipe import locked, run_step, say, state
from launch.self_play_lineage import LAST, LINEAGE, describe, read_lineage, summary, write_lineage
from launch.self_play_steps import Loop
from launch.stages import Step, fingerprint, recorded
from trainer.data.self_play import opponent_of
from trainer.policy.folders import point, resolve
from trainer.policy.load import PolicyConfig, load_tokenizer
from trainer.policy.load import fingerprint as weights_of
from trainer.provenance import read_json, write_json
from trainer.schema import UserError

_STALE = ".stale"
_COST = ("batch_size", "threads", "device", "sharded")
"""Settings of a generation that change no answer."""


def parser() -> ArgumentParser:
    """The arguments of `tandem spin --iterations`."""
    made = command_parser(
        "spin run",
        "Self-play: the opponent answers, real and generated answers become pairs, the main player is trained on them"
        " and is the next opponent. The same command goes on after a kill. Settings with a dot are those of `fit`:"
        " --trainer.max_epochs 1.",
    )
    made.add_argument("--iterations", type=PositiveInt, default=3, help="How many. Default: 3.")
    made.add_argument(
        "--config",
        type=str,
        action="append",
        default=[],
        metavar="FILE",
        help="As for `fit`; may come again.",
    )
    made.add_argument(
        "--generate", type=str | None, metavar="FILE", help="YAML file with settings of `spin generate`."
    )
    made.add_argument(
        "--input_dir", type=str, default="formatted", metavar="DIR", help="Chats, as `reformat` writes them."
    )
    made.add_argument(
        "--output_dir", "--output", type=str, default="runs/spin", metavar="DIR", help="Default: runs/spin."
    )
    made.add_argument(
        "--model", type=str, required=True, help="The first opponent: an SFT model, or an adapter."
    )
    made.add_argument("--base_model", type=str | None, help="The adapter's base. Default: what it names.")
    made.add_argument(
        "--tokenizer", type=str | None, help="Default: the base's; one that differs from it is refused."
    )
    made.add_argument("--revision", type=str | None, help="Branch, tag or commit of a hub model.")
    made.add_argument(
        "--trust_remote_code", action="store_true", help="Run code that comes with a hub model."
    )
    made.add_argument(
        "--shards",
        type=PositiveInt,
        default=1,
        help="Of each generation, one after the other. One that was begun keeps its own number.",
    )
    made.add_argument(
        "--ranks", type=PositiveInt, default=1, help="Processes of each generation, by torchrun."
    )
    made.add_argument(
        "--mixed", type=NonNegativeInt, default=1, help="Earlier iterations whose pairs are trained on, too."
    )
    made.add_argument(
        "--lr", type=float, nargs="+", default=[], help="Of each iteration; the last one goes on."
    )
    made.add_argument("--beta", type=float, nargs="+", default=[], help="Likewise.")
    made.add_argument(
        "--seed", type=int, default=0, help="Iteration t takes seed + t - 1, for all that is random."
    )
    made.add_argument(
        "--stop_confidence",
        type=float | Literal["never"] | None,
        default=0.95,
        help="Stop after an iteration whose reward accuracy on the test chats is not above 1/2 with this confidence:"
        " generated can no longer be told from real. The interval is Wilson's, two-sided."
        " never (or null): go on whatever it is.",
    )
    made.add_argument(
        "--force",
        action="store_true",
        help="Run all steps, also those that are done. After a kill, go on without it.",
    )
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run all iterations; returns 0, or the exit status of the step that failed."""
    own, passed = _parted(arguments)
    given = parsed(parser(), own)
    if not given.config:
        raise UserError("--config: is missing; give what `fit` trains with, such as configs/spin/lora.yaml")
    for name in ("lr", "beta"):
        if len(values := getattr(given, name)) > given.iterations:
            raise UserError(
                f"--{name}: {len(values)} values for {given.iterations} iterations; leave some out"
            )
    if given.stop_confidence == "never":
        given.stop_confidence = None
    if given.stop_confidence is not None and not 0 < given.stop_confidence < 1:
        raise UserError(f"--stop_confidence {given.stop_confidence}: should be above 0 and below 1, or never")
    loop = Loop(given, tuple(passed), _first(given))
    _check_tokenizer(given, loop.first)
    with locked(loop.root):
        return _run(loop)


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's own words, and those of `fit`: settings with a dot in their name, and their values."""
    own: list[str] = []
    passed: list[str] = []
    into = own
    for word in arguments:
        if word.startswith("--"):
            into = passed if "." in word.partition("=")[0] else own
        into.append(word)
    return own, passed


def _first(given: Namespace) -> PolicyConfig:
    """The first opponent: base and adapter, or a base alone."""
    from launch.commands.spin import opponent_config

    asked = {"dtype": "float32", "lora_r": 0, "lora_alpha": None}
    return opponent_config(Namespace(**{**asked, **vars(given)}))


def _check_tokenizer(given: Namespace, first: PolicyConfig) -> None:
    """Refuse a tokenizer that is not the base's: training knows no other."""
    if given.tokenizer is None or given.tokenizer == first.base:
        return
    settings = (first.revision, first.offline, first.trust_remote_code)
    own, base = (load_tokenizer(name, *settings) for name in (given.tokenizer, first.base))
    parts: dict[str, Callable[[Any], Any]] = {
        "chat template": lambda each: each.chat_template,
        "begin and end": lambda each: (each.bos_token, each.eos_token),
        "vocabulary": lambda each: each.get_vocab(),
    }
    for name, part in parts.items():
        if part(own) != part(base):
            raise UserError(
                f"--tokenizer {given.tokenizer}: training takes that of {first.base}, whose {name} is another; put its"
                " files into the base's folder, or leave it out"
            )


def _run(loop: Loop) -> int:
    """All iterations. `last` and the lineage go back only where a later adapter really has to be made again."""
    lineage: list[dict[str, Any]] = []
    known, standing = [_trained(each) for each in read_lineage(loop)], 0

    def settle(ended: str | None = None) -> None:
        nonlocal standing
        if not lineage:  # the first adapter is to be made: nothing that is there follows from it
            for name in (LINEAGE, LAST):
                (loop.root / name).unlink(missing_ok=True)
            return
        if standing != len(lineage) or ended:
            standing = len(lineage)
            write_lineage(loop, lineage, ended)
            point(loop.root / LAST, resolve(loop.folder("train", standing) / "checkpoints" / "last"))

    for iteration in range(1, loop.given.iterations + 1):
        if status := _play(loop, iteration, settle):
            return status
        lineage.append(describe(loop, iteration))
        say(summary(lineage[-1]))
        goes_on = lineage[-1]["told_apart"] and iteration < loop.given.iterations
        if not goes_on:
            break
        if len(known) <= iteration or known[:iteration] != [_trained(each) for each in lineage]:
            settle()
        if _trained(lineage[-1]) == lineage[-1]["opponent"]["digest"]:
            settle()
            raise UserError(
                f"train-{iteration}: has changed no weight, so that iteration {iteration + 1} would have the same"
                f" opponent; raise --lr ({lineage[-1]['lr']:g} now) or --trainer.max_steps, or give fewer --iterations"
            )
    apart = lineage[-1]["told_apart"]
    ended = "all iterations" if apart else "generated can no longer be told from real"
    settle(ended)
    say(f"spin: {ended}, {len(lineage)} of {loop.given.iterations}: {loop.root / LAST}")
    return 0


def _trained(iteration: dict[str, Any]) -> Any:
    return iteration["adapter"]["digest"]


def _play(loop: Loop, iteration: int, settle: Callable[[], None]) -> int:
    """Run an iteration's steps that are not done; returns the exit status of the one that failed, or 0.

    Args:
        settle: called before an adapter is made, which those of later iterations then do not follow from.
    """
    begun, shards = loop.begun(iteration), loop.shards(iteration)
    for number, folders in begun.items():
        if number != shards or loop.given.force:
            for folder in folders:
                _put_aside(loop, folder, f"{folder.parent.name}-{folder.name}")
    if shards != loop.given.shards and not loop.given.force:
        say(
            f"generate-{iteration}: was begun with {shards} shards, and keeps them; --shards {loop.given.shards} is for"
            " those that were not"
        )
    for step in loop.player(iteration):
        if status := _do(step, loop, iteration, before=settle if step.command == ("fit",) else None):
            return status
    check = loop.validation(iteration)
    return _do(check, loop, iteration, kept=check.outputs[0])


def _do(
    step: Step,
    loop: Loop,
    iteration: int,
    kept: Path | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Run a step if it is not done, `before` first; returns its exit status."""
    force = loop.given.force
    reason = state(step, force)
    if reason is None:
        say(f"{step.name}: done before, skipped")
        return 0
    if before is not None:
        before()
    if step.command == ("spin", "generate"):
        _put_stale_aside(step, loop, iteration)
    say(f"{step.name}: {reason}\n  tandem {step.shown}")
    if step.command == ("spin", "generate"):
        write_json(_asked_file(step), _asked(loop))
    ranks = loop.given.ranks if step.name.startswith("generate") else 1
    status, _ = run_step(step, force, loop.given.offline, ranks, kept)
    if status:
        say(f"tandem: {step.name} ended with exit status {status}; go on by the same command")
    return status


def _put_stale_aside(step: Step, loop: Loop, iteration: int) -> None:
    """Answers of another opponent, other settings or chats than now would be refused: they go to `.stale/`.

    An opponent is known by its weights: one that was trained again to the same ones has nothing to answer anew.
    """
    before, settings = recorded(step), step.folder / "settings.json"
    if before is None or not settings.is_file():
        return
    now, start = fingerprint(step), loop.start(iteration)
    differing = {name for name, known in before["hashes"].items() if now.get(name) != known}
    asked = _asked_file(step)
    if asked.is_file() and read_json(asked) == _asked(loop):
        differing.discard(str(loop.given.generate))
    opponent = opponent_of(weights_of(loop.opponent(iteration)))["digest"]
    if not differing - {"code", start} and read_json(settings)["opponent"]["digest"] == opponent:
        return
    _put_aside(loop, step.folder, step.name)


def _asked(loop: Loop) -> dict[str, Any]:
    """The settings of the generation that answers follow from; how many go together, and where, changes none."""
    settings = check_yaml(Path(loop.given.generate)) if loop.given.generate else {}
    return {name: value for name, value in settings.items() if name not in _COST}


def _asked_file(step: Step) -> Path:
    return step.record.with_name(f"{step.name}.asked.json")


def _put_aside(loop: Loop, folder: Path, name: str) -> None:
    """Move answers that are not those asked for now to `.stale/`, beside what lies there."""
    places = (loop.root / _STALE / (f"{name}-{n}" if n else name) for n in itertools.count())
    stale = next(place for place in places if not place.exists())
    stale.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(stale)
    print(f"tandem: answers that are not those asked for now are put aside: {stale}", file=sys.stderr)
