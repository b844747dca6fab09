"""Log-probs that are computed once: the same run as with a live reference, and fewer forwards."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import IA3Config

import trainer.policy.reference as reference_module
from tests.module.records import History, Records, preferences
from tests.policy.test_load import save_plain
from tests.tiny_models import make
from trainer.checkpoint import PortableCheckpointIO
from trainer.data.datamodule import PreferenceData
from trainer.module import PreferenceModule
from trainer.objectives import ObjectiveConfig
from trainer.optimization import OptimizerConfig, ScheduleConfig
from trainer.policy.load import AdapterConfig, PolicyConfig
from trainer.policy.reference import FOLDER, ReferenceConfig
from trainer.schema import UserError

PAIRS = 22


class Forwards:
    """Counts the reference's real forwards."""

    def __init__(self, monkeypatch) -> None:
        self.count, real = 0, reference_module.pair_logps

        def counted(model: Any, batch: Any) -> Any:
            self.count += 1
            return real(model, batch)

        monkeypatch.setattr(reference_module, "pair_logps", counted)

    def taken(self) -> int:
        """Since the last time."""
        count, self.count = self.count, 0
        return count


@pytest.fixture
def forwards(monkeypatch) -> Forwards:
    return Forwards(monkeypatch)


class Cut(Exception):
    pass


class SaveAndCut(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch.share.last and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Cut


def train(
    base: Path,
    reference: ReferenceConfig = ReferenceConfig(),
    run: Path | None = None,
    *,
    pairs: int = PAIRS,
    validation: int = 0,
    epochs: int = 3,
    cut: tuple[Path, int] | None = None,
    resume: Path | None = None,
    callbacks: Sequence[L.Callback] = (),
    **policy: Any,
) -> tuple[History, PreferenceModule]:
    """A run of 6 steps of at most 4 pairs in an epoch; a run's folder keeps its cache where one is given."""
    L.seed_everything(7, verbose=False)
    module = PreferenceModule(
        PolicyConfig(str(base), **{"adapter": AdapterConfig(), **policy}),
        ObjectiveConfig(),
        reference,
        OptimizerConfig(name="adamw", lr=1e-2),
        ScheduleConfig(),
    )
    module.run_folder = run
    history = History()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, default_root_dir=run, max_epochs=epochs, accumulate_grad_batches=2,
        callbacks=[history, *callbacks, *([SaveAndCut(*cut)] if cut else [])], plugins=[PortableCheckpointIO()],
    )  # fmt: skip
    data = PreferenceData(Records(preferences(pairs), preferences(validation, seed=1)), batch_size=4)
    with contextlib.suppress(Cut):
        trainer.fit(module, data, ckpt_path=None if resume is None else str(resume))
    return history, module


def margins(history: History) -> list[float]:
    return [step["rewards/margins"] for step in history.steps]


REFERENCES = {
    "bare base": {},
    "adapter": {"start": True},
    "copy": {"kind": "sharded", "start": True},
    "copy, all weights": {"kind": "sharded", "adapter": None},
}


