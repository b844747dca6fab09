"""Parameters that ZeRO-3 spreads over the ranks: loaded shard by shard, read whole, written whole.

DeepSpeed 0.19 leaves a sharded parameter empty, with its whole shape in `ds_shape` and this rank's flat, padded share
in `ds_tensor`. This room is where the policy's other files learn of that; where nothing is sharded it changes nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

_config: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("zero3", default=None)


@contextlib.contextmanager
def sharding(config: dict[str, Any]) -> Iterator[None]:
    """While this is entered, `load_base` spreads a model's parameters over the ranks by this DeepSpeed config."""
    token = _config.set(config)
    try:
        yield
    finally:
        _config.reset(token)


def active() -> bool:
    """Whether models that are loaded now are sharded."""
    return _config.get() is not None


def is_sharded(parameter: Tensor) -> bool:
    """Whether a rank holds a share of this parameter only."""
    return hasattr(parameter, "ds_id")


def read_whole(parameter: nn.Parameter) -> Tensor:
    """The whole tensor, detached. Of a sharded parameter every rank must ask, in the same order.

    What was sharded comes to the CPU: whole, all of it may be more than a GPU holds.
    """
    if not is_sharded(parameter):
        return parameter.detach()
    if hasattr(parameter, "_z3_optimizer") and parameter.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).view(parameter.ds_shape).cpu()  # type: ignore[attr-defined]
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone().cpu()


