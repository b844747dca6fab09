"""`tandem fit` and `tandem validate`: one LightningCLI parser, a run's folder, and resuming.

Launchers start this file as a script on each rank: `fabric run launch/fit.py --config ...`,
`torchrun launch/fit.py --config ...`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from callbacks.alarms import Alarms
from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.preemption import Preemption
from callbacks.reward_evaluation import RewardEvaluation
from callbacks.run_manifest import RunManifest
from callbacks.sample_generation import SampleGeneration
from callbacks.throughput import Throughput
from launch.building import build
from launch.children import Children, own_children
from launch.ending import leave_together, run_to_its_end
from launch.errors import check_yaml, config_files, describe, user_error_in
from launch.following import follow_parent
from launch.identity import flat, refuse_another_run
from launch.kept import Announce, KeepConfig, resolved
from launch.launchers import settle, strategy_of
from launch.lease import Lease
from launch.progress import StepProgress
from launch.quiet import quiet
from launch.runs import CONFIG, Replaced, Start, default_folder, open_run, refuse_file
from launch.signals import Signals, replace_handlers
from trainer.checkpoint import PortableCheckpointIO, resolve
from trainer.schema import UserError

CALLBACKS: dict[str, type[L.Callback]] = {
    "checkpoint": ImprovedLossCheckpoint,
    "samples": SampleGeneration,
    "reward_evaluation": RewardEvaluation,
    "throughput": Throughput,
    "alarms": Alarms,
    "manifest": RunManifest,
    "preemption": Preemption,
}
"""The callbacks that every run has, by the name of their settings; `trainer.callbacks+:` adds others."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "deterministic": "warn",
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
Command = Literal["fit", "validate", "inspect"]


class TandemCLI(LightningCLI):
    """LightningCLI with the callbacks that every run has, a run's folder, and no subcommands.

    Args:
        arguments: the command line after the command's name.
        command: `fit`, `validate`, or `inspect`, which parses and builds nothing.
    """

    def __init__(self, arguments: Sequence[str], command: Command) -> None:
        self.command: Command = command
        self.words, self.files = list(arguments), config_files(arguments)
        self.start: Start | None = None
        self.lease: Lease | None = None
        self.children: Children | None = None
        for file in self.files:
            check_yaml(file)
        try:
            super().__init__(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=0,
                parser_kwargs={
                    "exit_on_error": False,
                    "allow_abbrev": False,
                    "prog": f"tandem {command}",
                    "usage": f"tandem {command} --config FILE [--config FILE ...] [--run DIR] [--SETTING VALUE]",
                    "description": _DESCRIPTIONS[command],
                },
                args=with_nulls(arguments),
                run=False,
                auto_configure_optimizers=False,
            )
        except BaseException:
            self.release()
            raise

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run", type=str | None, help="The run's folder. Default: runs/<recipe>/<stage>."
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            help="Go on from a checkpoint, a run's newest, or `auto`: the newest valid one here, if any.",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="Start anew in a folder that holds a run."
        )
        parser.add_argument("--offline", action="store_true", help="Never ask the network.")
        parser.add_argument(
            "--float32_matmul",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Precision of float32 matrix products on a GPU (`high` is TF32).",
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            help="CPU threads of each process. Tiny models are fastest with 1, above all on a busy machine.",
        )
        parser.add_argument(
            "--rank_timeout",
            type=PositiveFloat,
            default=600.0,
            help="Seconds that ranks wait for one another; then the run fails.",
        )
        if self.command == "validate":
            parser.add_argument(
                "--weights",
                type=str | None,
                help="What to validate: a checkpoint or a run. Default: policy.start.",
            )
        for name, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)
        # Without prompts there is nothing to sample, and the callback is left out.
        parser.set_defaults({"samples.prompts": []})

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if os.environ.get("TANDEM_DEBUG"):
                raise
            raise user_error_in(error) or UserError(describe(error, self.files)) from error

    @override
    def before_instantiate_classes(self) -> None:
        torch.set_float32_matmul_precision(self.config.float32_matmul)
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if self.config.offline:
            _refuse_network(self.config)
        if self.command == "inspect":
            return
        settle(self.config, self.words)
        follow_parent()
        folder = self._folder()
        self.config.run = self.config.trainer.default_root_dir = str(folder)
        if self.command == "fit":
            self._open(folder, first=_first_rank())

    def _open(self, folder: Path, first: bool) -> None:
        """Claim the run's folder, and find where the run starts."""
        refuse_file(folder)
        if first:
            self.lease = Lease(folder)
        self.start = open_run(folder, self.config.resume, self.config.overwrite, first)
        self._refuse_start_in(self.start.replaced)
        if first and self.config.resume == "auto" and self.start.checkpoint and (folder / CONFIG).is_file():
            refuse_another_run(folder, check_yaml(folder / CONFIG), resolved(self.parser, self.config))

    def release(self) -> None:
        """Let go of the run's folder."""
        if self.lease is not None:
            self.lease.release()

    def _folder(self) -> Path:
        named, root = self.config.run, self.config.trainer.default_root_dir
        if named and root and Path(named) != Path(root):
            raise UserError(f"--run {named} and trainer.default_root_dir {root} name two folders; give one")
        return Path(named or root or default_folder(self.files))

    def _refuse_start_in(self, replaced: Replaced) -> None:
        """A run cannot start from what it replaces."""
        for key, value in flat(self.config.model.as_dict()):
            if isinstance(value, str) and replaced.holds(Path(value)):
                name = ".".join(part for part in key.split(".") if part != "init_args")
                raise UserError(
                    f"model.{name}: {value} is what --overwrite replaces; give another --run FOLDER"
                )

    @override
    def instantiate_classes(self) -> None:
        if self.command != "inspect":
            super().instantiate_classes()

    def data_only(self) -> Any:
        """The datamodule alone, for commands that look at data."""
        return build(L.LightningDataModule, self.config.data.as_dict(), "data")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = {**self.config_init.trainer.as_dict(), **kwargs}
        settings["strategy"] = strategy_of(settings["strategy"], self.config_init.rank_timeout)
        callbacks = _as_list(settings.pop("callbacks"))
        if self.start is not None:
            # In this order, so that samples and manifest see the run before an extra callback changes it.
            callbacks = [*self._own_callbacks(bool(settings["fast_dev_run"]), self.start), *callbacks]
        if settings["enable_progress_bar"] is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(StepProgress())
        plugins = [
            *_as_list(settings.pop("plugins")),
            PortableCheckpointIO(self.lease.check if self.lease else None),
        ]
        if self.command == "validate":
            settings["logger"] = False
        elif settings["logger"] in (None, True):
            settings["logger"] = TensorBoardLogger(
                settings["default_root_dir"], name="", version="", default_hp_metric=False
            )
        try:
            trainer = L.Trainer(**settings, callbacks=callbacks, plugins=plugins)
        except (TypeError, ValueError) as error:
            if user_error_in(error):
                raise
            raise UserError(f"trainer: {error}") from error
        replace_handlers(trainer)
        self.children = own_children(trainer)
        return trainer

    def _own_callbacks(self, dry: bool, start: Start) -> list[L.Callback]:
        """The callbacks of every run; a dry one (fast_dev_run) leaves config and manifest as they are."""
        left_out = {"manifest"} if dry else set()
        if not self.config.samples.prompts:
            left_out.add("samples")
        if self.config.reward_evaluation.prompts is None:
            left_out.add("reward_evaluation")
        named = [self.config_init[name] for name in CALLBACKS if name not in left_out]
        kept = [] if dry else [KeepConfig(self.parser, self.config, start)]
        return [*kept, *named, Announce(start.checkpoint)]