@pytest.mark.parametrize(
    ("where", "name"), [*(("memory", name) for name in REFERENCES), ("run", "adapter"), ("folder", "copy")]
)
def test_three_epochs_equal_those_with_a_live_reference(tiny_llama, tmp_path, forwards, name, where) -> None:
    case = dict(REFERENCES[name])
    kind = case.pop("kind", "shared")
    if case.pop("start", False):
        case["start"] = str(save_plain(tiny_llama, tmp_path / "start", IA3Config(task_type="CAUSAL_LM")))
    run = tmp_path / "run" if where == "run" else None
    cache = str(tmp_path / "cache") if where == "folder" else "auto"
    live, _ = train(tiny_llama, ReferenceConfig(kind, cache=None), **case)
    every = forwards.taken()
    cached, module = train(tiny_llama, ReferenceConfig(kind, cache=cache), run, **case)
    assert forwards.taken() * 3 == every
    assert len(live.losses) == 18
    for mine, theirs in zip(cached.steps, live.steps, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert len(module.reference.cache) == PAIRS
    assert (tmp_path / "run" / FOLDER).exists() == (where == "run")
    told = module.describe()["reference"]["log_probs"]
    assert told["entries"] == PAIRS
    assert len(told["key"]) == 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_stay_as_they_were_recorded(tiny_llama, dtype) -> None:
    """In bfloat16 a sum near -300 has steps of 2; a recorded one is read unrounded, batch for batch."""
    seen: dict[bytes, list[tuple[float, float]]] = {}
    real = reference_module.Reference.logps

    def watched(self: Any, batch: Any) -> Any:
        found = real(self, batch)
        assert found.chosen.dtype == torch.float32
        for key, *numbers in zip(batch.keys, found.chosen.tolist(), found.rejected.tolist(), strict=True):
            seen.setdefault(key, []).append(tuple(numbers))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module.Reference, "logps", watched)
        train(tiny_llama, dtype=dtype)
    assert len(seen) == PAIRS
    assert all(len(numbers) == 3 and len(set(numbers)) == 1 for numbers in seen.values())
    chosen = torch.tensor([numbers[0][0] for numbers in seen.values()])
    assert (chosen.bfloat16() != chosen).any()


def test_a_run_of_one_epoch_keeps_nothing_for_itself(tiny_llama, tmp_path, forwards) -> None:
    _, module = train(tiny_llama, run=tmp_path, epochs=1)
    assert len(module.reference.cache) == 0
    assert not (tmp_path / FOLDER).exists()
    _, module = train(tiny_llama, ReferenceConfig(cache=str(tmp_path / "kept")), epochs=1)
    assert len(module.reference.cache) == PAIRS, "another run may want it"
    forwards.taken()
    train(tiny_llama, ReferenceConfig(cache=str(tmp_path / "kept")), epochs=1)
    assert forwards.taken() == 0


def test_validation_is_cached_apart(tiny_llama, forwards) -> None:
    _, module = train(tiny_llama, ReferenceConfig(cache=None), validation=7)
    expected = dict(module.trainer.callback_metrics)
    every = forwards.taken()
    _, module = train(tiny_llama, validation=7)
    assert forwards.taken() * 3 == every
    assert len(module.reference.cache) == PAIRS + 7
    for name, value in module.trainer.callback_metrics.items():
        assert float(value) == pytest.approx(float(expected[name]), abs=1e-5), name


@pytest.mark.parametrize(("where", "cut"), [("memory", 3), ("memory", 9), ("run", 6), ("run", 9)])
def test_a_resumed_run_is_the_run_that_was_not_cut(tiny_llama, tmp_path, where, cut) -> None:
    """Cut in the first epoch, at its end, and in the second: to the bit."""
    whole, _ = train(tiny_llama, run=tmp_path / "whole" if where == "run" else None)
    run = tmp_path / "cut" if where == "run" else None
    first, _ = train(tiny_llama, run=run, cut=(tmp_path / "saved", cut))
    rest, module = train(tiny_llama, run=run, resume=tmp_path / "saved")
    assert first.losses + rest.losses == whole.losses
    assert len(module.reference.cache) == PAIRS


