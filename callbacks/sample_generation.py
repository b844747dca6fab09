"""Lets the policy and the reference answer fixed prompts while training goes on, for people to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from callbacks.guard import check_guard
from callbacks.logging import log_metrics, log_text
from callbacks.monitor import StepEnds, is_dry_run
from callbacks.records import rewind
from trainer.data.homoglyphs import mark
from trainer.data.tokenize import tokenize_prompt
from trainer.generation import Generation, Sampling, generate
from trainer.schema import UserError

NAME = "samples.jsonl"


class SampleGeneration(Callback):
    """Answers the same prompts before training, every `every_n_steps` optimizer steps, and at the end.

    Policy and reference get the same prompts and the same noise. Exchanged letters are marked. The answers
    go to the loggers as text (`samples/1`, ...), with `samples/length_policy` and
    `samples/length_reference` (mean tokens), and to `samples.jsonl` in the run's folder, one line a prompt
    and step: step, epoch, prompt, policy, policy_marked, policy_finished (it stopped by itself) and the
    same three for the reference. Training draws the same random numbers with and without it. Every rank
    answers, so that sharded weights are gathered by all; rank zero writes.

    Args:
        prompts: the texts to answer.
        every_n_steps: optimizer steps between samples.
        sampling: how tokens are chosen.
        prompt_template: put around each prompt, holding {text}; by default the data's own, if it has one.
        batch_size: prompts answered at once.

    Raises:
        UserError: for settings that cannot work, and a prompt that leaves no room for an answer.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        every_n_steps: int = 100,
        sampling: Sampling = Sampling(),
        prompt_template: str | None = None,
        batch_size: int = 32,
    ) -> None:
        # A single text would be taken for a list of its letters; `setup` refuses the empty list.
        self.prompts = [] if isinstance(prompts, str) else list(prompts)
        self.every_n_steps, self.sampling = every_n_steps, sampling
        self.prompt_template, self.batch_size = prompt_template, batch_size
        self.length_policy: float | None = None
        self.length_reference: float | None = None
        self.sampled_step = -1
        self.steps = StepEnds()
        self._path = Path()
        self._ids: list[list[int]] = []
        # The reference is frozen and its noise is keyed by prompt: one answer holds for the whole run.
        self._reference: list[Generation] | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.prompts or not all(self.prompts):
            raise UserError("SampleGeneration.prompts: give a list of one or more texts, none of them empty")
        if self.every_n_steps < 1:
            raise UserError(
                f"SampleGeneration.every_n_steps: {self.every_n_steps} is not possible; give 1 or more"
            )
        if self.batch_size < 1:
            raise UserError(f"SampleGeneration.batch_size: {self.batch_size} is not possible; give 1 or more")
        if self.prompt_template is not None and "{text}" not in self.prompt_template:
            raise UserError(
                f"SampleGeneration.prompt_template: '{self.prompt_template}' does not hold {{text}}"
            )
        self._path = Path(trainer.default_root_dir) / NAME

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps.start(trainer)
        template = self.prompt_template or getattr(
            getattr(trainer, "datamodule", None), "prompt_template", None
        )
        texts = [template.replace("{text}", text) if template else text for text in self.prompts]
        self._ids = [tokenize_prompt(text, pl_module.tokenizer) for text in texts]  # type: ignore[arg-type]
        if trainer.is_global_zero:
            rewind(self._path, self.sampled_step)
        if not is_dry_run(trainer) and self.sampled_step < 0:
            self._sample(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.steps.ended(trainer) and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_dry_run(trainer) and self.sampled_step < trainer.global_step:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with isolate_rng():
            policy = self._answers(pl_module.policy, pl_module)
            if self._reference is None:
                self._reference = self._reference_answers(pl_module)
        self.sampled_step = trainer.global_step
        self.length_policy = _mean_length(policy)
        values = {"samples/length_policy": self.length_policy}
        if self._reference is not None:
            values["samples/length_reference"] = self.length_reference = _mean_length(self._reference)
        log_metrics(trainer, values)
        if trainer.is_global_zero:
            self._write(trainer, policy)

    def _reference_answers(self, pl_module: L.LightningModule) -> list[Generation] | None:
        reference = getattr(pl_module, "reference", None)
        if reference is None or not reference.present:
            return None
        with reference.applied() as model:
            return self._answers(model, pl_module)

    def _answers(self, model: Any, pl_module: L.LightningModule) -> list[Generation]:
        return generate(
            model,
            pl_module.tokenizer,  # type: ignore[arg-type]
            self._ids,
            self.sampling,
            keys=self.prompts,
            batch_size=self.batch_size,
        )

    def _write(self, trainer: L.Trainer, policy: list[Generation]) -> None:
        records = []
        for index, (prompt, answer) in enumerate(zip(self.prompts, policy, strict=True)):
            record: dict[str, Any] = {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "prompt": prompt,
            }
            record |= _described("policy", prompt, answer)
            if self._reference is not None:
                record |= _described("reference", prompt, self._reference[index])
            records.append(record)
            log_text(trainer, f"samples/{index + 1}", _markdown(record))
        check_guard(trainer)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    @override
    def state_dict(self) -> dict[str, Any]:
        lengths = {"length_policy": self.length_policy, "length_reference": self.length_reference}
        return {"sampled_step": self.sampled_step, **lengths}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sampled_step = int(state_dict["sampled_step"])
        self.length_policy, self.length_reference = (
            state_dict["length_policy"],
            state_dict["length_reference"],
        )


def _mean_length(answers: Sequence[Generation]) -> float:
    return sum(len(answer.ids) for answer in answers) / len(answers)


def _described(who: str, prompt: str, answer: Generation) -> dict[str, Any]:
    return {who: answer.text, f"{who}_marked": mark(prompt, answer.text), f"{who}_finished": answer.finished}


def _markdown(record: dict[str, Any]) -> str:
    """Two lines of a table's worth, readable in TensorBoard and as plain text."""
    lines = [f"prompt: {record['prompt']}", f"policy: {record['policy_marked']}"]
    if "reference" in record:
        lines.append(f"reference: {record['reference_marked']}")
    return "  \n".join(line.replace("\n", " ") for line in lines)
