"""A reward that is a sequence classifier of transformers: the logit (or probability) of one of its labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from trainer.policy.adapters import first_line
from trainer.policy.base import base_fingerprint, check_name, has_words, hub_commit
from trainer.policy.devices import check_device, device_named
from trainer.rewards import Reward
from trainer.schema import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DIGITS = 5
"""Decimals of a score: batches of other sizes differ by rounding beyond them, and equal texts have to tie."""


class ClassifierReward(Reward):
    """Scores `prompt + completion` by one label of a sequence classifier; texts of like length share a forward.

    Nothing is loaded before the first text is scored (or `describe` is asked). A text that is too long loses its
    beginning, since the completion stands at its end.

    Args:
        model: folder of a sequence classifier, or its id on the hub (asks for the network).
        label: the label whose score it is, by name or index; by default POSITIVE, or else the last one.
        output: the label's `logit`, which keeps telling good texts apart where the `probability` is nearly 1.
        batch_size: texts in one forward.
        max_length: tokens of a text, special ones among them; by default what the classifier has positions for.
        dtype: of the weights; scores do not depend on the batch in float32 only.
        device: cpu, cuda, ...; by default cuda where there is one.
        revision: commit, tag or branch on the hub.
        offline: refuse to use the network.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: a setting that cannot work; when first used: no such model, or it has no such label.
    """

    def __init__(
        self,
        model: str = "lvwerra/distilbert-imdb",
        label: str | int | None = None,
        output: Literal["logit", "probability"] = "logit",
        batch_size: int = 64,
        max_length: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        if output not in ("logit", "probability"):
            raise UserError(f"ClassifierReward.output: {output!r}; it should be logit or probability")
        if dtype not in _DTYPES:
            raise UserError(f"ClassifierReward.dtype: {dtype!r}; it should be float32 or bfloat16")
        if batch_size < 1:
            raise UserError(f"ClassifierReward.batch_size: {batch_size} is not possible; give 1 or more")
        if max_length is not None and max_length < 3:
            raise UserError(f"ClassifierReward.max_length: {max_length} is not possible; give 3 or more")
        # Only the name: shards that were made on a GPU may be merged where there is none.
        check_device(device, "ClassifierReward.device:")
        self.model, self.label, self.output, self.batch_size = model, label, output, batch_size
        self.max_length, self.dtype, self.device = max_length, dtype, device
        self.revision, self.offline, self.trust_remote_code = revision, offline, trust_remote_code

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The score of each prompt with its completion, in the order given, rounded to five decimals.

        Raises `UserError` for a text without tokens and for a score that is not finite.
        """
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if not texts:
            return []
        loaded = self._loaded
        ids = loaded.encode(texts)
        scores = [0.0] * len(texts)
        for batch in _batches(ids, self.batch_size):
            found = self._score(loaded, [ids[index] for index in batch])
            for index, score in zip(batch, found.tolist(), strict=True):
                if not math.isfinite(score):
                    raise UserError(f"{self.model}: the score of {texts[index][:60]!r} is {score}")
                scores[index] = round(score, _DIGITS)
        return scores

    def describe(self) -> dict[str, Any]:
        """All that scores follow from, whatever the folder is called: weights (SHA-256, or the hub's commit), label."""
        config = self._config
        return {
            "class": type(self).__qualname__,
            "weights": base_fingerprint(self.model, self.revision, self.offline)["digest"],
            "label": _label_index(self.model, config, self.label),
            "output": self.output,
            "max_length": self.max_length,
            "dtype": self.dtype,
        }

    @torch.no_grad()
    def _score(self, loaded: _Loaded, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        ids = torch.tensor([row + [loaded.pad] * (width - len(row)) for row in rows], device=loaded.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=loaded.device)
        logits = loaded.model(input_ids=ids, attention_mask=mask).logits.float()
        if self.output == "probability":
            logits = logits.softmax(-1)
        return logits[:, loaded.label].cpu()

    @property
    def _settings(self) -> dict[str, Any]:
        check_name(self.model, self.offline, "ClassifierReward.model")
        return {"revision": self._commit, "trust_remote_code": self.trust_remote_code}

    @property
    def _commit(self) -> str:
        """The hub's commit, one for weights, tokenizer and `describe`; a folder has none."""
        if Path(self.model).expanduser().is_dir():
            return "main"
        try:
            return hub_commit(self.model, self.revision)
        except UserError as error:
            raise UserError(
                f"ClassifierReward.model: '{self.model}' is no folder, and cannot be reached on the hub"
            ) from error

    @functools.cached_property
    def _config(self) -> Any:
        try:
            config = AutoConfig.from_pretrained(self.model, **self._settings)
        except UserError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"ClassifierReward.model: '{self.model}' cannot be loaded ({first_line(error)})"
            ) from error
        if config.num_labels == 1 and self.output == "probability":
            raise UserError(
                f"ClassifierReward.output: '{self.model}' has one output, which is no probability; set it to logit"
            )
        return config

    @functools.cached_property
    def _loaded(self) -> _Loaded:
        device = device_named(self.device, "ClassifierReward.device:")
        config, settings = self._config, self._settings
        label = _label_index(self.model, config, self.label)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.model, **settings)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.model,
                config=config,
                dtype=_DTYPES[self.dtype],
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
        except UserError:
            raise
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            told = (
                "its weights have other shapes than its config.json says"
                if "ignore_mismatched_sizes" in str(error)
                else f"{type(error).__name__}: {first_line(error)}"
            )
            raise UserError(f"ClassifierReward.model: '{self.model}' cannot be loaded ({told})") from error
        # transformers fills what is missing with random numbers: a language model has no classifier.
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"ClassifierReward.model: '{self.model}' is no sequence classifier (it lacks {missing[0]})"
            )
        if not has_words(tokenizer):
            raise UserError(
                f"ClassifierReward.model: '{self.model}' has no tokenizer; put its tokenizer.json there"
            )
        rows = model.get_input_embeddings().weight.shape[0]
        if (last := max(tokenizer.get_vocab().values())) >= rows:
            raise UserError(
                f"ClassifierReward.model: '{self.model}' has {rows:,} embeddings, and its tokenizer gives ids up to"
                f" {last:,}; put the model's own tokenizer there"
            )
        encode = _Encoder(tokenizer, self)
        if model.config.pad_token_id is None:
            # The mask hides padding, but GPT-2 and its like look for the last id that is none.
            model.config.pad_token_id = encode.pad
        model = model.to(device).eval().requires_grad_(False)
        return _Loaded(model, encode, label, model.config.pad_token_id, device)


