"""Training as a whole on tiny models: fixed points, exact accumulation, parity with TRL, finite guards."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import lightning as L
import pytest
import torch

from tests.conftest import FAMILIES
from tests.module.records import Records, demonstrations, fit, preferences
from trainer.data.datamodule import PreferenceData, SupervisedData
from trainer.module import PreferenceModule, SupervisedModule
from trainer.objectives import ObjectiveConfig
from trainer.optimization import OptimizerConfig, ScheduleConfig
from trainer.policy.load import AdapterConfig, PolicyConfig
from trainer.policy.reference import ReferenceConfig
from trainer.schema import UserError

SGD = OptimizerConfig(name="sgd", lr=0.1)


def dpo(base: Path, optimizer: OptimizerConfig = SGD, **kwargs) -> PreferenceModule:
    adapter = kwargs.pop("adapter", AdapterConfig())
    return PreferenceModule(PolicyConfig(base=str(base), adapter=adapter), optimizer=optimizer, **kwargs)


def pairs(count: int, batch_size: int, **kwargs) -> PreferenceData:
    return PreferenceData(Records(preferences(count)), batch_size=batch_size, max_length=None, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_starts_at_ln_2(models, tmp_path, family) -> None:
    first = fit(dpo(models(family)), pairs(8, 4), tmp_path, max_steps=1).steps[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert first["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("reference", ["shared", "sharded"])
def test_reference_is_never_moved(tiny_llama, tmp_path, reference) -> None:
    module = dpo(tiny_llama, OptimizerConfig(lr=1e-2), reference=ReferenceConfig(kind=reference))
    module.configure_model()
    before = module.reference.fingerprint()
    history = fit(module, pairs(8, 8), tmp_path, max_steps=8)
    assert module.reference.fingerprint() == before
    assert history.losses[-1] < history.losses[0] - 0.01


def test_both_references_give_the_same_run(tiny_llama, tmp_path) -> None:
    losses = [
        fit(dpo(tiny_llama, reference=ReferenceConfig(kind=kind)), pairs(16, 4), tmp_path).losses
        for kind in ("shared", "sharded")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("task", ["dpo", "dpo+nll", "sft"])
def test_accumulation_is_exact(tiny_llama, tmp_path, task, accumulate) -> None:
    """Batch 8 equals accumulated parts of it, gradients too, with rows of unequal length. SGD hides no scale."""

    def run(n: int):
        if task == "sft":
            module = SupervisedModule(PolicyConfig(base=str(tiny_llama)), optimizer=SGD)
            data = SupervisedData(Records(demonstrations(20)), batch_size=8)
        else:
            weight = 1.0 if task == "dpo+nll" else 0.0
            module, data = dpo(tiny_llama, objective=ObjectiveConfig(nll_weight=weight)), pairs(20, 8)
        return fit(module, data, tmp_path, max_epochs=2, max_steps=-1, accumulate_grad_batches=n)

    whole, split = run(1), run(accumulate)
    assert len(whole.steps) == len(split.steps) == 6  # 20 pairs: two whole steps and one of 4, twice
    assert split.losses == pytest.approx(whole.losses, abs=1e-5)
    for a, b in zip(whole.gradients, split.gradients, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_same_seed_same_numbers(tiny_llama, tmp_path) -> None:
    runs = []
    for _ in range(2):
        L.seed_everything(1, verbose=False)
        runs.append(fit(dpo(tiny_llama), pairs(16, 4, seed=1), tmp_path).losses)
    assert runs[0] == runs[1]
    assert fit(dpo(tiny_llama), pairs(16, 4, seed=2), tmp_path).losses != runs[0]


@pytest.mark.parametrize(
    "adapter", [AdapterConfig(), AdapterConfig(preset="paper"), AdapterConfig(kind="lora"), None]
)
def test_every_adapter_trains(tiny_gpt2, tmp_path, adapter) -> None:
    kind = "sharded" if adapter is None else "shared"
    module = dpo(tiny_gpt2, adapter=adapter, reference=ReferenceConfig(kind=kind))
    history = fit(module, pairs(8, 8), tmp_path, max_steps=8, max_epochs=-1)
    assert history.losses[-1] < history.losses[0]


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adafactor", "sgd"])
def test_every_optimizer_learns(tiny_llama, tmp_path, name) -> None:
    optimizer = OptimizerConfig(name=name, lr=1e-2)
    history = fit(dpo(tiny_llama, optimizer), pairs(8, 8), tmp_path, max_steps=8, max_epochs=-1)
    assert history.losses[-1] < history.losses[0]


def test_schedule_is_stepped_each_optimizer_step(tiny_llama, tmp_path) -> None:
    schedule = ScheduleConfig(name="linear", warmup_steps=2)
    module = dpo(tiny_llama, schedule=schedule)
    history = fit(module, pairs(16, 4), tmp_path, max_steps=6, max_epochs=-1, accumulate_grad_batches=2)
    assert [step["lr"] for step in history.steps] == pytest.approx([0, 0.05, 0.1, 0.075, 0.05, 0.025])


class Poison(L.Callback):
    """Makes one adapter weight's gradient NaN at the second step."""

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == 1:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("nan"))


