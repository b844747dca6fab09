"""Runs the measurements, each in a process of its own, and keeps the results in one JSON file that is always whole."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from launch.bench.flops import useful_flops
from launch.bench.machine import machine
from launch.bench.models import with_tokenizer
from launch.bench.plan import Settings, Step, choose, steps
from launch.bench.rows import rows_and_fits
from launch.bench.workloads import Workload, make_workload
from trainer.provenance import code_version, git_revision, read_json, versions, write_json
from trainer.schema import UserError

Told = Callable[[Step, dict[str, Any]], None]


class Bench:
    """All measurements of some settings, written to `output` one by one.

    Raises:
        UserError: `output` is there and is not to be resumed, or holds other settings.
    """

    def __init__(self, settings: Settings, output: Path, command: str, resume: bool = False) -> None:
        self.settings, self.output = settings, output
        asked = json.loads(json.dumps(dataclasses.asdict(settings)))
        self.found: dict[str, Any] = {
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(settings.device),
            "versions": {**versions(), **_version("trl"), "code": code_version(), "revision": git_revision()},
            "settings": asked,
            "workloads": {},
            "chosen": {},
            "rows": [],
            "fits": [],
            "measurements": [],
        }
        if output.exists():
            self._take_up(asked, resume)

    def _take_up(self, asked: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise UserError(f"--output {self.output}: is there already; give --resume, or another file")
        before = read_json(self.output)
        if not isinstance(before, dict) or not {"settings", "measurements", "versions"} <= set(before):
            raise UserError(f"--output {self.output}: holds no results of a bench; give another file")
        for name, value in asked.items():
            if (was := before["settings"].get(name)) != value:
                raise UserError(f"--{name} {value}: {self.output} was begun with {was}; give the same")
        now: dict[str, str] = self.found["versions"]
        if other := [
            name for name in now if name != "revision" and before["versions"].get(name) != now[name]
        ]:
            raise UserError(
                f"--resume: {self.output} was begun with another {', '.join(other)}; measure anew, into another file"
            )
        # What failed is tried again.
        kept = [each for each in before["measurements"] if "result" in each]
        self.found |= {"date": before["date"], "workloads": before["workloads"], "measurements": kept}

    def run(self, told: Told = lambda step, measurement: None) -> dict[str, Any]:
        """Measure what is not there yet; `told` hears of each step. Returns the whole results."""
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
            ready = _Files(self.settings, Path(folder))
            for step in steps(self.settings):
                told(step, self._measure(step, ready))
        return self.found

    def _measure(self, step: Step, ready: _Files) -> dict[str, Any]:
        chosen = self._choose(step.workload, step.dtype) if step.after_sweep else {}
        if step.after_sweep and not chosen:
            return {"error": "no setting of the sweep ran"}
        key = step.key(chosen)
        if (known := next((m for m in self.found["measurements"] if m["key"] == key), None)) is not None:
            self._save(step, chosen)
            return known
        job = step.job(chosen)
        # The machine's rate needs neither model nor pairs.
        workload = None if step.purpose == "rate" else ready.workload(step.workload)
        if workload is not None and workload.name not in self.found["workloads"]:
            self.found["workloads"][workload.name] = ready.describe(workload, step.dtype)
        names = ("purpose", "workload", "dtype", "arm", "repeat")
        measurement = {"key": key, **{name: getattr(step, name) for name in names}, "job": job}
        # How busy the machine was before: a figure that stands apart may have been disturbed.
        measurement["load_average"] = round(os.getloadavg()[0], 2)
        measurement |= self._in_a_process(job, ready.paths(step, workload), workload)
        self.found["measurements"].append(measurement)
        self._save(step, chosen)
        return measurement

    def _choose(self, workload: str, dtype: str) -> dict[str, dict[str, Any]]:
        swept = [
            each
            for each in self.found["measurements"]
            if (each["purpose"], each["workload"], each["dtype"]) == ("sweep", workload, dtype)
        ]
        return choose(swept, max(self.settings.epochs))

    def _save(self, step: Step, chosen: dict[str, dict[str, Any]]) -> None:
        if chosen:
            kept = {name: chosen[name] for name in ("trl_fastest", "trl_leanest")}
            self.found["chosen"][f"{step.workload}/{step.dtype}"] = kept
        self.found["rows"], self.found["fits"] = rows_and_fits(self.found, self.settings)
        write_json(self.output, self.found)

    def _in_a_process(
        self, job: dict[str, Any], paths: dict[str, str], workload: Workload | None
    ) -> dict[str, Any]:
        """{"result": ...}, or {"error": one line}."""
        asked = self.settings
        same = {"lr": asked.lr, "batch_size": asked.batch_size, "device": asked.device}
        found = in_a_process({**same, "threads": asked.threads, **job, **paths})
        if workload is None or "result" not in found or "limit" in job or "digest" not in found["result"]:
            return found
        own, expected = found["result"]["digest"], self.found["workloads"][workload.name]["digest"]
        if own != expected:
            return {"error": f"trains on other token ids ({own[:12]}, not {expected[:12]})"}
        return found


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in its folder `work`: {"result": ...}, or {"error": one line}."""
    folder = Path(job["work"])
    write_json(folder / "job.json", job)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TANDEM_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder),
    }
    # A run takes all cores, whatever the shell was set to.
    environment.pop("OMP_NUM_THREADS", None)
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.bench.arm", str(folder / "job.json")],
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        try:
            status = process.wait()
        finally:
            process.kill()
            process.wait()
    if status == 0:
        return {"result": read_json(folder / "result.json")}
    if status < 0:
        return {"error": f"ended by signal {-status}" + (" (out of memory?)" if status == -9 else "")}
    said = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = said[-1].removeprefix("trainer.schema.UserError: ")[:300] if said else f"exit status {status}"
    return {"error": last}