def kept(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """The tensor on rank zero, which writes checkpoints; where it was gathered, an empty one on the others."""
    return tensor if not is_sharded(parameter) or torch.distributed.get_rank() == 0 else tensor.new_empty(0)


@torch.no_grad()
def write_whole(parameter: nn.Parameter, tensor: Tensor) -> None:
    """Set a parameter from its whole tensor, which every rank gives; of a sharded one each rank keeps its share."""
    if not is_sharded(parameter):
        parameter.copy_(tensor)
        return
    from deepspeed import zero
    from deepspeed.utils import safe_set_local_fp32_param

    # Rank zero's values are kept in full where a parameter stands whole on each rank, and in secondary partitions.
    with zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(tensor)
    if hasattr(parameter, "_z3_optimizer") and parameter.requires_grad:
        safe_set_local_fp32_param(parameter, share_of(tensor, parameter))


def share_of(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's flat share, zeros behind the end, of a tensor with the parameter's whole shape."""
    size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = size * torch.distributed.get_rank()
    share = tensor.new_zeros(size)
    own = tensor.flatten()[start : start + size]
    share[: len(own)] = own
    return share


def gradient_norm_share(parameters: Sequence[nn.Parameter], ranks: int) -> Tensor:
    """What this rank adds to the squared norm of the step's gradient; the sum over ranks is the squared norm.

    Reduced gradients stand whole on each rank, and each gives its part of the same norm; sharded ones in shares.
    """
    if any(is_sharded(parameter) for parameter in parameters):
        from deepspeed.utils import safe_get_local_grad

        total: Any = 0.0
        for parameter in parameters:  # one at a time: offloaded gradients come to the GPU here
            total = total + safe_get_local_grad(parameter).double().square().sum()
        return total
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.double().square() / ranks


def drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make the optimizer's next step change nothing."""
    for parameter in parameters:
        if is_sharded(parameter):
            from deepspeed.utils import safe_set_local_grad

            # DeepSpeed 0.19 owns the step. It leaves one out, and clears its gradients, where their norm is not finite.
            safe_set_local_grad(parameter, torch.full_like(parameter.ds_tensor, torch.nan))  # type: ignore[attr-defined]
            return
        parameter.grad = None


# Loading


def load_sharded(
    folder: Path,
    settings: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model of a folder with safetensors, every parameter sharded as it is made, then filled one at a time.

    No rank holds more than one whole parameter; from the files it reads its own share, where the storage allows that.
    A checkpoint under other names than the model's parameters (mixtures of experts, for one) is left to transformers,
    which has rank zero hold it whole.
    """
    with _zero_init(dtype), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    places = _places(model, folder)
    if places is None:
        return _load_by_transformers(folder, settings, dtype, attention, trust_remote_code)
    for file in sorted({file for file, _ in places.values()}):
        with safe_open(folder / file, framework="pt") as tensors:
            for name, parameter in model.named_parameters():
                if places[name][0] == file:
                    _fill(name, parameter, tensors.get_slice(places[name][1]))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _load_by_transformers(
    folder: Path,
    settings: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    from transformers.integrations import HfDeepSpeedConfig

    config = _loading_config(dtype)
    if config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1:
        raise ValueError(
            "its files have other names than its parameters: zero3.hpz_partition_size has to be 1 for it"
        )
    # transformers 5.23 shards what it loads as long as this object lives.
    alive = HfDeepSpeedConfig(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=settings,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    finally:
        del alive
    model, info = loaded
    refuse_missing(model, info)
    return model


def refuse_missing(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """`ValueError` for a weight that the files lack, and transformers would leave random; tied ones are another's."""
    missing = sorted(set(info["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", ())))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its files lack {missing[0]}{more}, which would stay random")


@contextlib.contextmanager
def _zero_init(dtype: torch.dtype) -> Iterator[None]:
    from deepspeed import zero
    from deepspeed.utils import groups

    config = _loading_config(dtype)
    # DeepSpeed 0.19 makes the groups of secondary partitions for the first model and refuses to for the second.
    made = groups._get_zero_param_intra_parallel_group()
    again = made if config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1 else None
    # Only the device is DeepSpeed's to choose: it would round rotary frequencies to a bfloat16 base's type.
    overrides = [zero.DeepSpeedTensorOverride.device]
    with zero.Init(config_dict_or_path=config, zero_param_parallel_group=again, tensor_overrides=overrides):
        yield


def _loading_config(dtype: torch.dtype) -> dict[str, Any]:
    """The strategy's config; a model in bfloat16 is loaded under one that says so, though training is in float32."""
    config = _config.get()
    assert config is not None
    return {**config, "bf16": {"enabled": dtype == torch.bfloat16}}


def _places(model: PreTrainedModel, folder: Path) -> dict[str, tuple[str, str]] | None:
    """Parameter -> (file, name in it); None where a parameter stands under no name that is its own."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    else:
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            files = dict.fromkeys(tensors.keys(), "model.safetensors")
    # Checkpoints of the body alone (GPT-2's) lack the prefix that the model with a head has.
    prefix = f"{model.base_model_prefix}."
    places = {}
    for name, _ in model.named_parameters():
        found = next((n for n in (name, name.removeprefix(prefix)) if n in files), None)
        if found is None:
            return None
        places[name] = files[found], found
    return places


def _fill(name: str, parameter: Any, saved: Any) -> None:
    shape = tuple(saved.get_shape())
    if shape != tuple(parameter.ds_shape):
        raise ValueError(
            f"{name} has shape {list(shape)} in the file, the model's has {list(parameter.ds_shape)}"
        )
    if not shape or getattr(parameter, "ds_secondary_tensor", None) is not None:
        write_whole(parameter, saved[...].to(parameter.dtype))
        return
    with torch.no_grad():
        parameter.ds_tensor.copy_(_own_share(parameter, saved, shape).to(parameter.dtype))


def _own_share(parameter: Any, saved: Any, shape: tuple[int, ...]) -> Tensor:
    """This rank's flat share, zeros behind the end, of the rows of the file that hold it."""
    size, width = parameter.ds_tensor.ds_numel, parameter.ds_numel // shape[0]
    start = min(size * torch.distributed.get_rank(), parameter.ds_numel)
    end = min(start + size, parameter.ds_numel)
    first = start // width
    rows = saved[first : -(-end // width)].flatten()
    return nn.functional.pad(rows[start - first * width : end - first * width], (0, size - (end - start)))
