"""Watches what training is for: rewards of sampled texts, beside their entropy, variety, length and KL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from callbacks.guard import check_guard
from callbacks.logging import log_metrics
from callbacks.monitor import StepEnds, is_dry_run
from callbacks.records import rewind
from trainer.evaluation.reward import evaluate_reward
from trainer.generation import Sampling
from trainer.pairs.prompts import Prompt, PromptSource
from trainer.rewards import Reward
from trainer.schema import UserError

NAME = "reward_evaluations.jsonl"
_CONTINUED = Sampling(max_new_tokens=48, do_sample=True)


class RewardEvaluation(Callback):
    """Continues held-out prompts before training, every `every_n_steps` optimizer steps, and at the end.

    To the loggers: `reward/mean` of the first reward with its 95 % interval `reward/low` and `reward/high`, the mean of
    each further one as `reward/NAME`, `reward/entropy` (nats a token), `reward/kl` (nats a text, from the reference;
    where its weights are there), `reward/distinct_1` to `reward/distinct_3`, `reward/self_similarity` and
    `reward/length` (tokens). To `reward_evaluations.jsonl` in the run's folder: all of `evaluate_reward`'s result, one
    line for each evaluation, with step and epoch. Training draws the same random numbers with and without it. Every
    rank samples and scores a share; rank zero writes.

    Args:
        prompts: the held-out prompts; none of them may make pairs. Without them `fit` leaves the callback out.
        rewards: by name. The first is the one that training is for.
        every_n_steps: optimizer steps between evaluations.
        samples: continuations of each prompt.
        sampling: how tokens are chosen.
        batch_size: continuations sampled at once.
        examples: how many prompts' first continuations a line holds.
        chat: each prompt is a user's turn, put through the chat template.
        system: what stands before it; needs chat.

    Raises:
        UserError: for settings that cannot work, and fewer than two prompts that leave room for a continuation.
    """

    def __init__(
        self,
        prompts: PromptSource | None = None,
        rewards: dict[str, Reward] | None = None,
        every_n_steps: int = 100,
        samples: int = 1,
        sampling: Sampling = _CONTINUED,
        batch_size: int = 64,
        examples: int = 4,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        self.prompts, self.rewards, self.every_n_steps = prompts, rewards or {}, every_n_steps
        self.samples, self.sampling = samples, sampling
        self.batch_size, self.examples = batch_size, examples
        self.chat, self.system = chat, system
        self.evaluated_step = -1
        self.steps = StepEnds()
        self._path = Path()
        self._found: list[Prompt] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.prompts is None:
            raise UserError("RewardEvaluation.prompts: is missing; give a source of held-out prompts")
        if not self.rewards:
            raise UserError("RewardEvaluation.rewards: none is given; name one or more")
        for name, least in (("every_n_steps", 1), ("samples", 1), ("batch_size", 1), ("examples", 0)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"RewardEvaluation.{name}: {value} is not possible; give {least} or more")
        if self.samples > 1 and not self.sampling.do_sample:
            raise UserError(
                f"RewardEvaluation.samples: {self.samples} of each prompt are all the same without"
                " sampling.do_sample: true"
            )
        if self.system is not None and not self.chat:
            raise UserError(
                "RewardEvaluation.system: has no effect without chat: true; set that, or leave it out"
            )
        for taken in {*_log_names({}), "mean", "low", "high"} & set(list(self.rewards)[1:]):
            raise UserError(
                f"RewardEvaluation.rewards: '{taken}' is another figure's name; call it otherwise"
            )
        self._path = Path(trainer.default_root_dir) / NAME

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)
        assert self.prompts is not None
        self._found = self.prompts.load(pl_module.tokenizer).prompts  # type: ignore[arg-type]
        if trainer.is_global_zero:
            rewind(self._path, self.evaluated_step)
        if not is_dry_run(trainer) and self.evaluated_step < 0:
            self._evaluate(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.steps.ended(trainer) and trainer.global_step % self.every_n_steps == 0:
            self._evaluate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_dry_run(trainer) and self.evaluated_step < trainer.global_step:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reference = getattr(pl_module, "reference", None)
        present = reference is not None and reference.present
        with isolate_rng():
            result = evaluate_reward(
                pl_module.policy,  # type: ignore[arg-type]
                pl_module.tokenizer,  # type: ignore[arg-type]
                self._found,
                self.rewards,
                sampling=self.sampling,
                samples=self.samples,
                reference=reference.applied if present else None,  # type: ignore[union-attr]
                batch_size=self.batch_size,
                examples=self.examples,
                chat=self.chat,
                system=self.system,
            )
        self.evaluated_step = trainer.global_step
        log_metrics(trainer, {f"reward/{name}": value for name, value in _logged(result).items()})
        if trainer.is_global_zero:
            self._write(trainer, result)

    def _write(self, trainer: L.Trainer, result: dict[str, Any]) -> None:
        check_guard(trainer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, **result}
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_step": self.evaluated_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.evaluated_step = int(state_dict["evaluated_step"])


def _log_names(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that are not rewards, by the names that they are logged under; those without a value are left out."""
    whole = ("distinct_1", "distinct_2", "distinct_3", "self_similarity")
    return {name: result.get(name) for name in whole} | {
        name: (result.get(name) or {}).get("mean") for name in ("entropy", "kl", "length")
    }


def _logged(result: dict[str, Any]) -> dict[str, float]:
    (_, first), *others = result["rewards"].items()
    values = {"mean": first["mean"], "low": first["interval"][0], "high": first["interval"][1]}
    values |= {name: each["mean"] for name, each in others}
    values |= _log_names(result)
    return {name: value for name, value in values.items() if value is not None}
