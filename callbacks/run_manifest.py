"""Writes the run's `manifest.json`: what was trained on what, with what, for how long, and how it ended."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from callbacks.guard import check_guard
from trainer.provenance import code_version, git_revision, read_json, versions, write_json
from trainer.schema import UserError

NAME = "manifest.json"
_INTERRUPTS = (KeyboardInterrupt, SystemExit)


class RunManifest(Callback):
    """Keeps `manifest.json` in the run's folder, from the start of training to its end.

    `status` is `running`, then `finished`, `interrupted` (Ctrl-C, SIGTERM) or `failed` (with the error's
    line); a process that was killed leaves `running`. A resumed run lists the attempts before it under
    `attempts`. The reference is fingerprinted before and after: every rank hashes the tensors it holds,
    rank zero's hash is written. What other callbacks know (`summary()`: best checkpoint, throughput,
    alarms) is under `callbacks`.

    Raises:
        UserError: if the reference moved during training, or is another one than before the resume.
    """

    def __init__(self) -> None:
        self.content: dict[str, Any] = {}
        self.reference: str | None = None
        self.seconds_before = 0.0
        self._resumed: dict[str, Any] | None = None
        self._started = 0.0
        self._path = Path()
        # Until training starts, a manifest that is already there tells more than this attempt could.
        self._trained = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._path, self._started = Path(trainer.default_root_dir) / NAME, time.monotonic()
        if self._path.is_dir():
            raise UserError(
                f"{self._path}: is a folder; the run's manifest is written there, give another run folder"
            )
        self.content = {
            "status": "running",
            "error": None,
            "started": _now(),
            "ended": None,
            **_machine(trainer),
        }

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.content |= {
            "versions": versions(),
            "git": git_revision(),
            "code": code_version(),
            "model": _description(pl_module),
            "data": _description(getattr(trainer, "datamodule", None)),
        }

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained, self.reference = True, _fingerprint(pl_module)
        self._compare_with_resumed(trainer)
        self.content |= {"from_step": trainer.global_step, "attempts": self._attempts()}
        self.content["reference"] = {"before": self.reference, "after": None}
        self._write(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # What the first batch showed of the policy, and how much of the reference is cached by now.
        self.content["model"] = _description(pl_module)
        after = _fingerprint(pl_module)
        self.content["reference"]["after"] = after
        moved = trainer.strategy.reduce_boolean_decision(after != self.reference, all=False)
        if moved:
            raise UserError(
                f"{self._path.parent}: the reference moved during training (SHA-256 {self.reference} before,"
                f" {after} after); its log-probs cannot be trusted, do not use this run"
            )

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, "finished")
        if not self._trained and trainer.is_global_zero:
            self._finish_before(trainer)

    def _finish_before(self, trainer: L.Trainer) -> None:
        """Nothing was left to train: what cut the attempt before this one off came after its last step."""
        before = read_json(self._path)
        if before.get("status") != "finished":
            check_guard(trainer)
            now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "ended": _now()}
            write_json(self._path, before | now | {"status": "finished", "error": None})

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if not self.content:
            return
        status = "interrupted" if isinstance(exception, _INTERRUPTS) else "failed"
        try:
            self._end(trainer, status, f"{type(exception).__name__}: {exception}".strip(": "))
        except (OSError, UserError) as error:
            # The exception that is on its way says more than that its manifest could not be written either.
            reason = getattr(error, "strerror", None) or error
            rank_zero_warn(f"{self._path}: could not be written: {reason}")

    def _end(self, trainer: L.Trainer, status: str, error: str | None = None) -> None:
        line = error.splitlines()[0] if error else None
        self.content |= {"status": status, "error": line, "ended": _now()}
        self.content["callbacks"] = _summaries(trainer)
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        seconds = time.monotonic() - self._started
        self.content |= {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "seconds": round(seconds, 3),
            "seconds_total": round(self.seconds_before + seconds, 3),
        }
        if trainer.is_global_zero and (self._trained or not self._path.exists()):
            check_guard(trainer)
            write_json(self._path, self.content)

    def _attempts(self) -> list[dict[str, Any]]:
        """The attempts that this run resumes, oldest first, as the manifest before this one has them."""
        if self._resumed is None or not self._path.is_file():
            return []
        before = read_json(self._path)
        kept = ("status", "error", "started", "ended", "from_step", "step", "seconds", "hostname", "git")
        return [*before.get("attempts", []), {key: before.get(key) for key in kept}]

    def _compare_with_resumed(self, trainer: L.Trainer) -> None:
        """A rank's shards are others on another number of ranks: then there is nothing to compare."""
        state = self._resumed
        if state is None or state["world_size"] != trainer.world_size:
            return
        # The state is rank zero's; what it finds counts for all, so that they end together.
        if trainer.strategy.broadcast(state["reference"] != self.reference):
            raise UserError(
                f"{self._path.parent}: resumed with another reference (SHA-256 {self.reference}, before it"
                f" was {state['reference']}); give the reference that the run began with"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        seconds = (
            self.seconds_before + time.monotonic() - self._started if self._started else self.seconds_before
        )
        world_size = self.content.get("world_size", 1)
        return {"reference": self.reference, "world_size": world_size, "seconds": seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed, self.seconds_before = state_dict, float(state_dict["seconds"])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _machine(trainer: L.Trainer) -> dict[str, Any]:
    return {
        "hostname": platform.node(),
        "cpus": os.cpu_count(),
        "accelerator": type(trainer.accelerator).__name__,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
        "num_nodes": trainer.num_nodes,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "gradient_clip_val": trainer.gradient_clip_val,
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }


def _description(part: Any) -> dict[str, Any] | None:
    """What a module or datamodule says of itself; modules that are not tandem's need not."""
    describe = getattr(part, "describe", None)
    return describe() if describe is not None else None


def _fingerprint(pl_module: L.LightningModule) -> str | None:
    reference = getattr(pl_module, "reference", None)
    return reference.fingerprint() if reference is not None else None


def _summaries(trainer: L.Trainer) -> dict[str, Any]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [
        (type(callback).__name__, callback.summary())
        for callback in callbacks
        if hasattr(callback, "summary")
    ]
    # Several callbacks of one class (two early stoppings) stand as Name, Name-2, ...
    named: dict[str, Any] = {}
    for name, summary in found:
        same = sum(key == name or key.startswith(name + "-") for key in named)
        named[name if not same else f"{name}-{same + 1}"] = summary
    return named
