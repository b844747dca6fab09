"""Numbers and texts, with the real TensorBoard, CSV and (offline) W&B loggers, read back."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typing_extensions import override

from callbacks.logging import log_metrics, log_text
from tests.callbacks.tiny import TinyModule, fit, trainer

TEXT = "s**о** **со**ld"


class Logs(L.Callback):
    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args) -> None:  # type: ignore[no-untyped-def]
        log_metrics(trainer, {"samples/length": 3.5 * trainer.global_step})
        log_text(trainer, "samples/1", TEXT)


def test_tensorboard_and_csv(tmp_path: Path) -> None:
    loggers = [
        TensorBoardLogger(tmp_path / "tb", name="", version=""),
        CSVLogger(tmp_path / "csv", name="", version=""),
    ]
    fit(trainer(tmp_path, Logs(), logger=loggers, log_every_n_steps=1), TinyModule(), [3.0, 2.0])

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("samples/length")] == [(1, 3.5), (2, 7.0)]
    assert [e.value for e in events.Scalars("train/loss")] == [3.0, 2.0]
    texts = events.Tensors("samples/1/text_summary")
    assert [(e.step, e.tensor_proto.string_val[0].decode("utf-8")) for e in texts] == [(1, TEXT), (2, TEXT)]

    with open(tmp_path / "csv" / "metrics.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["samples/length"]) for row in rows if row["samples/length"]] == [
        ("1", "3.5"),
        ("2", "7.0"),
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    logger = WandbLogger(save_dir=tmp_path, project="tandem")
    try:
        fit(trainer(tmp_path, Logs(), logger=logger), TinyModule(), [3.0, 2.0])
    finally:
        logger.experiment.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    # W&B's own process writes the file; on a busy machine it may be a moment behind.
    deadline = time.monotonic() + 30
    while b"samples/length" not in run.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"samples/length" in run.read_bytes()
    tables = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/samples/*.json"))
    assert len(tables) == 2
    for table in tables:
        assert json.loads(table.read_text(encoding="utf-8"))["data"][0][1] == TEXT


def test_without_a_logger(tmp_path: Path) -> None:
    module = fit(trainer(tmp_path, Logs()), TinyModule(), [3.0, 2.0])
    assert module.seen == [3.0, 2.0]
