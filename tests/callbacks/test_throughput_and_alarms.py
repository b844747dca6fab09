"""Throughput counts what went through; alarms are raised when, and only when, something is wrong."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from callbacks.alarms import Alarms
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.sample_generation import SampleGeneration
from callbacks.throughput import Throughput
from tests.callbacks.language import LanguageModule
from tests.callbacks.real import run
from tests.callbacks.tiny import TinyModule, batches, fit, trainer
from trainer.generation import Sampling
from trainer.schema import UserError


def column(root: Path, name: str) -> list[tuple[int, float]]:
    with open(root / "metrics.csv", encoding="utf-8") as stream:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(stream) if row.get(name)]


def test_throughput_logs_rates_and_memory_each_n_optimizer_steps(tmp_path: Path) -> None:
    callback = Throughput(every_n_steps=2)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(trainer(tmp_path, callback, logger=logger, accumulate_grad_batches=2), TinyModule(), [1.0] * 10)
    tokens, pairs = column(tmp_path, "train/tokens_per_second"), column(tmp_path, "train/pairs_per_second")
    assert [step for step, _ in tokens] == [2, 4, 5]
    # Ten tokens and two pairs in a batch, measured over the same time.
    assert [t / p for (_, t), (_, p) in zip(tokens, pairs, strict=True)] == pytest.approx([5.0, 5.0, 5.0])
    assert all(0.05 < gb < 64 for _, gb in column(tmp_path, "memory/peak_rss_gb"))
    assert callback.summary()["tokens"] == 100
    assert callback.summary()["pairs"] == 20
    assert callback.summary()["train_seconds"] > 0


def test_throughput_leaves_validation_time_and_fillers_out(tmp_path: Path) -> None:
    callback = Throughput()

    class Slow(TinyModule):
        @override
        def validation_step(self, *args) -> None:  # type: ignore[no-untyped-def]
            time.sleep(0.5)

    fit(trainer(tmp_path, callback, num_sanity_val_steps=0), Slow([1.0]), [1.0] * 2, validate=True)
    assert callback.seconds_total < 0.4
    (filler,) = batches([1.0])
    filler.share.example_weight = 0.0
    callback._count(filler)
    assert callback._tokens == callback._examples == 0


def test_throughput_of_validation(tmp_path: Path) -> None:
    callback, logger = Throughput(), CSVLogger(tmp_path, name="", version="")

    class Slow(TinyModule):
        @override
        def validation_step(self, *args) -> None:  # type: ignore[no-untyped-def]
            time.sleep(0.2)

    runner = trainer(tmp_path, callback, logger=logger, val_check_interval=2)
    fit(runner, Slow([1.0, 1.0]), [1.0] * 4, validate=True)
    rates = column(tmp_path, "val/tokens_per_second")
    # Ten tokens in at least 0.2 s; the sanity check is not logged.
    assert [step for step, _ in rates] == [2, 4]
    assert all(20 < rate <= 50 for _, rate in rates)
    (filler,) = batches([1.0])
    filler.share.example_weight = 0.0
    callback.on_validation_start(runner, runner.lightning_module)
    callback.on_validation_batch_end(runner, runner.lightning_module, None, filler, 0)
    assert callback._validation_tokens == 0


def test_throughput_of_real_batches(tmp_path: Path, tiny_llama: Path) -> None:
    """Every forward's tokens are those that the batch says were computed: prompts and both completions."""
    seen: dict[str, int] = {"train": 0, "val": 0}

    class Count(L.Callback):
        @override
        def on_train_batch_end(self, *args) -> None:  # type: ignore[no-untyped-def]
            seen["train"] += args[3].rows.tokens

        @override
        def on_validation_batch_end(self, *args) -> None:  # type: ignore[no-untyped-def]
            seen["val"] += args[3].rows.tokens

    throughput = Throughput()
    run(tmp_path, tiny_llama, Count(), throughput, max_epochs=1, val_check_interval=4)
    assert throughput.tokens_total == seen["train"] > 0
    assert throughput._validation_tokens == seen["val"] > 0


def test_throughput_totals_go_on_after_a_resume(tmp_path: Path) -> None:
    saver = ImprovedLossCheckpoint(save_steps=2, keep=-1)
    fit(trainer(tmp_path, Throughput(1), saver), TinyModule(), [1.0] * 4)
    again = Throughput(1)
    path = tmp_path / "checkpoints" / "step-00000002"
    fit(trainer(tmp_path, again, ImprovedLossCheckpoint(save_steps=2)), TinyModule(), [1.0] * 4, resume=path)
    assert again.tokens_total == 40


