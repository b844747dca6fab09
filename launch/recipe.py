"""`tandem run RECIPE`: a recipe's stages, each a process of its own; those that are done are skipped.

A recipe is a YAML file:

    name: letters                   # its runs lie in runs/<name>
    title: Letters                  # for the report
    names:                          # what `--set name=value` replaces; ./ and ../ are relative to this file
      base: ../models/tiny_letters
    stages:
      - name: sft                   # its folder is runs/<name>/sft, and is called {sft}
        command: fit                # any tandem command
        config: [sft.yaml]          # for `fit`: relative to this file
        arguments:                  # --model.policy.base {base}; no value: a flag; a list: several words
          model.policy.base: "{base}"
        inputs: ["{base}"]          # files and folders whose content counts, besides those named above
        outputs: ["{folder}/checkpoints/best"]
        repeat: 3                   # sft-1, sft-2, sft-3; {iteration}; {previous}: the folder before
        previous: "{base}"          # what {previous} is in the first one
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jsonargparse import ArgumentParser

from launch.commands.parsing import command_parser
from launch.following import RUNNER
from launch.runs import status
from launch.stages import (
    Recipe,
    Step,
    changed,
    content_hash,
    fingerprint,
    load_recipe,
    missing,
    plan,
    record,
    record_recipe,
    recorded,
)
from trainer.provenance import write_text
from trainer.report.runs import duration
from trainer.schema import UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which stages to run, and whether also those that are done."""

    only: tuple[str, ...] = ()
    first: str | None = None
    force: bool = False

    def pick(self, steps: Sequence[Step]) -> list[Step]:
        """The chosen steps; an unknown name is a `UserError` that lists them. A repeated stage means all."""
        for name in (*self.only, *([self.first] if self.first else [])):
            if not any(step.called(name) for step in steps):
                known = ", ".join(dict.fromkeys(step.name for step in steps))
                raise UserError(f"no stage `{name}` in this recipe; its stages are {known}")
        start = next((i for i, step in enumerate(steps) if self.first and step.called(self.first)), 0)
        return [step for step in steps[start:] if not self.only or any(map(step.called, self.only))]