_DESCRIPTIONS: dict[Command, str] = {
    "fit": "Train a policy. Configs stack: a later file overrides an earlier one, the command line both."
    " --SETTING is any setting of a config: --trainer.max_steps 100, --model.optimizer.lr 0.001."
    " --model.help trainer.module.PreferenceModule (or SupervisedModule) shows a model's settings,"
    " --data.help trainer.data.datamodule.PreferenceData (or SupervisedData) those of the data.",
    "validate": "Compute a config's validation metrics and print them as JSON. Configs stack as for `fit`.",
    "inspect": "Look at one example of a config's data.",
}


def with_nulls(arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--model.a.b null` as the piece of config that says the same.

    jsonargparse 4.53 hands a null for a setting inside a class on as the word `None`.
    """
    words, out = [part for word in arguments for part in _parted(word)], []
    while words:
        word = words.pop(0)
        if word.startswith("--model.") and words and words[0] == "null":
            words.pop(0)
            keys = [
                "model",
                "init_args",
                *word.removeprefix("--model.").removeprefix("init_args.").split("."),
            ]
            value: Any = None
            for key in reversed(keys):
                value = {key: value}
            out += ["--config", json.dumps(value)]
        else:
            out.append(word)
    return out


def _parted(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--model.") and word.endswith("=null") else [word]


def _as_list(given: Any) -> list[Any]:
    return [*given] if isinstance(given, list) else [given] if given else []


def _refuse_network(config: Any) -> None:
    """Set every `offline` setting of the model and the data."""
    if isinstance(config, Namespace):
        for key, value in vars(config).items():
            if key == "offline" and isinstance(value, bool):
                config[key] = True
            else:
                _refuse_network(value)


def _first_rank() -> bool:
    # Lightning 2.6 has set it from the launcher's environment variables when it was imported.
    return getattr(rank_zero_only, "rank", 0) == 0


def fit(arguments: Sequence[str]) -> int:
    """`tandem fit`: train; returns the exit status."""
    quiet()
    with Signals() as signals:
        cli = TandemCLI(arguments, "fit")
        assert cli.start is not None
        checkpoint = cli.start.checkpoint
        requests: dict[str, int] = getattr(cli.model, "requests", {})
        signals.write_to(requests)
        callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
        preemption = next(each for each in callbacks if isinstance(each, Preemption))
        signals.gently = lambda: preemption.training
        return run_to_its_end(
            lambda: cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint),
            cli.trainer,
            cli.start.replaced,
            cli.children,
            cli.release,
        )


def validate(arguments: Sequence[str]) -> int:
    """`tandem validate`: print the validation metrics as JSON on stdout; returns the exit status."""
    quiet()
    # Validation needs none of the callbacks whose state a checkpoint holds.
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    cli = TandemCLI(arguments, "validate")
    checkpoint = None if cli.config.weights is None else str(resolve(cli.config.weights))
    # DeepSpeed prints; stdout is for the metrics alone.
    with contextlib.redirect_stdout(sys.stderr):
        results = cli.trainer.validate(
            cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False
        )
    if cli.trainer.is_global_zero:
        print(json.dumps({key: value for result in results for key, value in result.items()}, indent=2))
    leave_together()
    return 0


if __name__ == "__main__":
    from launch.cli import main

    sys.exit(main(["fit", *sys.argv[1:]], ends=True))
