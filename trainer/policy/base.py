"""The base model by name (a folder, or an id on the hub), its tokenizer, and which weights they are."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainer.policy import attention, sharded
from trainer.policy.adapters import AdapterConfig, first_line
from trainer.policy.folders import is_adapter
from trainer.provenance import sha256_file, sha256_text
from trainer.schema import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The model that is trained (or used).

    Args:
        base: folder of a Hugging Face causal language model, or its id on the hub (asks for the network).
        adapter: what is trained beside the frozen base; null trains all weights.
        start: saved weights to begin with: an adapter's folder, a checkpoint, a run's folder (its best), or a
            `.pth` file of the published system. If only the adapter's kind is set, its shape is taken from
            here.
        dtype: of the base's weights; adapters are always float32.
        revision: commit, tag or branch on the hub.
        offline: refuse to use the network.
        trust_remote_code: run Python code that comes with the model.
        attention: attention implementation of transformers (`sdpa`, `eager`, ...); if not given, tandem's own, which
            knows packed rows.
        gradient_checkpointing: compute activations a second time in the backward pass instead of keeping them.
        compile: compile the policy's layers with torch.compile (minutes at the first steps; for GPUs, not under zero3).
    """

    base: str
    adapter: AdapterConfig | None = dataclasses.field(default_factory=AdapterConfig)
    start: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str | None = None
    offline: bool = False
    trust_remote_code: bool = False
    attention: str | None = None
    gradient_checkpointing: bool = False
    compile: bool = False


def load_base(config: PolicyConfig, source: Path | None = None) -> PreTrainedModel:
    """The base alone, from safetensors, without dropout; from the folder `source` if that is given."""
    name = str(source or config.base)
    check_name(name, config.offline, "policy.base")
    if config.trust_remote_code:
        warnings.warn(
            f"policy.trust_remote_code: Python code that comes with '{name}' runs on this machine",
            stacklevel=2,
        )
    settings = read_config(name, config)
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(
            f"policy.base: '{name}' is quantized, which is not supported; give its 16- or 32-bit weights"
        )
    _without_dropout(settings)
    implementation = _attention(config, settings)
    try:
        if sharded.active():
            folder = _local_folder(name, config.revision)
            model = sharded.load_sharded(
                folder, settings, _DTYPES[config.dtype], implementation, config.trust_remote_code
            )
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=settings,
                dtype=_DTYPES[config.dtype],
                use_safetensors=True,
                attn_implementation=implementation,
                output_loading_info=True,
                **_hub_settings(name, config.revision, config.trust_remote_code),
            )
            model, info = loaded
            sharded.refuse_missing(model, info)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"policy.base: '{name}' cannot be loaded ({first_line(error)})") from error
    _without_dropout(model)
    return model


def empty_base(config: PolicyConfig, settings: PretrainedConfig) -> PreTrainedModel:
    """What `load_base` gives for a model of these settings, on the meta device: shapes and no weights."""
    _without_dropout(settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings,
            dtype=_DTYPES[config.dtype],
            attn_implementation=_attention(config, settings),
            trust_remote_code=config.trust_remote_code,
        )
    _without_dropout(model)
    return model


def _attention(config: PolicyConfig, settings: PretrainedConfig) -> str | None:
    """Our own attention where it is known to compute what the model means; others keep what they have."""
    if config.attention is not None:
        return config.attention
    if settings.model_type in attention.FAMILIES:
        return attention.NAME
    try:
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    except KeyError:
        return None  # a model that comes with its own code
    table = getattr(known, "_supports_attention_backend", False) and getattr(known, "_supports_sdpa", False)
    return attention.NAME if table and attention.is_plain(settings) else None


def _hub_settings(name: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What transformers is told beside the name, once `check_name` has passed: for the hub, one commit."""
    commit = "main" if _is_folder(name) else hub_commit(name, revision)
    return {"revision": commit, "trust_remote_code": trust_remote_code}


def _local_folder(name: str, revision: str | None) -> Path:
    """Where the weights lie: the folder itself, or the hub's files of one commit, fetched if they are not there."""
    if _is_folder(name):
        return Path(name).expanduser()
    patterns = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
    return Path(snapshot_download(name, revision=hub_commit(name, revision), allow_patterns=patterns))


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


@functools.cache
def hub_commit(name: str, revision: str | None) -> str:
    """The commit that a hub revision names, asked for once: weights, tokenizer and manifest agree on it.

    Raises:
        UserError: the hub cannot be reached, or has no such model.
    """
    try:
        path = Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"policy.base: '{name}' cannot be reached on the hub ({first_line(error)})"
        ) from error
    return path.parent.name  # the hub's cache is laid out as snapshots/<commit>/<file>


def read_config(name: str, config: PolicyConfig) -> PretrainedConfig:
    check_name(name, config.offline, "policy.base")
    settings = _hub_settings(name, config.revision, config.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"policy.base: '{name}' is no causal language model here ({first_line(error)})"
        ) from error


def _without_dropout(target: PretrainedConfig | nn.Module) -> None:
    """Log-probs of the policy and of its reference must be those of one model (GPT-2's default is 0.1)."""
    if isinstance(target, nn.Module):
        for module in target.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return
    for name, value in target.to_dict().items():
        if name.endswith(("dropout", "pdrop", "dropout_rate", "dropout_prob")) and isinstance(value, float):
            setattr(target, name, 0.0)


def architecture(config: PretrainedConfig) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(config, name, None) for name in names}


def check_name(name: str, offline: bool, field: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = "; it is an adapter, give it as policy.start" if is_adapter(folder) else ""
            raise UserError(f"{field}: {name} holds no config.json, so it is no Hugging Face model{hint}")
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise UserError(f"{field}: {name} holds only pickled weights (.bin); convert them to safetensors")
        return
    if name.startswith(("/", ".", "~")) or (name.count("/") != 1 and "/" in name) or folder.exists():
        raise UserError(
            f"{field}: {name} is no folder; give the folder of a Hugging Face model, or its id on the hub"
        )
    if offline:
        raise UserError(
            f"{field}: '{name}' is no folder here, and a hub id needs the network, which --offline refuses"
        )


def load_tokenizer(
    base: str, revision: str | None = None, offline: bool = False, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The base's tokenizer. Where it has no pad token EOS pads, so that the vocabulary stays as it is."""
    check_name(base, offline, "policy.base")
    settings = _hub_settings(base, revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"policy.base: '{base}' has no tokenizer that can be loaded ({first_line(error)})"
        ) from error
    if not has_words(tokenizer):
        raise UserError(f"policy.base: '{base}' has no tokenizer; put its tokenizer.json there")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"policy.base: the tokenizer of '{base}' has no EOS token; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer knows more than its special tokens: transformers makes one without files, too."""
    return bool(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))


def base_fingerprint(base: str, revision: str | None = None, offline: bool = False) -> dict[str, Any]:
    """Which weights `base` names: SHA-256 of a folder's weight files, each and all, or the hub's commit."""
    check_name(base, offline, "policy.base")
    if not _is_folder(base):
        return {"name": base, "kind": "hub", "digest": hub_commit(base, revision), "revision": revision}
    files = {
        p.name: _hashed(p, p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(Path(base).expanduser().glob("*.safetensors"))
    }
    digest = sha256_text(*(part for item in files.items() for part in item))
    return {"name": base, "kind": "folder", "digest": digest, "files": files}


@functools.lru_cache(maxsize=256)
def _hashed(path: Path, modified: int, size: int) -> str:
    return sha256_file(path)