def test_falling_chosen_log_prob_is_said_once_and_its_end_too(tmp_path: Path) -> None:
    callback = Alarms(every_n_steps=2, chosen_fall=0.5)
    logger = CSVLogger(tmp_path, name="", version="")
    # The module reports logps/chosen = -10 * value: windows -20, -25, -40, -50, -20
    values = [2.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 5.0, 2.0, 2.0]
    with pytest.warns(
        UserWarning, match="alarm chosen_falling at step 6: .* from -20.00 to -40.00"
    ) as caught:
        fit(trainer(tmp_path, callback, logger=logger), TinyModule(), values)
    assert sum("alarm" in str(warning.message) for warning in caught) == 1
    assert column(tmp_path, "alarms/chosen_falling") == [(6, 1.0), (10, 0.0)]
    assert callback.summary()["chosen_falling"] | {"message": ""} == {
        "first_step": 6,
        "last_step": 8,
        "times": 1,
        "standing": False,
        "message": "",
    }


def test_no_alarm_for_a_run_that_is_well(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    callback = Alarms(every_n_steps=1)
    fit(trainer(tmp_path, callback), TinyModule(), [2.0, 2.1, 1.0, 0.5, 2.2])
    assert callback.summary() == {}
    assert not [w for w in recwarn if "alarm" in str(w.message)]


@pytest.mark.filterwarnings("ignore:alarm")
def test_steps_that_are_not_finite(tmp_path: Path) -> None:
    callback = Alarms(max_not_finite=2)
    fit(trainer(tmp_path, callback), TinyModule(), [1.0, math.nan, 1.0, math.nan, 1.0])
    assert callback.summary()["not_finite"]["times"] == 2
    assert "a3, b3" in callback.summary()["not_finite"]["message"]
    module, runner = (
        TinyModule(),
        trainer(tmp_path, Alarms(max_not_finite=2), ImprovedLossCheckpoint(save_steps=1)),
    )
    with pytest.raises(UserError, match="step 4: loss or gradient was not finite in 2 steps in a row"):
        fit(runner, module, [1.0, 1.0, math.nan, math.nan, 1.0])
    assert (tmp_path / "checkpoints" / "last" / "checkpoint.pt").is_file()


@pytest.mark.filterwarnings("ignore:alarm")
def test_drifting_lengths(tmp_path: Path, tiny_llama: Path) -> None:
    class Longer(L.Callback):
        """What a policy that rambles would bring about."""

        @override
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args) -> None:  # type: ignore[no-untyped-def]
            samples.length_policy = samples.length_reference * (2 if trainer.global_step == 2 else 1)

    samples = SampleGeneration(["so"], sampling=Sampling(max_new_tokens=4))
    callback = Alarms(every_n_steps=1)
    fit(trainer(tmp_path, samples, Longer(), callback), LanguageModule(tiny_llama), [1.0] * 4)
    assert callback.summary()["lengths_drifting"]["first_step"] == 2
    assert not callback.summary()["lengths_drifting"]["standing"]


@pytest.mark.filterwarnings("ignore:alarm")
def test_alarm_state_is_json_and_comes_back(tmp_path: Path) -> None:
    callback = Alarms(every_n_steps=1)
    fit(trainer(tmp_path, callback), TinyModule(), [1.0, 9.0])
    state = callback.state_dict()
    other = Alarms(every_n_steps=1)
    other.load_state_dict(json.loads(json.dumps(state)))
    assert other.state_dict() == state
    assert state["first"] == {"train/logps/chosen": -10.0}


@pytest.mark.parametrize(
    "settings", [{"every_n_steps": 0}, {"max_not_finite": 0}, {"chosen_fall": 0}, {"length_drift": -1}]
)
def test_misconfigured(tmp_path: Path, settings: dict) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"Alarms.{name}"):
        fit(trainer(tmp_path, Alarms(**settings)), TinyModule(), [1.0])
    with pytest.raises(UserError, match=r"Throughput\.every_n_steps: 0"):
        fit(trainer(tmp_path, Throughput(0)), TinyModule(), [1.0])
