"""`tandem spin --iterations T`: generate, convert, train and validate, T times, each a process of its own.

Iteration t's opponent is the adapter that iteration t - 1 has trained, on the same base. What is done is skipped, what
was cut off goes on: the steps are a recipe's (see `launch.recipe`). `lineage.json` says what came of what, and `last`
is the newest adapter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from scipy import stats

from launch.commands.parsing import command_parser, parsed
from launch.recipe import locked, run_step, say, state
from launch.stages import Step, fingerprint, recorded
from trainer.data.self_play import opponent_of
from trainer.policy.folders import is_adapter, point, resolve
from trainer.policy.load import PolicyConfig, saved_policy
from trainer.policy.load import fingerprint as weights_of
from trainer.provenance import read_json, write_json
from trainer.schema import UserError

LINEAGE, LAST = "lineage.json", "last"
_STALE = ".stale"
_EXAMPLES = 4


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
    made.add_argument("--tokenizer", type=str | None, help="Of the generation. Default: the base's.")
    made.add_argument(
        "--shards", type=PositiveInt, default=1, help="Of each generation, one after the other."
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
        type=float | None,
        default=0.95,
        help="Stop after an iteration whose reward accuracy on the test chats is not above 1/2 with this confidence:"
        " generated can no longer be told from real. null: never.",
    )
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


@dataclasses.dataclass(frozen=True)
class Loop:
    """What all iterations share. `passed`: words for `fit`."""

    given: Namespace
    passed: tuple[str, ...]
    first: PolicyConfig

    @property
    def root(self) -> Path:
        return Path(self.given.output_dir)

    def folder(self, kind: str, iteration: int) -> Path:
        return self.root / f"{kind}-{iteration}"

    def start(self, iteration: int) -> str | None:
        """The opponent's adapter (or all its weights); None for the bare base."""
        if iteration == 1:
            return self.first.start
        return str(self.folder("train", iteration - 1) / "checkpoints" / "last")

    def opponent(self, iteration: int) -> PolicyConfig:
        start = self.start(iteration)
        if iteration == 1 or start is None:
            return self.first
        return saved_policy(start, self.first.base, offline=self.given.offline)

    # The steps of an iteration

    def generations(self, iteration: int) -> list[Step]:
        start, given = self.start(iteration), self.given
        words = ["spin", "generate", *(["--config", given.generate] if given.generate else [])]
        words += ["--input_dir", given.input_dir, "--output_dir", str(self.folder("generate", iteration))]
        words += ["--model", start or self.first.base]
        if start is not None and _names_adapter(start):
            words += ["--base_model", self.first.base]
        words += ["--tokenizer", given.tokenizer or self.first.base]
        words += ["--seed", str(given.seed + iteration - 1)]
        inputs = [given.input_dir, start or self.first.base, *([given.generate] if given.generate else [])]
        steps = []
        for number in range(1, given.shards + 1):
            name = f"generate-{iteration}" + (f"-{number}" if given.shards > 1 else "")
            shard = self.folder("generate", iteration) / f"shard-{number}-of-{given.shards}"
            steps.append(
                self._step(
                    name, shard, [*words, "--shard", f"{number}/{given.shards}"], inputs, "manifest.json"
                )
            )
        return steps

    def conversion(self, iteration: int) -> Step:
        folder, source = self.folder("convert", iteration), self.folder("generate", iteration)
        words = ["spin", "convert", "--input_dir", str(source), "--output_dir", str(folder)]
        before = range(max(1, iteration - self.given.mixed), iteration)
        previous = [str(self.folder("convert", each)) for each in before]
        words += ["--previous", *previous] if previous else []
        return self._step(f"convert-{iteration}", folder, words, [str(source), *previous], "manifest.json")

    def training(self, iteration: int) -> Step:
        folder = self.folder("train", iteration)
        words = ["fit", *self._settings(iteration), "--run", str(folder)]
        return self._step(f"train-{iteration}", folder, words, self._inputs(iteration), "checkpoints/last")

    def validation(self, iteration: int) -> Step:
        """Of all test chats; what it prints is kept in its folder."""
        folder, train = self.folder("validate", iteration), self.folder("train", iteration)
        weights = str(train / "checkpoints" / "last")
        words = ["validate", *self._settings(iteration), "--run", str(folder), "--weights", weights]
        words += ["--trainer.limit_val_batches", "1.0"]
        return self._step(
            f"validate-{iteration}", folder, words, [*self._inputs(iteration), weights], "metrics.json"
        )

    def _settings(self, iteration: int) -> list[str]:
        """The words of a config for `fit`; what is passed comes last and has its way."""
        given, seed = self.given, str(self.given.seed + iteration - 1)
        words = [word for file in given.config for word in ("--config", file)]
        words += ["--model.policy.base", self.first.base]
        if (start := self.start(iteration)) is not None:
            words += ["--model.policy.start", start]
        words += ["--data.source.path", str(self.folder("convert", iteration))]
        words += ["--seed_everything", seed, "--data.seed", seed]
        for name, values in (("model.optimizer.lr", given.lr), ("model.objective.beta", given.beta)):
            words += [f"--{name}", str(values[min(iteration, len(values)) - 1])] if values else []
        return [*words, *self.passed]

    def _inputs(self, iteration: int) -> list[str]:
        start = self.start(iteration)
        return [self.first.base, str(self.folder("convert", iteration)), *([start] if start else [])]

    def _step(self, name: str, folder: Path, words: list[str], inputs: list[str], output: str) -> Step:
        configs = self.given.config if words[0] in ("fit", "validate") else []
        return Step(
            stage=name,
            name=name,
            root=self.root,
            folder=folder,
            command=tuple(words[: 2 if words[0] == "spin" else 1]),
            words=tuple(words),
            configs=tuple(map(Path, configs)),
            inputs=tuple(inputs),
            values=(),
            outputs=(folder / output,),
        )


