"""Batched generation whose answers do not depend on the batch: greedy, or sampled with noise keyed by prompt.

`generate` gives all answers, in the prompts' order; `answer_batches` each batch as it comes.

Sampling is the Gumbel-max trick: the argmax of scores plus Gumbel noise is a draw from their softmax
(Maddison, Tarlow and Minka 2014, "A* Sampling", section 2). The noise comes from one random stream for each
(seed, prompt key, sample), so the same prompt gets the same answer in whatever batch, order, shard or rank it
stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trainer.decoding import Decoder
from trainer.policy.sharded import is_sharded
from trainer.provenance import sha256_text
from trainer.schema import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy by default.

    `temperature`, `top_k` (keep the k likeliest tokens) and `top_p` (keep the likeliest tokens that hold this
    much probability) need `do_sample=True` and are refused without it. `seed` decides the noise. Raises
    `UserError`.
    """

    max_new_tokens: int = 100
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {self.max_new_tokens} is not possible; give 1 or more")
        if not self.do_sample and (
            self.temperature != 1.0 or self.top_k is not None or self.top_p is not None
        ):
            raise UserError("temperature, top_k and top_p have no effect without do_sample: true")
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature: {self.temperature} is not possible; give more than 0 (or do_sample: false)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} is not possible; give 1 or more, or leave it out")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p: {self.top_p} is not possible; give more than 0 and at most 1, or leave it out"
            )


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer: its token ids without the stop token, its text, and whether it stopped by itself."""

    ids: list[int]
    text: str
    finished: bool


T = TypeVar("T")
Answered = list[tuple[int, Generation]]
"""Answers, each with its prompt's number."""


class GumbelNoise(LogitsProcessor):
    """Adds to each row's scores the next Gumbel(0, 1) draws of that row's own stream.

    The streams live on the CPU, whatever the model's device, so that a GPU draws the same noise.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.streams = [np.random.Generator(np.random.SFC64(int(sha256_text(key), 16))) for key in keys]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty(scores.shape, dtype=torch.float32)
        # NumPy's draws take a fifth of the time of torch's. In double: of single ones one in ten million is zero, and a
        # vocabulary has so many tokens that one of them would win by it every few hundred steps.
        drawn = np.empty(scores.shape[-1])
        for row, stream in zip(noise, self.streams, strict=True):
            row.copy_(torch.from_numpy(stream.standard_exponential(out=drawn)))
        gumbel = noise.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()
        return scores + gumbel.to(scores.device)  # type: ignore[return-value]


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    keys: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool = False,
    continuing: bool = False,
) -> list[Generation]:
    """Answer each prompt (token ids, BOS included), in the order given.

    `keys` name the prompts for the noise and for messages; without them a prompt's ids are its key. A key
    that comes again gets another sample. The model's `generation_config` gives only its stop tokens:
    repetition penalties and sampling defaults that a hub model ships are left out, so that the answers are
    the model's own distribution. Near the model's last position an answer is shorter than `max_new_tokens`.
    Where a process group is up, every rank must call this with the same prompts: the batches are dealt out among
    the ranks, and every rank returns all answers. `continuing`: prompts are plain text, and an answer's text goes on
    where its prompt ends. Raises `UserError` for an empty prompt and for one that leaves no position for an answer.
    """
    batches = answer_batches(
        model, tokenizer, prompts, sampling, keys, batch_size, progress, continuing=continuing
    )
    found = _of_all_ranks([answer for batch in batches for answer in batch])
    return [found[index] for index in range(len(prompts))]


def answer_batches(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    keys: Sequence[str] | None = None,
    batch_size: int = 32,
    progress: bool = False,
    together: int = 1,
    continuing: bool = False,
) -> Iterator[Answered]:
    """As `generate`, a batch at a time as it comes: what a caller has kept, a kill does not take.

    A batch holds prompts of like length, not the next in the order given, so each answer has its prompt's number.
    Where a process group is up, every rank must call this with the same prompts, and gets the answers of its own
    batches alone. `together`: so many prompts in a row belong to each other (samples of one prompt, say) and come in
    one batch, on one rank; where they are more than `batch_size` their batch takes several forwards.
    """
    if keys is not None and len(keys) != len(prompts):
        raise UserError(f"generate: {len(keys)} keys for {len(prompts)} prompts; give one for each, or none")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not possible; give 1 or more")
    assert len(prompts) % together == 0
    inner = _inner(model)
    rooms = _rooms(inner, prompts, sampling.max_new_tokens, keys)
    stops = stop_ids(inner, tokenizer)
    noise_keys = _noise_keys(prompts, keys, sampling.seed)
    decode = Decoder(tokenizer, continuing)
    answering = _Answering(inner, tokenizer, decode, stops, sampling, prompts, noise_keys)
    batches = _dealt(list(_batches(prompts, rooms, batch_size, together)), even=_is_sharded(inner))
    own = sum(len(batch) for batch, _, fresh in batches if fresh)
    with tqdm(total=own, desc="generating", unit="prompt", disable=not progress) as bar:
        for batch, room, fresh in batches:
            # Between two batches the model stands as its owner left it.
            with _as_it_stands(inner):
                parts = [batch[start : start + batch_size] for start in range(0, len(batch), batch_size)]
                found = [answer for part in parts for answer in answering(part, room)]
            if fresh:
                bar.update(len(batch))
                yield found


def stop_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: those of the model's `generation_config`, and the tokenizer's EOS."""
    config = _inner(model).generation_config
    named = config.eos_token_id if config is not None else None
    found = [named] if isinstance(named, int) else list(named or [])
    if isinstance(tokenizer.eos_token_id, int):
        found.append(tokenizer.eos_token_id)
    return sorted(set(found))