class _Files:
    """Models and workloads in a folder, made when they are first needed."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._workloads: dict[str, Workload] = {}
        self._models: dict[str, tuple[Path, int]] = {}
        self._count = 0

    def workload(self, name: str) -> Workload:
        if name not in self._workloads:
            asked = self.settings
            vocabulary = asked.shape.config().vocab_size
            place = self.folder / f"workload-{len(self._workloads)}"
            self._workloads[name] = make_workload(name, place, asked.pairs, vocabulary, asked.seed)
        return self._workloads[name]

    def describe(self, workload: Workload, dtype: str) -> dict[str, Any]:
        """What the results say of a workload."""
        lengths = [[len(part) for part in pair] for pair in workload.ids]
        _, weights = self._model(dtype)
        useful = useful_flops(self.settings.shape.config(), weights, lengths) / len(lengths)
        return {**workload.describe(), "layer_weights": weights, "useful_flops_per_pair": useful}

    def paths(self, step: Step, workload: Workload | None) -> dict[str, str]:
        """A fresh folder for one job, with the model and pairs that it needs."""
        work = self._folder()
        paths = {"work": str(work), "dtype": step.dtype}
        if workload is not None:
            model = with_tokenizer(self._model(step.dtype)[0], workload.tokenizer, work / "model")
            paths |= {"model": str(model), "pairs": str(workload.file)}
        return paths

    def _folder(self) -> Path:
        work = self.folder / f"job-{self._count}"
        self._count += 1
        work.mkdir()
        return work

    def _model(self, dtype: str) -> tuple[Path, int]:
        """The model's folder, and the weights of its layers' matrices."""
        if dtype not in self._models:
            place = self.folder / f"model-{dtype}"
            place.mkdir()
            shape = dataclasses.asdict(self.settings.shape)
            job = {"kind": "model", "work": str(self._folder()), "model": str(place), "settings": shape}
            found = in_a_process({**job, "dtype": dtype})
            if "error" in found:
                raise UserError(f"--model: cannot be made ({found['error']})")
            self._models[dtype] = place, found["result"]["layer_weights"]
        return self._models[dtype]


def _version(package: str) -> dict[str, str]:
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}