def _names_adapter(start: str) -> bool:
    path = resolve(start)
    return path.is_file() or is_adapter(path)


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
    if given.stop_confidence is not None and not 0 < given.stop_confidence < 1:
        raise UserError(f"--stop_confidence {given.stop_confidence}: should be above 0 and below 1, or null")
    loop = Loop(given, tuple(passed), _first(given))
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

    asked = {
        "revision": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "lora_r": 0,
        "lora_alpha": None,
    }
    return opponent_config(Namespace(**{**asked, **vars(given)}))


def _run(loop: Loop) -> int:
    lineage: list[dict[str, Any]] = []
    for iteration in range(1, loop.given.iterations + 1):
        steps = [*loop.generations(iteration), loop.conversion(iteration), loop.training(iteration)]
        for step in steps:
            if status := _do(step, loop, iteration):
                return status
        check = loop.validation(iteration)
        if status := _do(check, loop, iteration, kept=check.outputs[0]):
            return status
        lineage.append(_told(loop, iteration))
        _write(loop, lineage, None)
        point(loop.root / LAST, resolve(loop.folder("train", iteration) / "checkpoints" / "last"))
        say(_line(lineage[-1]))
        if not lineage[-1]["told_apart"]:
            break
    apart = lineage[-1]["told_apart"]
    ended = "all iterations" if apart else "generated can no longer be told from real"
    _write(loop, lineage, ended)
    say(f"spin: {ended}, {len(lineage)} of {loop.given.iterations}: {loop.root / LAST}")
    return 0


def _do(step: Step, loop: Loop, iteration: int, kept: Path | None = None) -> int:
    """Run a step if it is not done; returns its exit status."""
    reason = state(step, force=False)
    if reason is None:
        say(f"{step.name}: done before, skipped")
        return 0
    if step.command == ("spin", "generate"):
        _put_stale_aside(step, loop, iteration)
    say(f"{step.name}: {reason}\n  tandem {step.shown}")
    ranks = loop.given.ranks if step.name.startswith("generate") else 1
    status, _ = run_step(step, offline=loop.given.offline, ranks=ranks, kept=kept)
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
    opponent = opponent_of(weights_of(loop.opponent(iteration)))["digest"]
    if not differing - {"code", start} and read_json(settings)["opponent"]["digest"] == opponent:
        return
    stale = step.root / _STALE / step.name
    shutil.rmtree(stale, ignore_errors=True)
    stale.parent.mkdir(parents=True, exist_ok=True)
    step.folder.rename(stale)
    print(f"tandem: answers of another opponent or other settings are put aside: {stale}", file=sys.stderr)