def _inner(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    # The adapter's layers stand inside the base model, so that its own generate() has them.
    # PeftModel.generate would
    # put its own generation_config back.
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def _rooms(
    model: PreTrainedModel, prompts: Sequence[list[int]], wanted: int, keys: Sequence[str] | None
) -> list[int]:
    """How many new tokens each prompt may have: `wanted`, or what the model's positions leave."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rooms = []
    for index, prompt in enumerate(prompts):
        name = f"prompt {index + 1}" if keys is None else f"prompt '{keys[index]}'"
        if not prompt:
            raise UserError(f"{name}: it has no tokens; give at least one character (or a BOS token)")
        if positions is not None and len(prompt) >= positions:
            raise UserError(
                f"{name}: it has {len(prompt)} tokens, but the model has {positions} positions for prompt and"
                f" answer; shorten it to {positions - 1} tokens or less"
            )
        rooms.append(wanted if positions is None else min(wanted, positions - len(prompt)))
    return rooms


def _noise_keys(prompts: Sequence[list[int]], keys: Sequence[str] | None, seed: int) -> list[str]:
    names = list(keys) if keys is not None else [" ".join(map(str, prompt)) for prompt in prompts]
    seen: Counter[str] = Counter()
    noise_keys = []
    for name in names:
        noise_keys.append(sha256_text(str(seed), name, str(seen[name])))
        seen[name] += 1
    return noise_keys


class _Batch(NamedTuple):
    """Numbers of prompts, how many new tokens each may have, and whether no other rank answers them, too."""

    indices: list[int]
    room: int
    fresh: bool = True


def _batches(
    prompts: Sequence[list[int]], rooms: Sequence[int], batch_size: int, together: int = 1
) -> Iterator[_Batch]:
    """Prompts of like length together, and only prompts with the same room: an answer's limit is its own.

    Groups of `together` prompts (which are the same) are not parted.
    """
    firsts = range(0, len(prompts), together)
    order = sorted(firsts, key=lambda index: (-rooms[index], len(prompts[index]), index))
    groups = max(batch_size // together, 1)
    for room, members in itertools.groupby(order, key=lambda index: rooms[index]):
        alike = list(members)
        for start in range(0, len(alike), groups):
            part = alike[start : start + groups]
            yield _Batch([index for first in part for index in range(first, first + together)], room)


def _dealt(batches: list[_Batch], even: bool) -> list[_Batch]:
    """This rank's batches.

    `even`: all ranks go along in every round, so that each has as many batches, some of them a second time, and the
    batches of a round have the same room: a rank that waits for longer answers would leave the model's positions.
    """
    if not _in_group():
        return batches
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if not even:
        return of_this_rank(batches)
    own = []
    for _, members in itertools.groupby(batches, key=lambda batch: batch.room):
        group = list(members)
        group += [group[0]._replace(fresh=False)] * (-len(group) % ranks)
        own += group[rank::ranks]
    return own


def of_this_rank(items: list[T]) -> list[T]:
    """This rank's share of what is dealt out among the ranks; all of it where this is the only one."""
    if not _in_group():
        return items
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _of_all_ranks(answers: Answered) -> dict[int, Generation]:
    if not _in_group():
        return dict(answers)
    gathered: list[Answered] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, answers)
    return {index: answer for part in gathered for index, answer in part}


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_sharded(model: PreTrainedModel) -> bool:
    return any(map(is_sharded, model.parameters()))


