"""Adapters: which activations IA³ scales in each family of models, LoRA, and the layer that applies the
scales.

IA³: Liu et al., 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", https://arxiv.org/abs/2205.05638, section 3.3: learned vectors rescale keys, values and inner
feed-forward activations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ia3.layer import Linear as PeftIA3Linear
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.policy.scales import Act, gated_scaled, scaled
from trainer.schema import UserError

POLICY = "default"
"""PEFT's name for the adapter that is trained."""

REFERENCE = "reference"
"""PEFT's name for the frozen adapter that a shared reference switches in."""

LORA_R, LORA_ALPHA = 16, 32
"""LoRA's rank and the numerator of its factor, where none are given."""

_GATED = ("k_proj", "v_proj", "down_proj")
_PAPER = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _GATED),
    "gpt2": ("c_attn", "mlp.c_proj"),
}
# Feed-forward blocks of transformers 5 whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing else.
_GATED_BLOCKS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP")
_FEEDFORWARD = ("down_proj", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside the frozen base.

    Args:
        kind: `ia3` (learned scales) or `lora` (low-rank updates).
        preset: for ia3, what is scaled. `peft` (default): what PEFT scales in this family. `paper`: keys,
            values and feed-forward, never queries, also where GPT-2 fuses the three.
        r: for lora, the rank (16 if not given).
        alpha: for lora, the numerator of the update's factor alpha / r (32 if not given).
        dropout: for lora, dropout on the adapter's input while training (0 if not given).
        targets: names of the modules to adapt, instead of a preset.
    """

    kind: Literal["ia3", "lora"] = "ia3"
    preset: Literal["peft", "paper"] | None = None
    r: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.kind == "lora" and self.preset is not None:
            raise UserError(
                f"adapter.preset: '{self.preset}' has no effect with kind 'lora'; leave it out or set targets"
            )
        for name in ("r", "alpha", "dropout"):
            if self.kind == "ia3" and (value := getattr(self, name)) is not None:
                raise UserError(
                    f"adapter.{name}: {value} has no effect with kind 'ia3'; leave it out, or set kind: lora"
                )
        if self.targets is not None and self.preset is not None:
            raise UserError(
                f"adapter.preset: '{self.preset}' has no effect beside targets; give one of the two"
            )
        if self.targets == []:
            raise UserError("adapter.targets: is empty; name at least one module, or leave it out")
        if self.r is not None and self.r < 1:
            raise UserError(f"adapter.r: {self.r} is not a rank; give 1 or more")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout: {self.dropout} is not in [0, 1)")

    @property
    def unset(self) -> bool:
        """Whether only the kind is given, so that a saved adapter may say the rest."""
        return self == AdapterConfig(kind=self.kind)


class ScaledLinear(PeftIA3Linear):
    """PEFT's IA³ layer, with two things that it lacks; saved and loaded tensors are PEFT's own.

    The first outputs can be left out: an adapter's vector that is shorter than the layer scales the last
    outputs only (keys and values, not the queries of GPT-2's `c_attn`). In state dicts it is whole, with
    ones in front.

    A bfloat16 product is rounded with noise instead of to the nearest. Rounded to the nearest, `x * 1.001`
    is `x` again for *every* bfloat16 x, so that scales near 1 would have no effect until they have moved by
    0.002 or more.
    """

    def vector(self, adapter: str) -> Tensor:
        """The adapter's scales for all of the layer's scaled features, shape (features,)."""
        scales = self.ia3_l[adapter].flatten()
        # Ones in front would hide that a sharded vector was not gathered.
        assert len(scales), "the scales are not on this rank"
        return whole(scales, self.in_features if self.is_feedforward else self.out_features)

    def forward(
        self, x: Tensor, *args: Any, gated: tuple[Tensor, Act] | None = None, **kwargs: Any
    ) -> Tensor:
        """The layer of x; with `gated` = (up, act), of act(x) * up."""
        names = [name for name in self.active_adapters if name in self.ia3_l]
        if self.disable_adapters or self.merged or not names:
            return super().forward(x if gated is None else gated[1](x) * gated[0], *args, **kwargs)
        scale = self.vector(names[0])
        for name in names[1:]:
            scale = scale * self.vector(name)
        if gated is not None:
            return self.base_layer(gated_scaled(x, gated[0], scale, gated[1]), *args, **kwargs)
        if self.is_feedforward:
            return self.base_layer(scaled(x, scale), *args, **kwargs)
        return scaled(self.base_layer(x, *args, **kwargs), scale)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with self._whole_scales():
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        with self._whole_scales():
            super().unmerge()

    @contextlib.contextmanager
    def _whole_scales(self) -> Iterator[None]:
        """PEFT multiplies weights by vectors of full length."""
        own = dict(self.ia3_l.items())
        try:
            for name, parameter in own.items():
                shape = parameter.shape if self.is_feedforward else (self.out_features, 1)
                self.ia3_l[name] = nn.Parameter(self.vector(name).detach().view(shape), requires_grad=False)
            yield
        finally:
            for name, parameter in own.items():
                self.ia3_l[name] = parameter


def whole(vector: Tensor, features: int) -> Tensor:
    """The vector with ones in front, up to `features`: what is left out is scaled by 1."""
    left_out = features - len(vector)
    return torch.cat([vector.new_ones(left_out), vector]) if left_out else vector


def peft_config(config: AdapterConfig, model: PreTrainedModel) -> PeftConfig:
    """PEFT's config of an adapter for this model.

    Raises:
        UserError: the preset does not know this family of models.
    """
    family = model.config.model_type
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "fan_in_fan_out": family == "gpt2"}
    if config.kind == "lora":
        lora: dict[str, Any] = {
            "r": config.r or LORA_R,
            "lora_alpha": config.alpha or LORA_ALPHA,
            "lora_dropout": config.dropout or 0.0,
        }
        return LoraConfig(target_modules=config.targets, **lora, **common)
    targets = config.targets
    if config.preset == "paper":
        if family not in _PAPER:
            raise UserError(
                f"adapter.preset: 'paper' is not known for '{family}' models; set adapter.targets instead"
            )
        targets = list(_PAPER[family])
    if targets is None:
        return IA3Config(**common)
    feedforward = [name for name in targets if name.endswith(_FEEDFORWARD)]
    return IA3Config(target_modules=targets, feedforward_modules=feedforward, **common)


def attach(model: PreTrainedModel, config: AdapterConfig, structure: PeftConfig | None = None) -> PeftModel:
    """Put a fresh trainable adapter on the model (float32, the base frozen); it changes no output yet.

    Args:
        structure: the PEFT config of a saved adapter, to take its shape instead of the config's.
    """
    try:
        policy = get_peft_model(model, structure or peft_config(config, model), adapter_name=POLICY)
    except ValueError as error:
        raise UserError(
            f"adapter: does not fit {model.config.model_type} models ({first_line(error)})"
        ) from error
    _use_scaled_layers(policy)
    if config.preset == "paper" and model.config.model_type == "gpt2":
        for layer in _layers(policy):
            if not layer.is_feedforward:
                _leave_out(layer, POLICY, layer.out_features // 3)
    return policy


def attach_frozen(policy: PeftModel, structure: PeftConfig, adapter: str = REFERENCE) -> None:
    """Add a second, frozen adapter beside the policy's, which stays the active one.

    Raises:
        UserError: PEFT cannot hold both kinds in one model.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    structure.inference_mode = True
    try:
        policy.add_adapter(adapter, structure)
    except ValueError as error:
        raise UserError(
            f"reference.adapter: cannot share the policy's base ({first_line(error)}); "
            "set reference.kind: sharded"
        ) from error
    _use_scaled_layers(policy)
    # PEFT 0.21 makes the new adapter the active one in layers that had none before.
    policy.set_adapter(POLICY)
    policy.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def _use_scaled_layers(policy: PeftModel) -> None:
    # PEFT's IA³ has no way to register a layer class of one's own (its LoRA has); the instances change class
    # instead.
    for module in policy.modules():
        if type(module) is PeftIA3Linear:
            module.__class__ = ScaledLinear
            module.register_state_dict_post_hook(_widen)
            module.register_load_state_dict_pre_hook(_narrow)
    for module in policy.modules():
        if type(module).__name__ in _GATED_BLOCKS and isinstance(module.down_proj, ScaledLinear):
            module.forward = types.MethodType(_gated_block, module)


def _gated_block(block: Any, x: Tensor) -> Tensor:
    """transformers' `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, with the product left to the scaled layer."""
    if not isinstance(block.down_proj, ScaledLinear):  # merged and unloaded
        result: Tensor = type(block).forward(block, x)
        return result
    return block.down_proj(block.gate_proj(x), gated=(block.up_proj(x), block.act_fn))


def _layers(policy: nn.Module) -> list[ScaledLinear]:
    return [module for module in policy.modules() if isinstance(module, ScaledLinear)]


def _leave_out(layer: ScaledLinear, adapter: str, outputs: int) -> None:
    """Leave the first outputs out: they have no parameters, so that no optimizer can move them."""
    old = layer.ia3_l[adapter]
    ones = torch.ones((layer.out_features - outputs, 1), dtype=old.dtype, device=old.device)
    layer.ia3_l[adapter] = nn.Parameter(ones)


def whole_sizes(policy: nn.Module) -> dict[str, int]:
    """Parameter name -> length of the whole vector, for IA³ vectors that leave outputs out."""
    return {
        f"{name}.ia3_l.{adapter}": module.out_features
        for name, module in policy.named_modules()
        if isinstance(module, ScaledLinear) and not module.is_feedforward
        for adapter, parameter in module.ia3_l.items()
        if getattr(parameter, "ds_numel", parameter.numel()) != module.out_features
    }


def narrowed(name: str, tensor: Tensor, size: int) -> Tensor:
    """The last `size` scales of a saved vector, shape (size, 1); `UserError` if those in front are not 1."""
    vector = tensor.flatten()
    left_out = len(vector) - size
    if left_out > 0 and not bool((vector[:left_out] == 1).all()):
        raise UserError(
            f"{name}: scales queries too, which preset 'paper' does not; set adapter.preset: peft"
        )
    return vector[max(left_out, 0) :].view(-1, 1)


def _widen(module: IA3Layer, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for adapter in module.ia3_l:
        tensor = state.get(key := f"{prefix}ia3_l.{adapter}")
        # Under ZeRO-3 a rank's tensor may be empty; the whole one is asked for by name then.
        if not module.is_feedforward and tensor is not None and 0 < tensor.numel() < module.out_features:
            state[key] = whole(tensor.flatten(), module.out_features).view(-1, 1)


def _narrow(module: IA3Layer, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for adapter, parameter in module.ia3_l.items():
        tensor = state.get(key := f"{prefix}ia3_l.{adapter}")
        if not module.is_feedforward and tensor is not None and 0 < parameter.numel() < tensor.numel():
            state[key] = narrowed(key, tensor, parameter.numel())


def first_line(error: BaseException) -> str:
    """What a library's error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
