"""The LightningModules: a policy, its frozen reference, and a training step that reads like the paper.

An optimizer step may be several micro-batches on several ranks. Each micro-batch comes with its share of the step, so
`training_step` returns one loss whose accumulated, reduced gradient is exactly the mean over the step; Lightning's
automatic optimization does the rest. At the step's boundary one small collective carries the metrics' sums and counts
and whether everything was finite; a step that is not finite never reaches the weights.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from trainer.checkpoint import recount_forwards, rng_state, set_rng_state
from trainer.metrics import PREFERENCE_METRICS, SUPERVISED_METRICS, Means
from trainer.objectives import ObjectiveConfig, accuracies, preference_loss, rewards
from trainer.optimization import OptimizerConfig, ScheduleConfig, build_optimizer, build_schedule
from trainer.policy.load import (
    PolicyConfig,
    describe_for_checkpoint,
    fingerprint,
    load_policy,
    load_tokenizer,
)
from trainer.policy.logprobs import completion_token_logps, pair_logps
from trainer.policy.packed_rows import PackedRows
from trainer.policy.reference import Reference, ReferenceConfig, build_reference
from trainer.policy.reference_hooks import ReferenceHooks
from trainer.policy.sharded import drop_gradients, gradient_norm_share
from trainer.policy.state import count_parameters, load_trained_state, trained_state
from trainer.schema import PairLogps, PreferenceBatch, SupervisedBatch, UserError

Sums = dict[str, tuple[Tensor | float | int, Tensor | float | int]]
REQUESTS = {"stop": int(signal.SIGTERM), "requeue": int(signal.SIGUSR1)}
"""What a rank may ask of all at a step's boundary, with the signal that asks it."""

log = logging.getLogger(__name__)


