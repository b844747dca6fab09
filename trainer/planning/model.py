"""Policy and reference of a run, built by the code that trains them, of shapes alone."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

# PyTorch's fake tensors (documented under torch.compiler, stable since 2.1): every operator is asked for the shapes
# of its results and computes nothing. Unlike meta tensors they have a device, so that the kernels are those of one.
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from trainer.planning.shards import Weight
from trainer.policy.adapters import POLICY, REFERENCE, attach, attach_frozen
from trainer.policy.base import PolicyConfig, empty_base
from trainer.policy.folders import is_adapter, resolve
from trainer.policy.load import read_peft_config
from trainer.policy.reference import Reference, ReferenceConfig
from trainer.schema import UserError


@dataclasses.dataclass
class Models:
    """A policy and its reference (None: SFT has none), made of fake tensors of `fake`."""

    policy: Any
    reference: Reference | None
    fake: FakeTensorMode

    def weights(self) -> dict[str, list[Weight]]:
        """The parameters of `policy` and `reference`, each once, in the order in which modules have them."""
        seen: set[int] = set()
        found: dict[str, list[Weight]] = {"policy": [], "reference": []}
        for name, model in self.named():
            for parameter in model.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[name].append(
                        Weight(parameter.numel(), parameter.element_size(), parameter.requires_grad)
                    )
        return found

    def named(self) -> list[tuple[str, nn.Module]]:
        """The models that hold parameters of their own."""
        copied = self.reference is not None and self.reference.model is not None
        return [
            ("policy", self.policy),
            *([("reference", self.reference.model)] if copied else []),  # type: ignore[union-attr,list-item]
        ]

    def buffer_bytes(self) -> int:
        """Bytes of what is neither trained nor sharded: rotary frequencies, masks."""
        return sum(b.numel() * b.element_size() for _, model in self.named() for b in model.buffers())


def build_models(shape: PretrainedConfig, policy: PolicyConfig, reference: ReferenceConfig | None) -> Models:
    """Build what `load_policy` and `build_reference` would, without reading a weight.

    A `policy.start` that is not there yet is taken for an adapter as `policy.adapter` describes it.

    Raises:
        UserError: the adapter does not fit, or a shared reference for a policy whose base is trained.
    """
    trained = _policy(shape, policy).train()
    if policy.adapter is None:
        trained.requires_grad_(True)
    if policy.gradient_checkpointing:
        # Generators have no state to keep here, where nothing is random.
        kwargs = {"use_reentrant": False, "preserve_rng_state": False}
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    live = reference is not None and reference.kind != "cached"
    frozen = _reference(shape, policy, reference, trained) if live else None  # type: ignore[arg-type]
    fake, known = FakeTensorMode(), dict[int, Tensor]()
    models = Models(trained, frozen, fake)
    for _, model in models.named():
        _to_fake(model, fake, known)
    return models


def _policy(shape: PretrainedConfig, config: PolicyConfig) -> Any:
    base = empty_base(config, copy.deepcopy(shape))
    if config.adapter is None:
        return base
    with torch.device("meta"):
        return attach(base, config.adapter, _structure(config))


def _structure(config: PolicyConfig) -> PeftConfig | None:
    """The saved adapter's shape, where the config leaves it to it and it is there."""
    assert config.adapter is not None
    if config.start is None or not config.adapter.unset or not Path(config.start).exists():
        return None
    start = resolve(config.start)
    if not is_adapter(start):
        return None
    saved = read_peft_config(start)
    saved.base_model_name_or_path, saved.inference_mode = None, False
    return saved


def _reference(
    shape: PretrainedConfig, policy: PolicyConfig, config: ReferenceConfig, trained: Any
) -> Reference:
    start = policy.start if config.adapter == "start" else config.adapter
    made_of = dataclasses.replace(policy, start=start, adapter=policy.adapter if start else None)
    if config.kind == "sharded":
        model = _policy(shape, made_of).requires_grad_(False).eval()
        return Reference(model, config, {}).eval()
    if not isinstance(trained, PeftModel):
        raise UserError(
            "reference.kind: 'shared' needs a frozen base, but policy.adapter is null, so every weight is "
            "trained; set reference.kind: sharded"
        )
    if start is None:
        return Reference(trained, config, {}).eval()
    with torch.device("meta"):
        attach_frozen(trained, copy.deepcopy(trained.peft_config[POLICY]))
    return Reference(trained, config, {}, REFERENCE).eval()


def _to_fake(model: nn.Module, fake: FakeTensorMode, known: dict[int, Tensor]) -> None:
    """Every parameter and buffer as a fake tensor on the CPU; tied ones stay tied.

    On the meta device `scaled_dot_product_attention` would take the way that keeps the whole matrix of weights.
    """
    with fake:
        for module in model.modules():
            places: tuple[Any, ...] = (module._parameters, module._buffers)
            for tensors in places:
                for name, old in tensors.items():
                    if old is not None:
                        tensors[name] = known.setdefault(id(old), _fake(old))


def _fake(old: Tensor) -> Any:
    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