def test_a_step_that_is_not_finite_changes_nothing(tiny_llama, tmp_path) -> None:
    module = dpo(tiny_llama)
    history = fit(module, pairs(16, 4), tmp_path, max_steps=4, callbacks=[Poison()])
    assert module.skipped_steps == 1
    assert math.isnan(history.steps[1]["grad_norm"])
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert math.isfinite(history.losses[-1])


def test_validation_means_are_over_pairs(tiny_llama, tmp_path) -> None:
    """Unequal batches: 7 pairs in batches of 3 average like 7 pairs at once."""
    means = []
    for size in (3, 7):
        data = PreferenceData(Records(preferences(4), preferences(7, seed=1)), validation_batch_size=size)
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
        )
        means.append(trainer.validate(dpo(tiny_llama), data, verbose=False)[0])
    assert means[0] == pytest.approx(means[1], abs=1e-5)
    assert means[0]["val/loss"] == pytest.approx(math.log(2))


def test_weight_decay_with_ia3_is_refused(tiny_llama) -> None:
    with pytest.raises(UserError, match="weight_decay"):
        dpo(tiny_llama, OptimizerConfig(weight_decay=0.1))


def test_demonstrations_where_pairs_are_needed_are_refused(tiny_llama, tmp_path) -> None:
    data = PreferenceData(Records(demonstrations(4)))
    with pytest.raises(UserError, match="Preference"):
        fit(dpo(tiny_llama), data, tmp_path)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precision_that_rounds_the_adapter_is_refused(tiny_llama, tmp_path, precision) -> None:
    with pytest.raises(UserError, match="dtype: bfloat16"):
        fit(dpo(tiny_llama), pairs(4, 4), tmp_path, precision=precision)


def test_examples_beyond_the_models_positions_are_refused(tiny_gpt2, tmp_path) -> None:
    long = [dataclasses.replace(p, prompt="x" * 600) for p in preferences(4)]
    with pytest.raises(UserError, match="512 positions"):
        fit(dpo(tiny_gpt2), PreferenceData(Records(long), max_length=None), tmp_path)


def test_limited_epochs_end_the_schedule(tiny_llama, tmp_path) -> None:
    """2 epochs of 3 of 4 steps: linear to 0 over 6 steps, not 8."""
    module = dpo(tiny_llama, schedule=ScheduleConfig(name="linear"))
    settings = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2, "limit_train_batches": 6}
    history = fit(module, pairs(16, 4), tmp_path, **settings)
    assert [step["lr"] for step in history.steps] == pytest.approx([0.1 * (6 - i) / 6 for i in range(6)])
    with pytest.raises(UserError, match="limit_train_batches"):
        fit(dpo(tiny_llama), pairs(16, 4), tmp_path, **{**settings, "limit_train_batches": 5})


# TRL 1.16 leaves label_smoothing out of its sigmoid loss, so cDPO has nothing to be compared with.
TRL_CASES = {
    "sigmoid": (ObjectiveConfig(beta=0.2), {"loss_type": ["sigmoid"]}),
    "robust": (
        ObjectiveConfig("robust", beta=0.2, label_smoothing=0.1),
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    "ipo": (ObjectiveConfig("ipo", beta=0.2, average=True), {"loss_type": ["ipo"]}),
    "hinge": (ObjectiveConfig("hinge", beta=0.2), {"loss_type": ["hinge"]}),
    "sigmoid+nll": (
        ObjectiveConfig(beta=0.2, nll_weight=0.5),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
}


@pytest.mark.parametrize("case", TRL_CASES)
def test_five_steps_equal_trl(tiny_llama, tmp_path, case) -> None:
    """The same tiny model, IA³, pairs, order and settings through TRL's DPOTrainer."""
    objective, settings = TRL_CASES[case]
    trl = pytest.importorskip("trl", reason="TRL is a test extra")
    from datasets import Dataset
    from peft import IA3Config
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = preferences(20)
    data = PreferenceData(Records(records), batch_size=4, seed=3)
    module = dpo(tiny_llama, OptimizerConfig(lr=1e-2, eps=1e-8), objective=objective)
    ours = fit(module, data, tmp_path, max_steps=5)
    order = [i for step in range(5) for i in data.train_dataloader().sampler.step_indices(0, step)]

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.2, max_steps=5, **settings,
        per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.0,
        train_sampling_strategy="sequential", logging_steps=1, use_cpu=True, bf16=False, save_strategy="no",
        report_to="none", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    rows = [
        {"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in (records[i] for i in order)
    ]
    theirs = trl.DPOTrainer(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
    )
    theirs.train()
    log = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert ours.losses == pytest.approx([entry["loss"] for entry in log], abs=2e-4)  # TRL rounds what it logs
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        # The first step's rewards are ties, which count one half here and nothing in TRL.
        expected = [entry[name] for entry in log][1:]
        assert [step[name] for step in ours.steps][1:] == pytest.approx(expected, rel=1e-3, abs=1e-4)