@dataclasses.dataclass(frozen=True)
class _Answering:
    """A model with its prompts: answers those of these numbers in one forward for each token."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decode: Decoder
    stops: list[int]
    sampling: Sampling
    prompts: Sequence[list[int]]
    noise_keys: list[str]

    def __call__(self, indices: list[int], room: int) -> Answered:
        processors = _processors(self.sampling, [self.noise_keys[index] for index in indices])
        rows = [self.prompts[index] for index in indices]
        pad = _pad_id(self.tokenizer, self.stops)
        new = _answer_batch(self.model, rows, self.stops, pad, room, processors).tolist()
        return [
            (index, _trim(ids, self.stops, self.decode, self.prompts[index]))
            for index, ids in zip(indices, new, strict=True)
        ]


def _processors(sampling: Sampling, noise_keys: list[str]) -> LogitsProcessorList:
    if not sampling.do_sample:
        return LogitsProcessorList()
    processors = LogitsProcessorList()
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(GumbelNoise(noise_keys))
    return processors


def _answer_batch(
    model: PreTrainedModel,
    rows: list[list[int]],
    stops: list[int],
    pad: int,
    room: int,
    processors: LogitsProcessorList,
) -> Tensor:
    """The new ids, [row, at most `room`]; what follows a row's stop token is padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    config = GenerationConfig(
        max_new_tokens=room, do_sample=False, use_cache=True, pad_token_id=pad, eos_token_id=stops or None
    )
    with torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            inputs=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            # Ranks that share weights go on together until the last of them has its answers.
            synced_gpus=_is_sharded(model),
        )
    return output[:, width:]


def _trim(ids: list[int], stops: list[int], decode: Decoder, prompt: Sequence[int]) -> Generation:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    kept = ids[:end]
    return Generation(kept, decode(kept, prompt), end is not None)


def _pad_id(tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> int:
    if isinstance(tokenizer.pad_token_id, int):
        return tokenizer.pad_token_id
    return stops[0] if stops else 0


@contextlib.contextmanager
def _as_it_stands(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and an empty `generation_config` for a while; both come back after."""
    modes = [(module, module.training) for module in model.modules()]
    config = model.generation_config
    model.eval()
    # transformers 5 fills what a call leaves unset from the model's own generation_config (repetition
    # penalties too).
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
        for module, mode in modes:
            _set_mode(module, mode)


def _set_mode(module: nn.Module, mode: bool) -> None:
    # Not module.train(mode), which would set the children too.
    module.training = mode
