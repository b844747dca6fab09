"""Says aloud, once, when a run goes wrong in a way that the loss does not show."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.logging import log_metrics
from callbacks.monitor import StepEnds, Window, current
from callbacks.sample_generation import SampleGeneration
from trainer.schema import UserError

CHOSEN = "logps/chosen"


@dataclasses.dataclass
class _Raised:
    """How often an alarm was raised, where first, and whether it stands now."""

    first_step: int
    last_step: int
    times: int
    standing: bool
    message: str


class Alarms(Callback):
    """Warns of falling chosen log-probabilities, drifting answer lengths and steps that are not finite.

    An alarm is one warning, a point of `alarms/<name>` (1 raised, 0 over) in the loggers, and an entry in the
    manifest.
    - `chosen_falling`: the mean of `logps/chosen` (sums over completions, nats) over `every_n_steps` steps
      is more than `chosen_fall` of its size below that of the first such window; `chosen_falling_val` is
      the same from validation to validation. Preference losses are content when both log-probs fall, as
      long as the rejected falls faster; the text falls apart then.
    - `lengths_drifting`: the policy's answers in `SampleGeneration` are, on average, longer or shorter by
      more than `length_drift` than the reference's, or than the policy's first ones where there is no
      reference.
    - `not_finite`: the module refused a step because its loss or gradient was not finite. After
      `max_not_finite` such steps in a row the run ends.

    Args:
        every_n_steps: optimizer steps in a window of train metrics.
        chosen_fall: the share that the chosen log-prob may fall; at least one nat.
        length_drift: the share by which mean answer length (tokens) may change.
        max_not_finite: steps in a row that may be not finite before the run ends.

    Raises:
        UserError: for settings that cannot work, and after `max_not_finite` steps in a row.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        chosen_fall: float = 0.2,
        length_drift: float = 0.5,
        max_not_finite: int = 10,
    ) -> None:
        self.every_n_steps, self.chosen_fall, self.length_drift = every_n_steps, chosen_fall, length_drift
        self.max_not_finite = max_not_finite
        self.raised: dict[str, _Raised] = {}
        self.first: dict[str, float] = {}
        self.skipped, self.in_a_row = 0, 0
        self.window, self.steps = Window(), StepEnds()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for name in ("every_n_steps", "max_not_finite"):
            if getattr(self, name) < 1:
                raise UserError(f"Alarms.{name}: {getattr(self, name)} is not possible; give 1 or more")
        for name in ("chosen_fall", "length_drift"):
            if not getattr(self, name) > 0:
                raise UserError(f"Alarms.{name}: {getattr(self, name)} is not possible; give more than 0")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)
        # The module counts anew in each process.
        self.skipped = getattr(pl_module, "skipped_steps", 0)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.steps.ended(trainer):
            return
        self._watch_finite(trainer, pl_module, batch)
        value = current(f"train/{CHOSEN}", trainer, pl_module)
        if value is not None:
            self.window.add(value)
        if trainer.global_step % self.every_n_steps == 0:
            self._watch_chosen(trainer, f"train/{CHOSEN}", self.window.mean())
            self.window.reset()
            self._watch_lengths(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = current(f"val/{CHOSEN}", trainer, pl_module)
        if value is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._watch_chosen(trainer, f"val/{CHOSEN}", value)

    def _watch_finite(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        skipped = getattr(pl_module, "skipped_steps", 0)
        self.in_a_row = self.in_a_row + 1 if skipped > self.skipped else 0
        self.skipped = skipped
        ids = ", ".join(map(str, getattr(batch, "ids", ())))
        message = f"loss or gradient was not finite, the step changed nothing (last micro-batch: {ids})"
        self._set(trainer, "not_finite", self.in_a_row > 0, message)
        # Counted by what all ranks reduced together: they end together.
        if self.in_a_row >= self.max_not_finite:
            saved = _save(trainer)
            raise UserError(
                f"step {trainer.global_step}: loss or gradient was not finite in {self.in_a_row} steps in a"
                " row; nothing of them reached the weights; lower optimizer.lr or look at their data"
                + (f"; the weights from before them are saved as {saved}" if saved else "")
            )

    def _watch_chosen(self, trainer: L.Trainer, name: str, value: float) -> None:
        if value != value:
            return
        first = self.first.setdefault(name, value)
        floor = first - max(1.0, self.chosen_fall * abs(first))
        message = f"{name} fell from {first:.2f} to {value:.2f} nats; lower optimizer.lr or raise nll_weight"
        alarm = "chosen_falling" if name.startswith("train/") else "chosen_falling_val"
        self._set(trainer, alarm, value < floor, message)

    def _watch_lengths(self, trainer: L.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SampleGeneration) and callback.length_policy is not None:
                length, expected = callback.length_policy, callback.length_reference
                expected = self.first.setdefault("length", length) if expected is None else expected
                drifting = abs(length / max(expected, 1.0) - 1) > self.length_drift
                message = f"sampled answers have {length:.1f} tokens on average, expected {expected:.1f}"
                self._set(trainer, "lengths_drifting", drifting, message)

    def _set(self, trainer: L.Trainer, name: str, wrong: bool, message: str) -> None:
        step, known = trainer.global_step, self.raised.get(name)
        if not wrong:
            if known is not None and known.standing:
                known.standing = False
                log_metrics(trainer, {f"alarms/{name}": 0.0})
            return
        if known is None:
            known = self.raised[name] = _Raised(step, step, 0, False, message)
        if not known.standing:
            known.times += 1
            rank_zero_warn(f"alarm {name} at step {step}: {message}")
            log_metrics(trainer, {f"alarms/{name}": 1.0})
        known.standing, known.last_step, known.message = True, step, message

    def summary(self) -> dict[str, Any]:
        """For the run's manifest."""
        return {name: dataclasses.asdict(raised) for name, raised in self.raised.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "raised": self.summary(),
            "first": dict(self.first),
            "in_a_row": self.in_a_row,
            "window": self.window.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.raised = {name: _Raised(**raised) for name, raised in state_dict["raised"].items()}
        self.first, self.in_a_row = dict(state_dict["first"]), state_dict["in_a_row"]
        self.window.load_state_dict(state_dict["window"])


def _save(trainer: L.Trainer) -> Path | None:
    """Keep the weights from before the steps that were not finite, if the run has a place for checkpoints."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ImprovedLossCheckpoint):
            return callback.save_now(trainer)
    return None