# --- lineage ------------------------------------------------------------------------------------------------


def _write(loop: Loop, lineage: list[dict[str, Any]], ended: str | None) -> None:
    content = {"kind": "spin_lineage", "base": loop.first.base, "iterations": lineage, "ended": ended}
    write_json(loop.root / LINEAGE, content)


def _told(loop: Loop, iteration: int) -> dict[str, Any]:
    """What an iteration was made of, and what came of it."""
    run = read_json(loop.folder("train", iteration) / "manifest.json")
    pairs = read_json(loop.folder("convert", iteration) / "manifest.json")
    metrics = read_json(loop.folder("validate", iteration) / "metrics.json")
    metrics = {name.removeprefix("val/"): value for name, value in metrics.items()}
    trained = saved_policy(
        loop.folder("train", iteration) / "checkpoints" / "last", loop.first.base, offline=loop.given.offline
    )
    number = run["data"]["counts"].get("validation", {}).get("kept", 0)
    interval = _interval(metrics.get("rewards/accuracies"), number, loop.given.stop_confidence)
    return {
        "iteration": iteration,
        "opponent": {**pairs["opponent"], "start": loop.start(iteration), "base_model": loop.first.base},
        "shards": pairs["shards"],
        "pairs": {
            "folder": str(loop.folder("convert", iteration)),
            **{name: pairs[name] for name in ("counts", "similarity", "files", "previous")},
        },
        "template": pairs["template"],
        "seeds": {"generate": pairs["sampling"]["seed"], "train": int(run["seed"])},
        "lr": run["model"]["optimizer"]["lr"],
        "beta": run["model"]["objective"]["beta"],
        "steps": run["step"],
        "adapter": {"path": trained.start, **opponent_of(weights_of(trained))},
        "validation": {"pairs": number, **metrics},
        "accuracy_interval": interval,
        "told_apart": interval is None or interval[0] > 0.5,
        "examples": _examples(loop.folder("convert", iteration)),
    }


def _examples(pairs: Path) -> list[dict[str, str]]:
    """The first test pairs (or, without a test, training pairs): the same prompts in each iteration."""
    file = next(path for name in ("test", "train") if (path := pairs / f"{name}.jsonl").is_file())
    found = []
    with open(file, encoding="utf-8") as stream:
        for line in itertools.islice(stream, _EXAMPLES):
            row = json.loads(line)
            said = {name: row[name][-1]["content"] for name in ("real", "generated")}
            found.append({"prompt": row["real"][-2]["content"], **said})
    return found


def _interval(accuracy: float | None, pairs: int, confidence: float | None) -> list[float] | None:
    """Wilson's interval of the reward accuracy; None where nothing is to be decided by it.

    Raises `UserError` where nothing was validated.
    """
    if confidence is None:
        return None
    if accuracy is None or not pairs:
        raise UserError(
            "--stop_confidence: there are no test chats to tell by; keep some (`tandem spin reformat --test_fraction"
            " 0.05`), or give --stop_confidence null"
        )
    found = stats.binomtest(round(accuracy * pairs), pairs).proportion_ci(confidence, method="wilson")
    return [float(found.low), float(found.high)]


def _line(told: dict[str, Any]) -> str:
    """An iteration in a line."""
    metrics, interval = told["validation"], told["accuracy_interval"]
    within = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    likeness = json.dumps({split: round(value, 3) for split, value in told["pairs"]["similarity"].items()})
    return (
        f"iteration {told['iteration']}: reward accuracy {metrics.get('rewards/accuracies', float('nan')):.3f}{within},"
        f" margin {metrics.get('rewards/margins', float('nan')):.4g}, log-likelihood of real answers"
        f" {metrics.get('logps/chosen', float('nan')):.2f}, similarity {likeness}"
    )
