"""What every run keeps of its settings, and says of itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from launch.errors import check_yaml
from launch.identity import PLACES, differences
from launch.runs import CONFIG, Start
from trainer.policy.load import count_parameters


def resolved(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """The resolved config, as it is saved beside the run."""
    return yaml.safe_load(parser.dump(config, skip_none=False))


class KeepConfig(L.Callback):
    """Writes the resolved config beside a new run; on a resume keeps what is there and names what differs.

    Model and data are there by then: only now does the run that is replaced make room, and only with the
    first batch, when every callback has found its settings possible, is it gone.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, start: Start) -> None:
        self.parser, self.config, self.start = parser, config, start

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(pl_module, "run_folder"):
            pl_module.run_folder = Path(trainer.default_root_dir)  # type: ignore[assignment]
        # Right after this hook Lightning has the loggers write down what they know.
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_hyperparams(
                {key: value for key, value in resolved(self.parser, self.config).items() if key not in PLACES}
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.start.replaced.put_aside()
        path = Path(trainer.default_root_dir) / CONFIG
        if self.start.checkpoint and path.is_file():
            changes = differences(check_yaml(path), resolved(self.parser, self.config))
            for key, (before, after) in sorted(changes.items()):
                print(f"resuming with {key}: {after} (was {before})", file=sys.stderr)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self.start.replaced.drop()


class Announce(L.Callback):
    """Says on stderr what is trained, where it goes, and where the best checkpoint lies."""

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        resumed = f", resumed from {self.checkpoint}" if self.checkpoint else ""
        print(f"run: {trainer.default_root_dir}{resumed}", file=sys.stderr)
        print(f"policy: {count_parameters(pl_module.policy)}", file=sys.stderr)  # type: ignore[arg-type]

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            best = Path(trainer.default_root_dir) / "checkpoints" / "best"
            where = f", best checkpoint: {best}" if best.exists() else ""
            print(f"finished at step {trainer.global_step}{where}", file=sys.stderr)