def parser() -> ArgumentParser:
    """The arguments of `tandem run`."""
    made = command_parser(
        "run",
        "Run the stages of a recipe that are not done yet. A stage is done as long as its settings, its"
        " inputs' content and the code are what they were.",
    )
    made.add_argument("recipe", type=str, help="The recipe's YAML file.")
    made.add_argument(
        "--set", type=str, action="append", default=[], metavar="NAME=VALUE", help="Replace a name."
    )
    made.add_argument(
        "--output", type=str | None, help="Folder for the runs. Default: runs/<name of the recipe>."
    )
    made.add_argument(
        "--only", type=str, nargs="+", default=[], metavar="STAGE", help="Run these stages only."
    )
    made.add_argument("--from", type=str | None, dest="first", metavar="STAGE", help="Start at this stage.")
    made.add_argument("--force", action="store_true", help="Run the chosen stages also if they are done.")
    made.add_argument("--dry_run", action="store_true", help="Say what would run, and run nothing.")
    made.add_argument("--offline", action="store_true", help="Never ask the network.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run a recipe; returns 0, or the exit status of the stage that failed."""
    given = parser().parse_args(list(arguments))
    recipe = load_recipe(Path(given.recipe))
    steps = plan(recipe, _settings(given.set), Path(given.output) if given.output else None)
    chosen = Choice(tuple(given.only), given.first, given.force).pick(steps)
    if given.dry_run:
        for step in chosen:
            print(f"{step.name}: {state(step, given.force) or 'done'}\n  tandem {step.shown}")
        return 0
    with locked(steps[0].root):
        typed = shlex.join(["tandem", "run", *arguments])
        record_recipe(recipe, steps[0].root, [typed, *(f"tandem {step.shown}" for step in steps)])
        return _run_all(recipe, steps, chosen, given.force, given.offline)


def _settings(words: Sequence[str]) -> dict[str, str]:
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UserError(f"--set {word}: should be NAME=VALUE")
        settings[name] = value
    return settings


def _run_all(
    recipe: Recipe, steps: Sequence[Step], chosen: Sequence[Step], force: bool, offline: bool
) -> int:
    seconds: dict[str, float] = {}
    skipped = []
    for number, step in enumerate(chosen, start=1):
        reason = state(step, force)
        if reason is None:
            skipped.append(step.name)
            say(f"[{number}/{len(chosen)}] {step.name}: done before, skipped")
            continue
        say(f"[{number}/{len(chosen)}] {step.name}: {reason}\n  tandem {step.shown}")
        exit_status, seconds[step.name] = run_step(step, force, offline)
        if exit_status:
            say(f"tandem: stage {step.name} ended with exit status {exit_status}; go on by the same command")
            return exit_status
    for line in ending(recipe, chosen, seconds, skipped):
        say(line)
    return 0


def state(step: Step, force: bool) -> str | None:
    """Why the step has to run, or None if it is done."""
    if force:
        return "forced"
    before = recorded(step)
    if before is None:
        return "not done yet"
    if before["status"] != "finished":
        return f"{before['status']} last time"
    if absent := [path for path in step.outputs if not path.exists()]:
        return f"{absent[0]} is missing"
    if step.command[0] == "fit" and (told := status(step.folder)) != "finished":
        return f"its manifest says {told}"
    differs = changed(before["hashes"], fingerprint(step))
    return f"runs again, since {differs} changed" if differs else None


def run_step(
    step: Step, force: bool = False, offline: bool = False, ranks: int = 1, kept: Path | None = None
) -> tuple[int, float]:
    """Run one step in a process of its own; returns its exit status and its wall time in seconds.

    Args:
        ranks: above 1, so many processes on this machine, by torchrun.
        kept: file for what it prints on stdout; written when it has ended well.
    """
    if absent := missing(step):
        raise UserError(
            f"stage {step.name}: its input {absent} is missing; run the stage that makes it first"
        )
    hashes, before = fingerprint(step), recorded(step)
    several = (
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    )
    command = [sys.executable, "-m", *several, "launch", *step.words]
    resumed, replaces = not force and resumes(step, before, hashes), manifest_hash(step)
    if resumed and before is not None:
        replaces = before.get("replaces")
    if step.command[0] == "fit":
        command += ["--resume", "auto"] if resumed else ["--overwrite"]
    if force and step.command in (("spin",), ("spin", "run")):
        command.append("--force")  # its own steps are done as well
    if offline:
        command.append("--offline")
    record(step, "running", hashes, replaces)
    began = time.monotonic()
    exit_status, printed = _process(command, kept is not None)
    if kept is not None and exit_status == 0:
        write_text(kept, printed)
    seconds = time.monotonic() - began
    absent_outputs = [path for path in step.outputs if not path.exists()]
    done = exit_status == 0 and not absent_outputs
    record(
        step,
        "finished" if done else "interrupted" if exit_status in (130, 138, 143) else "failed",
        hashes,
        replaces,
        seconds,
    )
    if exit_status == 0 and absent_outputs:
        raise UserError(f"stage {step.name}: ended without an error, but {absent_outputs[0]} is not there")
    return exit_status, seconds


def resumes(step: Step, before: Mapping[str, Any] | None, hashes: Mapping[str, str]) -> bool:
    """Whether a fit goes on where it was interrupted: nothing that it depends on has changed since.

    What lies in its folder has to be of that attempt. One that ended before its first batch left the run
    that it was to replace, whose manifest's hash it wrote down.
    """
    if before is None or before["status"] == "finished" or changed(before["hashes"], hashes):
        return False
    return manifest_hash(step) != before.get("replaces")


def manifest_hash(step: Step) -> str | None:
    """Which run lies in the step's folder."""
    path = step.folder / "manifest.json"
    return content_hash(path) if path.is_file() else None


def _process(command: list[str], captured: bool = False) -> tuple[int, str]:
    """Run a command; Ctrl-C, SIGTERM and SIGUSR1 reach it.

    Its exit status comes back (128 + n for signal n), and if `captured` what it printed on stdout.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE if captured else None,
        text=True,
        env={**os.environ, RUNNER: str(os.getpid())},
    )
    printed = ""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    for number in before:
        signal.signal(number, pass_on)
    try:
        while True:
            try:
                printed += process.communicate()[0] or ""
                returned = process.returncode
                return (returned if returned >= 0 else 128 - returned), printed
            except KeyboardInterrupt:
                # The terminal sent it to the stage too: let it save and end by itself.
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(
    recipe: Recipe, steps: Sequence[Step], seconds: dict[str, float], skipped: Sequence[str]
) -> list[str]:
    """The last lines: how long each stage took, and where the report lies."""
    each = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    done = f"; done before: {', '.join(skipped)}" if skipped else ""
    whole = f"{duration(sum(seconds.values()))}{f' ({each})' if each else ''}"
    # Written for pages: a terminal has no use for spaces that do not break.
    lines = [f"\n{recipe.name}: finished in {whole}{done}".replace("\u00a0", " ")]
    reports = [path for step in steps if step.command[0] == "report" for path in step.outputs]
    return lines + [f"report: {path}" for path in reports if path.suffix == ".html"]


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep a second `tandem run` out of the same folder; the lock goes with the process, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{root}: another `tandem run` is at work here; wait for it, or give --output"
            ) from error
        yield


def say(line: str) -> None:
    print(line, flush=True)