class _Loaded(NamedTuple):
    """A classifier that is there: `label` is the column of its logits."""

    model: Any
    encode: _Encoder
    label: int
    pad: int
    device: torch.device


class _Encoder:
    """Texts to ids: special tokens once, and the end of what is too long."""

    def __init__(self, tokenizer: Any, reward: ClassifierReward) -> None:
        self.tokenizer, self.name = tokenizer, reward.model
        positions = getattr(reward._config, "max_position_embeddings", None)
        # Some tokenizers say 1e30 where they know no limit.
        known = [each for each in (positions, tokenizer.model_max_length) if each and each < 1 << 30]
        if reward.max_length is not None and known and reward.max_length > min(known):
            raise UserError(
                f"ClassifierReward.max_length: {reward.max_length}, but '{reward.model}' has {min(known)}"
                " positions; give at most that"
            )
        self.limit = reward.max_length or (min(known) if known else None)
        tokenizer.truncation_side = "left"

    @property
    def pad(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(each for each in known if each is not None))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(texts, truncation=self.limit is not None, max_length=self.limit).input_ids
        for text, row in zip(texts, ids, strict=True):
            if not row:
                raise UserError(f"{self.name}: cannot score {text!r}, which has no tokens")
        return list(ids)


def _batches(ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of texts of like length."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _label_index(name: str, config: Any, label: str | int | None) -> int:
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    if label is None:
        return next((i for i, each in enumerate(labels) if each.upper() == "POSITIVE"), len(labels) - 1)
    if label in labels:
        return labels.index(str(label))
    if str(label).isdecimal() and int(label) < len(labels):
        return int(label)
    raise UserError(
        f"ClassifierReward.label: '{name}' has no label {label!r}; it has {', '.join(labels)} (0 to {len(labels) - 1})"
    )
