"""Entropy of a policy's distributions along what it has sampled, and their KL divergence from a reference's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainer.policy.kernels import accelerated
from trainer.policy.logprobs import unwrap
from trainer.policy.sharded import is_sharded
from trainer.schema import UserError

T = TypeVar("T")
R = TypeVar("R")
Applied = Callable[[], AbstractContextManager[nn.Module]]
"""Gives the reference for a while, as `Reference.applied` does."""

_LOGITS_BYTES = {"cpu": 64 << 20, "accelerator": 1 << 30}
"""Of float32 logits in one forward; some five times as much stands in memory for a moment."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was sampled: ids of the prompt and of what follows, and whether the stop token, which is not there, came."""

    prompt: list[int]
    completion: list[int]
    finished: bool

    @property
    def drawn(self) -> int:
        """Tokens that were drawn, the stop token too."""
        return len(self.completion) + self.finished

    @property
    def ids(self) -> list[int]:
        """What the last token was drawn after, and all before."""
        return [*self.prompt, *(self.completion if self.finished else self.completion[:-1])]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums over a sequence's tokens, in nats: entropy of the policy, KL from the reference (None without one)."""

    tokens: int
    entropy: float
    kl: float | None


def measure(model: nn.Module, sequences: Sequence[Drawn], reference: Applied | None = None) -> list[Measured]:
    """Entropy and KL divergence of each sequence, over the whole vocabulary at each token that was drawn.

    Both are of the distributions as the models have them, without temperature, top-k and top-p. Of sequences that were
    drawn so, the sum of the tokens' divergences is an unbiased estimate of the sequences' KL(policy || reference) by
    the chain rule (Cover and Thomas 2006, theorem 2.5.3); only what stands before a token is sampled, so it moves less
    than log-prob differences of the drawn tokens do (k1 in Schulman 2020, "Approximating KL Divergence").

    Where a process group is up, every rank must call this with the same sequences; each computes its share, and all
    have all. The model's modes are as before on leaving.
    """
    vocabulary = unwrap(model).get_output_embeddings().weight.shape[0] or unwrap(model).config.vocab_size
    device = next(model.parameters()).device
    budget = _LOGITS_BYTES["accelerator" if accelerated(device) else "cpu"] // (4 * vocabulary)
    batches = list(_batches(sequences, max(1, budget)))

    def work(batch: list[int]) -> list[tuple[int, Measured]]:
        rows = [sequences[index] for index in batch]
        return list(zip(batch, _measured(model, rows, reference, device), strict=True))

    even = any(is_sharded(parameter) for parameter in model.parameters())
    with evaluating(model):
        found = dict(pair for part in by_ranks(batches, work, even) for pair in part)
    return [found[index] for index in range(len(sequences))]


def by_ranks(items: Sequence[T], work: Callable[[T], R], even: bool = False) -> list[R]:
    """`work` of each item, in their order; where a process group is up the items are dealt out among the ranks.

    `even`: all ranks work equally often, some of them on what another does, since their weights are shared out. Every
    rank raises a `UserError` that one of them meets.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [work(item) for item in items]
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    rounds = -(-len(items) // ranks)
    own: list[tuple[int, Any]] = []
    for index in (rank + turn * ranks for turn in range(rounds)):
        if index < len(items):
            own.append((index, _done(work, items[index])))
        elif even:
            work(items[0])
    parts: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(parts, own)
    found = dict(pair for part in parts for pair in part)
    if failed := next((each for each in found.values() if isinstance(each, UserError)), None):
        raise failed
    return [found[index] for index in range(len(items))]


def _done(work: Callable[[T], R], item: T) -> R | UserError:
    try:
        return work(item)
    except UserError as error:
        return error


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            # Not module.train(), which would set the children too.
            module.training = True


def _batches(sequences: Sequence[Drawn], budget: int) -> Iterator[list[int]]:
    """Sequences of like length, as many as have `budget` positions of logits together."""
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].drawn, len(sequences[i].ids)))
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * sequences[index].drawn > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.no_grad()
def _measured(
    model: nn.Module, rows: list[Drawn], reference: Applied | None, device: torch.device
) -> list[Measured]:
    policy = _log_probs(model, rows, device)
    chances = policy.exp()
    drawn = torch.tensor([row.drawn for row in rows], device=device)
    width = policy.shape[1]
    # Rows end together: what was drawn stands at their ends.
    counted = torch.arange(width, device=device) >= (width - drawn)[:, None]
    entropies = _summed(-chances * policy, chances, counted)
    divergences: list[float] | list[None] = [None] * len(rows)
    if reference is not None:
        with reference() as other:
            difference = policy.sub_(_log_probs(other, rows, device))
        divergences = _summed(chances * difference, chances, counted)
    return [
        Measured(row.drawn, entropy, kl)
        for row, entropy, kl in zip(rows, entropies, divergences, strict=True)
    ]


def _summed(
    values: Float[Tensor, "row token vocabulary"],
    chances: Float[Tensor, "row token vocabulary"],
    counted: Bool[Tensor, "row token"],
) -> list[float]:
    # A token that is impossible adds nothing: 0 times minus infinity is 0 here. Padding may hold anything.
    each = values.masked_fill_(chances == 0, 0.0).sum(-1).double()
    return each.masked_fill_(~counted, 0.0).sum(-1).tolist()


def _log_probs(
    model: nn.Module, rows: list[Drawn], device: torch.device
) -> Float[Tensor, "row token vocabulary"]:
    """Log-probs, in float32, of what follows each of the rows' last positions. Rows are padded at their start."""
    width = max(len(row.ids) for row in rows)
    padding = [width - len(row.ids) for row in rows]
    ids = torch.tensor([[0] * pad + row.ids for pad, row in zip(padding, rows, strict=True)], device=device)
    mask = (torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]).long()
    logits = unwrap(model)(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_(min=0),
        use_cache=False,
        logits_to_keep=max(row.drawn for row in rows),
    ).logits
    return torch.log_softmax(logits.float(), -1)