def test_a_killed_run_goes_on_from_what_was_written(tiny_llama, tmp_path, forwards) -> None:
    """A child is killed in its second epoch; resumed from a checkpoint of its first, no pair is computed again."""
    whole, _ = train(tiny_llama, run=tmp_path / "whole")
    if (child := os.fork()) == 0:  # it must not come back into pytest

        class Kill(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
                if batch.share.last and trainer.global_step == 8:
                    os.kill(os.getpid(), signal.SIGKILL)
                if batch.share.last and trainer.global_step == 4:
                    trainer.save_checkpoint(tmp_path / "saved")

        try:
            train(tiny_llama, run=tmp_path / "run", callbacks=[Kill()])
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    forwards.taken()
    rest, _ = train(tiny_llama, run=tmp_path / "run", resume=tmp_path / "saved")
    assert forwards.taken() == 0
    assert rest.losses == whole.losses[4:]


def test_new_pairs_are_computed_in_their_first_epoch(tiny_llama, tmp_path, forwards) -> None:
    kept = ReferenceConfig(cache=str(tmp_path / "kept"))
    train(tiny_llama, kept, epochs=1)
    live, _ = train(tiny_llama, ReferenceConfig(cache=None), pairs=PAIRS + 4)
    each = forwards.taken()
    more, module = train(tiny_llama, kept, pairs=PAIRS + 4)
    assert forwards.taken() == 14, "all of the first epoch's seven steps, two forwards each"
    assert each > 14
    assert margins(more) == pytest.approx(margins(live), abs=1e-5)
    assert len(module.reference.cache) == PAIRS + 4


def test_a_full_disk_costs_one_line_and_nothing_else(tiny_llama, tmp_path, caplog, forwards) -> None:
    whole, _ = train(tiny_llama, validation=7)
    once = forwards.taken()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = tmp_path / "run"

    class Full(L.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))

    try:
        with caplog.at_level(logging.WARNING):
            cached, _ = train(tiny_llama, run=run, validation=7, callbacks=[Full()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("trainer.policy")]
    assert len(lines) == 1
    assert "stay in memory" in lines[0]
    assert str(run / FOLDER) in lines[0]
    assert cached.losses == whole.losses
    assert forwards.taken() == once


def test_a_damaged_cache_is_named_and_computed_anew(tiny_llama, tmp_path, caplog, forwards) -> None:
    kept = ReferenceConfig(cache=str(tmp_path / "kept"))
    train(tiny_llama, kept, epochs=1)
    (shard,) = (tmp_path / "kept").glob("*.records")
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 1
    shard.write_bytes(raw)
    forwards.taken()
    with caplog.at_level(logging.WARNING):
        train(tiny_llama, kept, epochs=1)
    assert forwards.taken() == 12
    assert [str(shard) in r.getMessage() for r in caplog.records if "damaged" in r.getMessage()] == [True]
    caplog.clear()
    train(tiny_llama, kept, epochs=1)
    assert forwards.taken() == 0
    assert not [r for r in caplog.records if "damaged" in r.getMessage()], "it was mended"


# Without the reference's weights


@pytest.mark.parametrize("kind", ["sharded", "shared", "cached"])
def test_no_weights_are_loaded_where_all_log_probs_are_there(tiny_llama, tmp_path, monkeypatch, kind) -> None:
    start = str(save_plain(tiny_llama, tmp_path / "start", IA3Config(task_type="CAUSAL_LM")))
    kept = str(tmp_path / "kept")
    live, first = train(tiny_llama, ReferenceConfig("sharded", cache=kept), start=start, validation=5)
    assert first.reference.present
    for name in ("load_frozen", "fill_adapter"):
        monkeypatch.setattr(reference_module, name, lambda *args: pytest.fail("weights are loaded"))
    config = ReferenceConfig(kind, cache=kept)
    cached, module = train(tiny_llama, config, start=start, validation=5)
    assert not module.reference.present
    assert not list(module.reference.parameters())
    assert module.policy.peft_config.keys() == {"default"}
    assert cached.losses == pytest.approx(live.losses, abs=1e-5)
    # A run that began with weights and goes on without them has the same reference.
    assert module.reference.fingerprint() == first.reference.fingerprint()


def test_a_cached_reference_that_is_the_bare_base_can_still_answer(tiny_llama, tmp_path) -> None:
    kept = str(tmp_path / "kept")
    train(tiny_llama, ReferenceConfig(cache=kept), epochs=1)
    _, module = train(tiny_llama, ReferenceConfig("cached", cache=kept), epochs=1)
    assert module.reference.present
    assert module.reference.model is None


def test_what_a_cache_lacks_is_named(tiny_llama, tmp_path) -> None:
    kept = tmp_path / "kept"
    config = ReferenceConfig("cached", cache=str(kept))
    with pytest.raises(UserError, match=rf"{kept}: no such folder.*cache-reference.*makes it"):
        train(tiny_llama, config)
    train(tiny_llama, ReferenceConfig(cache=str(kept)), epochs=1)
    with pytest.raises(
        UserError, match=rf"{kept} does not hold 4 of 26 train pairs, such as example 2[2-5];.*adds"
    ):
        train(tiny_llama, config, pairs=PAIRS + 4)
    with pytest.raises(UserError, match=r"does not hold 3 of 3 validation pairs, such as example \d"):
        train(tiny_llama, config, validation=3)
    with pytest.raises(UserError, match="names no folder"):
        ReferenceConfig("cached")
    with pytest.raises(UserError, match="null names no folder"):
        ReferenceConfig("cached", cache=None)
    for kind in ("cached", "shared"):
        with pytest.raises(UserError, match="cache: '' names no folder"):
            ReferenceConfig(kind, cache="")


@pytest.mark.parametrize("kind", ["shared", "cached"])
def test_a_stale_cache_is_refused(tiny_llama, tmp_path, kind) -> None:
    kept = str(tmp_path / "kept")
    config = ReferenceConfig(kind, cache=kept)
    train(tiny_llama, ReferenceConfig(cache=kept), epochs=1)
    with pytest.raises(UserError, match=r"stale.*dtype was float32 and is bfloat16"):
        train(tiny_llama, config, dtype="bfloat16")
    other = make("llama", tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=r"stale.*base was [0-9a-f]{12} and is [0-9a-f]{12}"):
        train(other, config)
    start = save_plain(tiny_llama, tmp_path / "start", IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"stale.*start.*adapter_model.safetensors was none and is"):
        train(tiny_llama, config, start=str(start))


def test_the_same_weights_elsewhere_are_the_same_reference(tiny_llama, tmp_path, forwards) -> None:
    kept = ReferenceConfig(cache=str(tmp_path / "kept"))
    train(tiny_llama, kept, epochs=1)
    (tmp_path / "moved").mkdir()
    for path in tiny_llama.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    forwards.taken()
    train(tmp_path / "moved", kept, epochs=1)
    assert forwards.taken() == 0


def test_a_new_run_does_not_take_what_another_left_in_its_folder(tiny_llama, tmp_path) -> None:
    run, other = tmp_path / "run", make("llama", tmp_path / "other", seed=5)
    train(tiny_llama, run=run, cut=(tmp_path / "saved", 9))
    _, module = train(other, run=run)
    assert len(module.reference.cache) == PAIRS
    # But a run that goes on must find its own.
    with pytest.raises(UserError, match="stale"):
        train(tiny_llama, run=run, resume=tmp_path / "saved")


def test_a_link_in_a_new_runs_folder_is_not_emptied(tiny_llama, tmp_path) -> None:
    train(tiny_llama, ReferenceConfig(cache=str(tmp_path / "kept")), epochs=1)
    there = sorted(path.name for path in (tmp_path / "kept").iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match=r"reference_cache is a link.*set reference.cache to .*kept"):
        train(tiny_llama, run=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == there


def test_a_resume_with_another_reference_is_refused(tiny_llama, tmp_path) -> None:
    train(tiny_llama, cut=(tmp_path / "saved", 9))
    other = str(save_plain(tiny_llama, tmp_path / "other", IA3Config(task_type="CAUSAL_LM")))
    with pytest.raises(UserError, match="the checkpoint's log-probs are those of another reference: start"):
        train(tiny_llama, ReferenceConfig(adapter=other), resume=tmp_path / "saved")


def test_another_version_of_transformers_makes_a_cache_stale(tiny_llama, tmp_path, monkeypatch) -> None:
    kept = ReferenceConfig(cache=str(tmp_path / "kept"))
    train(tiny_llama, kept, epochs=1)
    monkeypatch.setattr("trainer.policy.reference_cache.metadata.version", lambda name: "0.1")
    with pytest.raises(UserError, match=r"stale.*transformers was .* and is 0.1"):
        train(tiny_llama, kept, epochs=1)
