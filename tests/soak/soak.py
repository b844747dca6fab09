"""`make soak`: two ranks get SIGTERM or SIGUSR1 at random moments, N times each; none may hang or lose work.

    python -m tests.soak.soak --count 100 --folder runs/soak

Each time a run of two ranks with jittered steps is signalled, on one rank or on all, once or more often; then it is
resumed to its end, where its adapter must have the bytes of the undisturbed run. Results are appended to
`results.jsonl` in the folder; what stands there of the same code is not done again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.soak.ranks import Ranks, warm_up
from trainer.provenance import code_version, sha256_text

HANG_SECONDS = 60.0
STEPS = 12
SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}


@dataclasses.dataclass
class Case:
    """One signalled run. Drawn by its number alone, so that it can be done again."""

    kind: str
    number: int

    def draw(self) -> random.Random:
        return random.Random(f"{self.kind} {self.number}")


class Soak:
    """Does the cases one after the other in `folder`."""

    def __init__(self, folder: Path, strategy: str = "ddp") -> None:
        self.folder, self.strategy, self.results = folder, strategy, folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        warm_up()
        self.code = sha256_text(code_version(), strategy)
        self.config = self._config()
        began = time.monotonic()
        self.bytes = self._undisturbed()
        self.seconds = time.monotonic() - began

    def _config(self) -> Path:
        from tests.launch.helpers import fit_config
        from tests.tiny_models import make

        base = self.folder / "base"
        if not base.exists():
            make("llama", base)
        more = {
            "trainer": {
                "devices": 2,
                "strategy": self.strategy,
                "limit_val_batches": 2,
                "val_check_interval": 5,
                "accumulate_grad_batches": 2,
                "callbacks+": [{"class_path": "tests.soak.jitter.Jitter"}],
            },
            "data": {"init_args": {"batch_size": 4, "source": {"init_args": {"validation_fraction": 0.1}}}},
            "checkpoint": {"save_steps": 4},
        }
        path = self.folder / "more.yaml"
        path.write_text(yaml.safe_dump(more))
        return fit_config(self.folder, base, steps=STEPS)

    def start(self, run: Path) -> Ranks:
        words = ["--config", str(self.config), "--config", str(self.folder / "more.yaml"), "--run", str(run)]
        return Ranks([*words, "--resume", "auto"], self.folder / f"{run.name}.log")

    def _undisturbed(self) -> bytes:
        run = self.folder / "undisturbed"
        shutil.rmtree(run, ignore_errors=True)
        ranks = self.start(run)
        assert ranks.wait(120), "the undisturbed run hangs"
        assert ranks.codes == [0, 0], (self.folder / "undisturbed.log").read_text()[-3000:]
        return adapter(run)

    def do(self, case: Case) -> dict[str, Any]:
        """Do one case; its result, whose `outcome` is `ok` or says what is wrong."""
        draw, run = case.draw(), self.folder / f"{case.kind}-{case.number:03d}"
        shutil.rmtree(run, ignore_errors=True)
        result: dict[str, Any] = {
            **dataclasses.asdict(case),
            "code": self.code,
            "attempts": [],
            "outcome": "ok",
        }
        began = time.monotonic()
        signals = draw.choice((1, 1, 2, 3))
        for attempt in range(signals + 1):
            seen = self._attempt(case, run, draw, disturbed=attempt < signals)
            result["attempts"].append(seen)
            if problem := _problem(seen, SIGNALS[case.kind], attempt < signals):
                result["outcome"] = problem
                break
            if set(seen["codes"]) == {0}:
                break
        if result["outcome"] == "ok":
            result["outcome"] = self._end(run)
        result["seconds"] = round(time.monotonic() - began, 2)
        if result["outcome"] == "ok":
            shutil.rmtree(run)
            run.with_suffix(".log").unlink()
        return result

    def _attempt(self, case: Case, run: Path, draw: random.Random, disturbed: bool) -> dict[str, Any]:
        # The moment is drawn even where the run ends before it.
        moment = draw.uniform(0, self.seconds)
        targets = draw.choice(([0], [1], [0, 1]))
        began, ranks = time.monotonic(), self.start(run)
        if disturbed:
            ranks.listen()
            while time.monotonic() - began < moment and not ranks.poll():
                time.sleep(0.005)
            ranks.send(SIGNALS[case.kind], targets, stagger=0.03)
        in_time = ranks.wait(HANG_SECONDS)
        manifest = run / "manifest.json"
        about = json.loads(manifest.read_text()) if manifest.exists() else {}
        return {
            "moment": round(moment, 3) if disturbed else None,
            "ranks": targets if disturbed else None,
            "codes": ranks.codes,
            "hung": not in_time,
            "step": about.get("step"),
            "status": about.get("status"),
            "seconds": round(time.monotonic() - began, 2),
        }

    def _end(self, run: Path) -> str:
        if json.loads((run / "manifest.json").read_text())["status"] != "finished":
            return "the manifest does not say finished"
        if (run / ".lock").exists():
            return "the lock is left"
        return "ok" if adapter(run) == self.bytes else "other bytes than the undisturbed run"

    def done(self) -> list[dict[str, Any]]:
        """What has been done with the code as it is now."""
        if not self.results.exists():
            return []
        results = [json.loads(line) for line in self.results.read_text().splitlines()]
        return [result for result in results if result["code"] == self.code]

    def all(self, count: int) -> list[dict[str, Any]]:
        """Every case up to `count` of each signal that has no result yet; all results."""
        known = {(result["kind"], result["number"]) for result in self.done()}
        cases = [Case(kind, number) for number in range(count) for kind in SIGNALS]
        for case in cases:
            if (case.kind, case.number) in known:
                continue
            result = self.do(case)
            with open(self.results, "a") as stream:
                stream.write(json.dumps(result) + "\n")
            print(f"{case.kind} {case.number}: {result['outcome']} ({result['seconds']} s)", flush=True)
        return [result for result in self.done() if result["number"] < count]


def adapter(run: Path) -> bytes:
    return (run / "checkpoints" / "last" / "adapter_model.safetensors").read_bytes()


def _problem(seen: dict[str, Any], number: signal.Signals, disturbed: bool) -> str | None:
    """What is wrong with an attempt: all ranks end with 0, or all with the signal's status."""
    codes = set(seen["codes"])
    if seen["hung"]:
        return f"hung for {HANG_SECONDS:.0f} s"
    if codes == {0} or (disturbed and codes == {128 + number} and seen["status"] != "finished"):
        return None
    # After its very end a process no longer listens.
    if disturbed and codes <= {0, -number} and seen["status"] == "finished":
        return None
    return f"ended with {seen['codes']}, manifest {seen['status']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--strategy", default="ddp")
    given = parser.parse_args()
    results = Soak(given.folder, given.strategy).all(given.count)
    told = collections.Counter((result["kind"], result["outcome"]) for result in results)
    for (kind, outcome), times in sorted(told.items()):
        print(f"{kind}: {times} {outcome}")
    return 0 if all(result["outcome"] == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
