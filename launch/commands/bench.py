"""`tandem bench`: tandem and TRL on the same model, pairs, precision, adapter and batch, interleaved in one run."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from launch.commands.parsing import command_parser
from trainer.schema import UserError

if TYPE_CHECKING:
    from launch.bench.plan import Settings, Step

QUICK: dict[str, Any] = {"layers": 2, "hidden": 32, "intermediate": 64, "heads": 2, "vocab": 500}
QUICK |= {"pairs": 4, "batch_size": 2, "repeats": 1}
"""What --quick sets, together with float32 and two arms: a minute, and figures that mean nothing."""


def parser() -> ArgumentParser:
    """The arguments of `tandem bench`."""
    made = command_parser(
        "bench",
        "Train the same IA³ adapter with DPO by tandem and by TRL, each in a process of its own, in turns: pairs a"
        " second (building caches counted), peak memory, operations counted and as a share of the machine's measured"
        " matrix-product rate. TRL runs with its defaults and with the fastest and the leanest of the settings that are"
        " swept. Everything that is needed is made here; nothing is downloaded.",
    )
    made.add_argument(
        "--output", type=str, default="runs/bench.json", metavar="FILE", help="JSON of the results."
    )
    made.add_argument("--picture", type=str | None, metavar="FILE", help="A picture of them (.png, .svg).")
    made.add_argument(
        "--resume", action="store_true", help="Go on with what --output has; skip what is there."
    )
    made.add_argument(
        "--show", type=str | None, metavar="FILE", help="Measure nothing: show such a JSON again."
    )
    made.add_argument("--quick", action="store_true", help="A toy, in a minute: does it work here?")
    _add_what(made)
    _add_model(made)
    return made


def _add_what(made: ArgumentParser) -> None:
    from launch.bench.plan import Settings

    group, default = made.add_argument_group("what is measured"), Settings()
    group.add_argument(
        "--workloads",
        type=str,
        nargs="+",
        default=list(default.workloads),
        help="hh_like, long_prompts, long_answers (generated), hh_rlhf=FILE (real rows).",
    )
    group.add_argument(
        "--dtypes", type=str, nargs="+", help="bfloat16, float32. Default: both; bfloat16 on a GPU."
    )
    group.add_argument(
        "--arms",
        type=str,
        nargs="+",
        help="tandem, trl_defaults, trl_fastest, trl_leanest (default: these), tandem_concatenated.",
    )
    group.add_argument("--pairs", type=PositiveInt, default=default.pairs, help="In each workload.")
    group.add_argument(
        "--batch_size", type=PositiveInt, default=default.batch_size, help="Pairs in each step."
    )
    group.add_argument(
        "--epochs",
        type=PositiveInt,
        nargs="+",
        default=list(default.epochs),
        help="Figures are taken after these.",
    )
    group.add_argument("--repeats", type=PositiveInt, default=default.repeats, help="Of each arm.")
    group.add_argument(
        "--whole",
        action="store_true",
        help="Sweep TRL's live reference at each batch, too, and run its defaults and its leanest as often and as long"
        " as the others; else twice, and their later epochs are computed.",
    )
    group.add_argument("--token_budget", type=PositiveInt | None, help="tandem's tokens in each forward.")
    group.add_argument("--seed", type=int, default=default.seed, help="Of the generated pairs.")
    group.add_argument("--threads", type=PositiveInt | None, help="CPU threads. Default: all cores.")


def _add_model(made: ArgumentParser) -> None:
    from launch.bench.models import Shape

    group, default = made.add_argument_group("model (a Llama with random weights)"), Shape()
    group.add_argument("--layers", type=PositiveInt, default=default.layers)
    group.add_argument("--hidden", type=PositiveInt, default=default.hidden)
    group.add_argument("--intermediate", type=PositiveInt, default=default.intermediate)
    group.add_argument("--heads", type=PositiveInt, default=default.heads)
    group.add_argument("--vocab", type=PositiveInt, default=default.vocabulary)
    group.add_argument("--shape", type=str | None, help="A published shape instead, such as llama-2-7b.")
    group.add_argument("--model", type=str | None, metavar="DIR", help="Weights of this folder instead.")


def main(arguments: Sequence[str]) -> int:
    """Run `tandem bench`; 1 where an arm could not be measured."""
    given = parser().parse_args(list(arguments))
    if given.picture is not None and Path(given.picture).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture {given.picture}: should end with .png, .svg or .pdf")
    if given.show is not None:
        from trainer.provenance import read_json

        return _present(read_json(given.show), given)
    settings = _settings(given)
    if settings.trl and importlib.util.find_spec("trl") is None:
        raise UserError("--arms: TRL is not installed; pip install 'tandem[bench]', or give --arms tandem")
    from launch.bench.run import Bench

    command = shlex.join(["tandem", "bench", *arguments])
    bench = Bench(settings, Path(given.output), command, given.resume)
    try:
        found = _measure(bench, settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was measured is in {given.output}; --resume goes on") from None
    print(f"written to {given.output}", file=sys.stderr)
    return _present(found, given)


def _settings(given: Namespace) -> Settings:
    import torch

    from launch.bench.models import Shape
    from launch.bench.plan import DTYPES, Settings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {**vars(given), **(QUICK if given.quick else {})}
    if given.shape is not None and given.model is not None:
        raise UserError(f"--shape {given.shape}: has no effect beside --model; give one")
    names = ("layers", "hidden", "intermediate", "heads", "shape")
    shape = Shape(**{name: values[name] for name in names}, vocabulary=values["vocab"], folder=given.model)
    default = Settings()
    usual = ("float32",) if given.quick else ("bfloat16",) if device == "cuda" else DTYPES
    return Settings(
        workloads=tuple(given.workloads),
        dtypes=tuple(given.dtypes or usual),
        arms=tuple(given.arms or (("tandem", "trl_fastest") if given.quick else default.arms)),
        shape=shape,
        pairs=values["pairs"],
        batch_size=values["batch_size"],
        epochs=tuple(given.epochs),
        repeats=values["repeats"],
        whole=given.whole,
        seed=given.seed,
        token_budget=given.token_budget,
        threads=given.threads,
        device=device,
    )


def _measure(bench: Any, settings: Settings) -> dict[str, Any]:
    """Run, with a bar that knows the time left, and a line for each measurement."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from launch.bench.plan import steps

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Measurements take minutes each: the speed is that of all of them.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=1e9) as progress:
        task = progress.add_task("measuring", total=sum(step.weight for step in steps(settings)))

        def told(step: Step, measurement: dict[str, Any]) -> None:
            progress.update(task, advance=step.weight)
            progress.console.print(_line(step, measurement))

        return bench.run(told)


