"""Lightning's checkpoints as folders: what is trained, for PEFT or transformers, and what resumes a run."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from trainer.checkpoint.randomness import rng_state, set_rng_state
from trainer.checkpoint.tree import decode, encode
from trainer.policy.base import load_tokenizer
from trainer.policy.folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    WEIGHTS,
    remove,
    resolve,
    verify,
    whole_folder,
    write_manifest,
)
from trainer.policy.state import file_names
from trainer.provenance import read_json, versions, write_json
from trainer.schema import UserError

STATE, TENSORS = "resume/state.json", "resume/tensors.safetensors"


class PortableCheckpointIO(CheckpointIO):
    """A checkpoint is a folder, whole or not there, of safetensors and JSON, with a manifest of hashes.

    The module's `on_save_checkpoint` must set `checkpoint["state_dict"]` to the trained tensors only and
    `checkpoint["tandem"]` to `describe_for_checkpoint(policy, config)` with a `prompt_template` if any.
    `checkpoint["rng"]` is a list with each rank's `rng_state()`; without it this process's own is stored.

    Args:
        guard: called right before a folder is renamed into place; raises if this process may not write any more.
    """

    def __init__(self, guard: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.guard = guard

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the folder `path`.

        Raises:
            OSError: naming `path`, if it cannot be written (a full disk); what was there before is untouched.
            UserError: naming the key of a state that has no safe form.
        """
        if storage_options is not None:
            raise UserError("storage_options: has no effect on tandem's checkpoints; leave it out")
        if "tandem" not in checkpoint:
            raise UserError(
                "checkpoint: lacks 'tandem', which the module's on_save_checkpoint should have set"
            )
        checkpoint = {"rng": [rng_state()], **checkpoint}
        about, state_dict = checkpoint["tandem"], checkpoint.pop("state_dict")
        names = file_names(list(state_dict), about.get("adapter_config"))
        tensors: dict[str, Tensor] = {}
        state = {
            "names": {file: name for name, file in names.items()},
            "checkpoint": encode(checkpoint, tensors),
        }
        with whole_folder(Path(path), self.guard) as folder:
            (folder / "resume").mkdir()
            _write_weights(folder, {names[name]: tensor for name, tensor in state_dict.items()}, about)
            _write_tensors(folder / TENSORS, tensors)
            write_json(folder / STATE, state)
            write_manifest(folder, _manifest(checkpoint))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's dict again, from a checkpoint, a folder of checkpoints or a run's folder, every file
        verified.

        This rank's random number generators are put back, too. Sooner or later draws happen before the first
        step (of a data loader's seed, for one): a module that wants the same numbers again calls
        `set_rng_state(checkpoint["rng"][rank])` once more there.

        Raises:
            UserError: naming the file that is missing or damaged.
        """
        folder = resolve(path)
        if folder.is_file():
            raise UserError(
                f"{path}: is a file; a checkpoint to resume from is a folder (a .pth can be policy.start)"
            )
        verify(folder)
        if not (folder / STATE).is_file():
            raise UserError(
                f"{folder / STATE}: missing; this folder holds weights only, give it as policy.start"
            )
        state = read_json(folder / STATE)
        checkpoint = decode(state["checkpoint"], _load(folder / TENSORS))
        weights = _load(folder / (ADAPTER if checkpoint["tandem"].get("adapter_config") else WEIGHTS))
        checkpoint["state_dict"] = {state["names"][file]: tensor for file, tensor in weights.items()}
        ranks, rank = checkpoint["rng"], int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        if rank < len(ranks):
            set_rng_state(ranks[rank])
        return checkpoint

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove the folder, so that no half of it is ever seen under its name."""
        if Path(path).exists():
            remove(Path(path))


def _manifest(checkpoint: dict[str, Any]) -> dict[str, Any]:
    about = checkpoint["tandem"]
    said = ("adapter", "base", "prompt_template", "config")
    return {
        "kind": "adapter" if about.get("adapter_config") else "weights",
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        **{key: about.get(key) for key in said},
        "versions": versions(),
    }


def _write_weights(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """The part that PEFT or transformers loads without tandem."""
    if about.get("adapter_config"):
        _write_tensors(folder / ADAPTER, tensors)
        write_json(folder / ADAPTER_CONFIG, about["adapter_config"])
        return
    _write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", about["model_config"])
    policy = about["config"]["policy"]
    chosen = (policy["base"], policy["revision"], policy["offline"], policy["trust_remote_code"])
    load_tokenizer(*chosen).save_pretrained(folder)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors 0.8 tells the system's error number in its message only.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}); use another checkpoint") from error
