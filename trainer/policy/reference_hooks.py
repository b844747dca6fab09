"""When a training run asks its reference's cache: as a pass over pairs begins and ends, and with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from trainer.policy.reference import Reference


class ReferenceHooks(L.LightningModule):
    """The hooks of a module that has a `reference`; they stand before those of the module they are mixed into.

    Attributes:
        run_folder: where the run keeps its files; `reference.cache: auto` keeps log-probs in memory where it is None.
    """

    reference: Reference | None
    run_folder: Path | None = None
    _interrupted: Any = None

    def examples(self) -> dict[str, Any]:
        """The pairs of each split, as far as a datamodule shows them."""
        trainer = self._trainer  # Lightning 2.6: `self.trainer` raises where there is none
        return getattr(getattr(trainer, "datamodule", None), "examples", {})

    @property
    def _known_reference(self) -> Reference:
        assert self.reference is not None
        return self.reference

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_source()

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._check_source()

    def _check_source(self) -> None:
        """Have the source refuse a reference that its pairs were not made for."""
        source = getattr(getattr(self.trainer, "datamodule", None), "source", None)
        if (check := getattr(source, "check_reference", None)) is not None:
            check(self._known_reference.origin["fingerprint"])

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._known_reference.open(self.run_folder, new=self.trainer.global_step == 0)
        self._begin_epoch()  # Lightning calls `on_train_epoch_start` for no epoch that is resumed in its middle

    @override
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        steps = getattr(self.trainer.datamodule, "steps_per_epoch", 0)  # type: ignore[attr-defined]
        total = self._total_steps()  # type: ignore[operator]
        again = not 0 <= total <= steps or self._known_reference.config.folder is not None
        self._known_reference.begin("train", self.examples().get("train"), records=again)

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._known_reference.share()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._known_reference.share()

    @override
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._interrupted = self._known_reference.begin("validation", self.examples().get("validation"))

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._known_reference.share()
        self._known_reference.back(self._interrupted)

    @override
    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        if self.reference is not None:
            self.reference.close()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self._known_reference.share()
        if (known := self._known_reference.state()) is not None:
            checkpoint["reference_cache"] = known

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (known := checkpoint.get("reference_cache")) is not None and self.reference is not None:
            self.reference.load_state(known)