def _line(step: Step, measurement: dict[str, Any]) -> str:
    from launch.bench.show import GIGA, told

    words = f"{step.purpose} {step.workload}, {step.dtype}, {step.arm}"
    if step.purpose in ("run", "rate"):
        words += f", {step.repeat + 1}"
    if step.purpose == "sweep":
        words += f", {told(measurement.get('job', {}).get('settings', {}))}"
    result = measurement.get("result")
    if result is None:
        return f"{words}: failed: {measurement['error']}"
    if "flops_per_second" in result:
        return f"{words}: {result['flops_per_second'] / GIGA:,.0f} GFLOP/s"
    memory = f"{result['peak_memory_bytes'] / GIGA:.2f} GB"
    if "epoch_seconds" not in result:
        return f"{words}: {memory}"
    return f"{words}: {result['epoch_seconds'][-1]:.1f} s, {memory}"


def _present(found: dict[str, Any], given: Namespace) -> int:
    from launch.bench.picture import draw
    from launch.bench.show import show

    if not found.get("rows"):
        raise UserError(f"--show {given.show or given.output}: holds no rows of a bench yet")
    show(found)
    if given.picture is not None:
        draw(found, Path(given.picture))
        print(f"picture: {given.picture}", file=sys.stderr)
    # A setting of the sweep may fail; then it is not chosen.
    failed = [each for each in found["measurements"] if "error" in each and each["purpose"] != "sweep"]
    return 1 if failed else 0
