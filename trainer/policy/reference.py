"""The frozen reference behind one interface: the policy's own base (`shared`), or a copy (`sharded`)."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from trainer.policy.adapters import POLICY, REFERENCE, attach_frozen, peft_config
from trainer.policy.folders import is_adapter, resolve
from trainer.policy.load import (
    PolicyConfig,
    fill_adapter,
    fingerprint,
    load_frozen,
    read_peft_config,
    saved_policy,
)
from trainer.policy.logprobs import pair_logps
from trainer.schema import PairLogps, PreferenceBatch, UserError


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """What the policy is compared with.

    Args:
        kind: `shared` uses the policy's own frozen base (half the memory); `sharded` holds a frozen copy of
            its own, which ZeRO-3 spreads over the ranks like the policy.
        adapter: `start`: as the policy was at its start (the bare base if it has none). A path: that saved
            adapter. null: the bare base.
    """

    kind: Literal["shared", "sharded"] = "shared"
    adapter: str | None = "start"


class Reference(nn.Module):
    """A model that never moves. Build it with `build_reference`.

    Args:
        model: the frozen copy, or the policy whose base is shared.
        config: what was asked for.
        origin: which weights it is made of, for the manifest.
        adapter: shared only: the frozen adapter to switch in; None switches the policy's adapter off.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        config: ReferenceConfig,
        origin: dict[str, Any],
        adapter: str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.origin, self.adapter = config, origin, adapter
        # A shared model is the policy's: held in a tuple, so that its parameters are not counted or saved
        # twice.
        self.model = model if config.kind == "sharded" else None
        self._shared = (model,)

    @override
    def train(self, mode: bool = True) -> Reference:
        """The reference stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """The pairs' log-probabilities (sums in nats, and token counts) under the reference; no gradient."""
        with self.applied() as model:
            return pair_logps(model, batch)

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model as the reference: inside, it answers as the reference does; after, it is the policy
        again.

        Which parameters are trainable, the active adapter and every module's mode are as before on leaving.
        """
        if self.model is not None:
            yield self.model
            return
        policy: Any = self._shared[0]
        # PEFT 0.21 changes requires_grad as it switches, and makes the adapter that it switches to trainable.
        trainable = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
        training = [module for module in policy.modules() if module.training]
        try:
            policy.eval()
            with self._switched(policy):
                yield policy
        finally:
            for parameter in policy.parameters():
                parameter.requires_grad_(id(parameter) in trainable)
            for module in training:
                module.training = True

    @contextlib.contextmanager
    def _switched(self, policy: PeftModel) -> Iterator[None]:
        if self.adapter is None:
            with policy.disable_adapter():
                yield
            return
        try:
            policy.set_adapter(self.adapter, inference_mode=True)
            yield
        finally:
            policy.set_adapter(POLICY)

    def fingerprint(self) -> str:
        """SHA-256 over all tensors that the reference reads; under ZeRO-3 over this rank's own shards."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        (model,) = self._shared
        skipped = {POLICY, REFERENCE} - {self.adapter} if self.model is None else set()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not skipped & set(name.split(".")):
                # DeepSpeed keeps a rank's shard in `ds_tensor` and leaves the parameter empty.
                yield name, getattr(tensor, "ds_tensor", tensor)

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of the reference: kind, adapter, and which weights it is made of."""
        return {**dataclasses.asdict(self.config), **self.origin}


def build_reference(config: ReferenceConfig, policy_config: PolicyConfig, policy: nn.Module) -> Reference:
    """The reference for a policy that stands at its start.

    Raises:
        UserError: a shared reference for a policy whose base is trained, or an adapter that does not fit.
    """
    made_of = _made_of(config, policy_config)
    origin = {"fingerprint": fingerprint(made_of)}
    if config.kind == "sharded":
        return Reference(load_frozen(made_of), config, origin).eval()
    if not isinstance(policy, PeftModel):
        raise UserError(
            "reference.kind: 'shared' needs a frozen base, but policy.adapter is null, so every weight is "
            "trained; set reference.kind: sharded"
        )
    if made_of.start is None:
        return Reference(policy, config, origin).eval()
    _share_adapter(policy, made_of)
    return Reference(policy, config, origin, REFERENCE).eval()


def _made_of(config: ReferenceConfig, policy: PolicyConfig) -> PolicyConfig:
    """The settings of a policy that is the reference."""
    if config.adapter == "start":
        # Without a start a fresh adapter changes nothing: the bare base is the same and costs less.
        return policy if policy.start else dataclasses.replace(policy, adapter=None)
    if config.adapter is None:
        return dataclasses.replace(policy, adapter=None, start=None)
    path = resolve(config.adapter)
    if path.is_file():
        if policy.adapter is None:
            raise UserError(f"reference.adapter: {path} needs policy.adapter to say which adapter it holds")
        return dataclasses.replace(policy, start=str(path))
    saved = saved_policy(path, policy.base)
    return dataclasses.replace(policy, adapter=saved.adapter, start=saved.start)


def _share_adapter(policy: PeftModel, made_of: PolicyConfig) -> None:
    assert made_of.start is not None
    path = resolve(made_of.start)
    if path.is_dir() and not is_adapter(path):
        raise UserError(
            f"reference.adapter: {path} holds all weights, no adapter; set reference.kind: sharded"
        )
    structure = _structure(policy, made_of, path)
    attach_frozen(policy, structure)
    fill_adapter(policy, path, REFERENCE, made_of)


def _structure(policy: PeftModel, made_of: PolicyConfig, path: Path) -> Any:
    assert made_of.adapter is not None
    if path.is_file():
        return peft_config(made_of.adapter, cast(PreTrainedModel, policy.get_base_model()))
    return read_peft_config(path)