class AlignmentModule(L.LightningModule):
    """What SFT and preference training share: the policy, the optimizer, step metrics, checkpoints of what is trained.

    Attributes:
        policy: the model that is trained; there from `configure_model` on.
        step_metrics: the last optimizer step's metrics without their `train/` prefix, on every rank.
        packed_rows: batches in a layout that the policy can take.
        skipped_steps: steps whose loss or gradient was not finite, and which therefore changed nothing.
        requests: what this rank asks of all: `stop` or `requeue`, each 0 or a signal's number. Handlers write it.
        agreed: the same as of the last optimizer step: not 0 where any rank had asked. Equal on every rank.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        metrics: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.policy_config, self.optimizer_config, self.schedule_config = policy, optimizer, schedule
        if optimizer.weight_decay and policy.adapter is not None and policy.adapter.kind == "ia3":
            raise UserError(
                "optimizer.weight_decay: would pull IA³ scales to 0, not to 1; leave it at 0 for ia3"
            )
        # A checkpoint holds what is trained and nothing else; the frozen weights are read from their own folder.
        self.strict_loading = False
        self.policy: nn.Module | None = None
        self.tokenizer = load_tokenizer(
            policy.base, policy.revision, policy.offline, policy.trust_remote_code
        )
        self.step_metrics: dict[str, float] = {}
        self.skipped_steps = 0
        self.requests = dict.fromkeys(REQUESTS, 0)
        self.agreed = dict.fromkeys(REQUESTS, 0)
        self.packed_rows = PackedRows(policy.base, cast(int, self.tokenizer.pad_token_id))
        self._taken: list[tuple[Tensor, Any]] = []
        self._resumed_rng: dict[str, Any] | None = None
        self._step, self._validation = Means(metrics), Means(metrics)

    @override
    def configure_model(self) -> None:
        if self.policy is None:
            self.policy = load_policy(self.policy_config)

    @override
    def on_fit_start(self) -> None:
        self._check_precision()
        self._check_positions()

    @override
    def on_train_start(self) -> None:
        # Lightning 2.6 resumes a checkpoint of an epoch's last step in the next epoch without counting that it began.
        # A checkpoint of that epoch would then pass for one of a finished epoch, and lose the loader's position.
        loop = self.trainer.fit_loop
        now: Any = loop.epoch_progress.current
        if loop.restarted_mid_epoch and now.ready == now.processed:
            loop.epoch_progress.increment_ready()
            loop.epoch_progress.increment_started()

    @override
    def on_validation_start(self) -> None:
        self._check_positions()

    def _check_precision(self) -> None:
        kinds = {p.dtype for p in self.parameters() if p.requires_grad}
        rounded = self.policy_config.adapter is not None and kinds != {torch.float32}
        if rounded or self.trainer.precision != "32-true":
            raise UserError(
                f"trainer.precision: {self.trainer.precision} is not supported, it rounds updates away; set it to"
                " 32-true, and policy.dtype: bfloat16 for the base"
            )

    def _check_positions(self) -> None:
        positions = getattr(self.policy.config, "max_position_embeddings", None)  # type: ignore[union-attr]
        longest = getattr(getattr(self.trainer, "datamodule", None), "longest", 0)
        if positions is not None and longest > positions:
            raise UserError(
                f"data.max_length: the longest example has {longest} tokens and {self.policy_config.base} has"
                f" {positions} positions; set max_length: {positions} and overlong: truncate or drop"
            )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = build_optimizer(self.optimizer_config, parameters)
        schedule = build_schedule(self.schedule_config, optimizer, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        """Optimizer steps of the whole run, -1 without end.

        Not `trainer.estimated_stepping_batches`: called here, Lightning 2.6 drops a resumed loader's state.
        """
        steps = self.trainer.max_steps
        if (epochs := self.trainer.max_epochs) is not None and epochs >= 0:
            in_epochs = epochs * self.trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
            steps = in_epochs if steps < 0 else min(steps, in_epochs)
        return steps

    # One optimizer step

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self.packed_rows.understood(batch)
        loss, sums = self.losses(batch)
        if batch.share.example_weight:
            self._step.update(sums)
        self._taken.append((loss.detach(), batch))
        return loss

    def _on_any_rank(self, here: bool) -> bool:
        count = torch.tensor(float(here), device=self.device)
        return float(cast(Tensor, self.trainer.strategy.reduce(count, reduce_op="sum"))) > 0

    def losses(self, batch: Any) -> tuple[Tensor, Sums]:
        """The weighted loss of a micro-batch, and its metrics as (sum, count)."""
        raise AssertionError("each module has its own losses")

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The step's one small collective, before anything is stepped into the weights."""
        _, batch = self._taken[-1]
        if not batch.share.last:
            # Under DeepSpeed Lightning calls this for each micro-batch; else it would step with half a step's gradient.
            assert self.trainer.strategy.handles_gradient_accumulation
            return
        parameters = [p for p in self.parameters() if p.requires_grad]
        own = self._step.totals.clone()
        sums, norm = self._agree(own, gradient_norm_share(parameters, self.trainer.world_size))
        means = self.finished(self._step.means(sums))
        if not all(map(math.isfinite, (norm, *means.values()))):
            self.skipped_steps += 1
            drop_gradients(parameters)
            self._name_not_finite(own, means)
        self._step.reset()
        self._taken.clear()
        self.step_metrics = {**means, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
        metrics = {f"train/{name}": value for name, value in self.step_metrics.items()}
        self.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)

    def _agree(self, totals: Tensor, norm_share: Tensor) -> tuple[Tensor, float]:
        """The step's sums over all ranks, the gradient's norm, and `agreed`, by one all-reduce."""
        asked = [float(self.requests[name] != 0) for name in REQUESTS]
        rest = torch.tensor([0.0, *asked], dtype=totals.dtype, device=totals.device)
        rest[0] = norm_share
        message = torch.cat([totals.flatten(), rest])
        message = cast(Tensor, self.trainer.strategy.reduce(message, reduce_op="sum"))
        squared, *counts = message[totals.numel() :].tolist()
        self.agreed = {n: s if c else 0 for (n, s), c in zip(REQUESTS.items(), counts, strict=True)}
        return message[: totals.numel()].view_as(totals), math.sqrt(squared) if squared >= 0 else math.nan

    def _name_not_finite(self, own: Tensor, means: dict[str, float]) -> None:
        """Log the ids of this rank's examples that made the step not finite, as far as it can be known."""
        lost = not all(map(math.isfinite, means.values()))
        if lost and bool(own.isfinite().all()):
            return  # another rank's loss was not finite
        batches = [batch for loss, batch in self._taken if not (lost and bool(loss.isfinite()))]
        ids = ", ".join(str(example) for batch in batches for example in batch.ids)
        what = "loss" if lost else "gradient"
        log.error(
            "rank %d, step %d: the %s is not finite, nothing is changed; its examples: %s",
            self.global_rank, self.trainer.global_step, what, ids,
        )  # fmt: skip

    def _reduced(self, metric: Means) -> dict[str, float]:
        """The metric's means over all ranks, by one all-reduce, and the metric reset."""
        totals = self.trainer.strategy.reduce(metric.totals.clone(), reduce_op="sum")
        metric.reset()
        return self.finished(metric.means(cast(Tensor, totals)))

    def finished(self, means: dict[str, float]) -> dict[str, float]:
        """What follows from the means alone."""
        return means

    # Validation

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.packed_rows.understood(batch)
        _, sums = self.losses(batch)
        if batch.share.example_weight:
            self._validation.update(sums)

    @override
    def on_validation_epoch_end(self) -> None:
        metrics = {f"val/{name}": value for name, value in self._reduced(self._validation).items()}
        self.log_dict(metrics, batch_size=1)

    # Checkpoints: what is trained, described well enough to be loaded by PEFT alone

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.policy is not None
        checkpoint["state_dict"] = trained_state(self.policy)
        checkpoint["tandem"] = {
            **describe_for_checkpoint(self.policy, self.policy_config),
            "prompt_template": getattr(getattr(self.trainer, "datamodule", None), "prompt_template", None),
        }

        checkpoint["tandem"]["forwards_each_step"] = self.trainer.accumulate_grad_batches
        checkpoint["rng"] = self._rng_of_all_ranks()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        recount_forwards(checkpoint, self.trainer.accumulate_grad_batches)
        self._check_base(checkpoint.get("tandem", {}).get("base"))
        # Set at the first batch, not now: what Lightning does in between may draw from the generators.
        states = checkpoint.get("rng", [])
        self._resumed_rng = states[self.global_rank] if len(states) == self.trainer.world_size else None

    def _check_base(self, saved: dict[str, Any] | None) -> None:
        now = fingerprint(self.policy_config)["base"]
        if saved and saved["kind"] == now["kind"] and saved["digest"] != now["digest"]:
            raise UserError(
                f"policy.base: the checkpoint was trained on '{saved['name']}' ({saved['digest'][:12]}), not on"
                f" '{now['name']}' ({now['digest'][:12]}); give the model it was trained on"
            )

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._resumed_rng is not None:
            set_rng_state(self._resumed_rng)
            self._resumed_rng = None
        # Ahead of DeepSpeed's own forward, which records the modules that run in it.
        self.packed_rows.try_on(self.policy, batch, self._on_any_rank)

    @override
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.packed_rows.try_on(self.policy, batch, self._on_any_rank)

    def _rng_of_all_ranks(self) -> list[dict[str, Any]]:
        states: list[Any] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(states, rng_state())
        return states

    @override
    def load_state_dict(  # type: ignore[override]
        self, state_dict: Any, strict: bool = True, assign: bool = False
    ) -> None:
        assert self.policy is not None
        load_trained_state(self.policy, state_dict)

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of the model: settings, fingerprints, parameters."""
        assert self.policy is not None
        return {
            "module": type(self).__name__,
            "policy": {
                **dataclasses.asdict(self.policy_config),
                "fingerprint": fingerprint(self.policy_config),
            },
            "optimizer": dataclasses.asdict(self.optimizer_config),
            "schedule": dataclasses.asdict(self.schedule_config),
            "parameters": dataclasses.asdict(count_parameters(self.policy)),
            "forward": self.packed_rows.describe(self.policy, self.device),
        }


class PreferenceModule(ReferenceHooks, AlignmentModule):
    """A policy aligned with preferences against a frozen reference (DPO and its relatives).

    Args:
        policy: base model, adapter and where it starts.
        objective: what is minimised.
        reference: what the policy is compared with.
        optimizer: how weights move.
        schedule: how the learning rate goes.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        objective: ObjectiveConfig = ObjectiveConfig(),
        reference: ReferenceConfig = ReferenceConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
    ) -> None:
        super().__init__(policy, optimizer, schedule, PREFERENCE_METRICS)
        self.objective, self.reference_config = objective, reference
        self.reference: Reference | None = None

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self.reference is None:
            assert self.policy is not None
            self.reference = build_reference(
                self.reference_config, self.policy_config, self.policy, self.examples()
            )

    @override
    def losses(self, batch: PreferenceBatch) -> tuple[Tensor, Sums]:
        assert self.policy is not None
        assert self.reference is not None
        policy = pair_logps(self.policy, batch)
        reference = self.reference.logps(batch)
        each = preference_loss(self.objective, policy, reference)
        loss = batch.share.example_weight * each.sum()
        if self.objective.nll_weight:
            loss = loss - self.objective.nll_weight * batch.share.token_weight * policy.chosen.sum()
        return loss, self._sums(each, policy, reference)

    @override
    def finished(self, means: dict[str, float]) -> dict[str, float]:
        if self.objective.nll_weight and "loss" in means:
            means["loss"] += self.objective.nll_weight * means["nll"]
        return means

    def _sums(self, each: Tensor, policy: PairLogps, reference: PairLogps) -> Sums:
        chosen, rejected = rewards(self.objective.beta, policy, reference)
        pairs = len(each)
        return {
            "loss": (each.detach().sum(), pairs),
            "rewards/chosen": (chosen.sum(), pairs),
            "rewards/rejected": (rejected.sum(), pairs),
            "rewards/accuracies": (accuracies(chosen, rejected).sum(), pairs),
            "rewards/margins": ((chosen - rejected).sum(), pairs),
            "logps/chosen": (policy.chosen.detach().sum(), pairs),
            "logps/rejected": (policy.rejected.detach().sum(), pairs),
            "nll": (-policy.chosen.detach().sum(), policy.chosen_tokens.sum()),
        }

    @override
    def describe(self) -> dict[str, Any]:
        assert self.reference is not None
        objective = dataclasses.asdict(self.objective)
        return {**super().describe(), "objective": objective, "reference": self.reference.describe()}


class SupervisedModule(AlignmentModule):
    """A policy that imitates demonstrations (SFT): negative log-likelihood for each completion token of the step.

    Arguments as for `PreferenceModule`.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
    ) -> None:
        super().__init__(policy, optimizer, schedule, SUPERVISED_METRICS)

    @override
    def losses(self, batch: SupervisedBatch) -> tuple[Tensor, Sums]:
        assert self.policy is not None
        each = completion_token_logps(self.policy, batch.rows)
        return -batch.share.token_weight * each.sum(), {"loss": (-each.detach().sum(), len(each))}
