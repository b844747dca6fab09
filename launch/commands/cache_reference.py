"""`tandem cache-reference`: the reference's log-probs of a config's pairs, computed once for every run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.schema import UserError

_HELP = """\
usage: tandem cache-reference --config FILE [--config FILE ...] [--output DIR] [settings of fit]

Computes the reference's log-probs of a config's training and validation pairs, and keeps them in a folder.
`model.reference: {kind: cached, cache: DIR}` then trains without the reference's weights; any other kind with
`cache: DIR` takes from it what it can, and adds the rest. Pairs that are there already are not computed again,
so the same command goes on after a kill, and adds what is new in the data.

  --config FILE   a config as for `tandem fit`; later files override earlier ones
  --output DIR    the folder (default: the config's model.reference.cache)
  --device NAME   cpu, cuda, ... (default: cuda where there is one, unless the config says cpu)
  --sharded       spread the weights over the processes that torchrun or srun started, as ZeRO-3 does
  ...             any setting of `tandem fit`, such as --data.token_budget 16384

Started by torchrun or srun, the processes share the work.
"""
_VALUES, _FLAGS = ("--output", "--device"), ("--sharded",)
_ROUNDS = 16
"""Forwards on each rank between two writes: what a kill costs at most."""


def main(arguments: Sequence[str]) -> int:
    """Run `tandem cache-reference`; its arguments are those of `fit`, and --output, --device, --sharded."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(_HELP)
        return 0 if arguments else 2
    own, rest = _parted(arguments)
    import contextlib

    from launch.ending import leave_together
    from launch.models import is_first
    from launch.quiet import quiet

    quiet()
    begun = time.monotonic()
    # DeepSpeed logs to stdout, which is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        entries, new, folder = _build(own, rest)
    speaks = is_first()
    leave_together()
    if speaks:
        print(f"{entries:,} pairs ({new:,} new) in {time.monotonic() - begun:.1f} s: {folder}")
    return 0


def _parted(arguments: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """This command's own settings, and the words of the config."""
    own: dict[str, str | None] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in _VALUES:
            given = value if equals else next(words, "")
            if not given or given.startswith("--"):
                raise UserError(f"{name}: a value is needed after it")
            own[name] = given
        elif word in _FLAGS:
            own[name] = None
        else:
            rest.append(word)
    return own, rest


def _build(own: dict[str, str | None], rest: list[str]) -> tuple[int, int, Path]:
    import lightning as L

    from launch.building import build
    from launch.fit import TandemCLI
    from launch.models import join_ranks
    from trainer.module import PreferenceModule
    from trainer.policy.load import fingerprint
    from trainer.policy.packed_rows import PackedRows
    from trainer.policy.reference import made_of_settings
    from trainer.policy.reference_cache import ReferenceCache, from_first, identity
    from trainer.policy.reference_files import CacheFolder

    cli = TandemCLI(rest, "inspect")
    module = build(L.LightningModule, cli.config.model.as_dict(), "model")
    if not isinstance(module, PreferenceModule):
        raise UserError(
            f"model: {type(module).__name__} has no reference; `tandem cache-reference` is for PreferenceModule"
        )
    path = own.get("--output") or module.reference_config.folder
    if path is None:
        raise UserError(
            "--output DIR: is missing, and model.reference.cache names no folder; give one of them"
        )
    device = own.get("--device") or ("cpu" if cli.config.trainer.accelerator == "cpu" else None)
    fabric = join_ranks(device)
    made_of = made_of_settings(module.reference_config, module.policy_config)
    known, data = fingerprint(made_of), cli.data_only()
    if (check := getattr(data.source, "check_reference", None)) is not None:
        check(known)
    cache = ReferenceCache(identity(made_of, known))
    folder = CacheFolder(Path(path), cache.identity)
    cache.must_write = True
    from_first(folder.take)
    try:
        cache.attach(folder)
        before = len(cache)
        data.tokenizer = module.tokenizer
        data.setup("fit")
        if work := _work(data, cache):
            model = _model(made_of, "--sharded" in own, device, fabric)
            rows = PackedRows(made_of.base, data.tokenizer.pad_token_id)
            _compute(_Forward(model, rows), work, cache)
        cache.tidy()
        if work:
            _refuse_not_finite(data, cache, Path(path))
    finally:
        cache.close()
    return len(cache), len(cache) - before, Path(path)


def _refuse_not_finite(data: Any, cache: Any, path: Path) -> None:
    """What is missing after all forwards had log-probs that are not finite, and was not kept."""
    counts = {split: cache.count_missing(pairs) for split, pairs in data.examples.items()}
    for split, count in counts.items():
        if count:
            first = data.examples[split][cache.all_missing(data.examples[split])[0]].id
            raise UserError(
                f"model.reference: the log-probs of {sum(counts.values()):,} pairs are not finite, the first is {split}"
                f" example {first}; the other {len(cache):,} are kept in {path}; look at that example, or give another"
                " model.policy.dtype"
            )


def _model(made_of: Any, sharded: bool, device: str | None, fabric: Any) -> Any:
    """The reference alone: no policy, nothing trained."""
    from launch.models import sharded_model
    from trainer.policy.devices import device_named
    from trainer.policy.load import load_frozen

    if sharded:
        return sharded_model(made_of, fabric)
    return load_frozen(made_of).to(fabric.device if fabric else device_named(device))  # type: ignore[arg-type]


class _Part(NamedTuple):
    """Pairs of one forward."""

    laid: Any
    indices: list[int]


def _work(data: Any, cache: Any) -> list[_Part]:
    """What is missing, in forwards within the token budget. The same on every rank.

    In random order: the time left is right from the beginning.
    """
    import numpy as np

    parts = []
    for split in ("train", "validation"):
        if not (examples := data.examples.get(split)):
            continue
        missing = cache.all_missing(examples)
        sampler, laid = data.sampler(split, data.batch_size, 1, shuffle=False), data.laid(split)
        most = data.batch_size if split == "train" else data.validation_batch_size
        parts += [_Part(laid, indices) for indices in _within(missing, sampler, data.budget, most)]
    order = np.random.default_rng(0).permutation(len(parts))
    return [parts[i] for i in order]


def _within(indices: list[int], sampler: Any, budget: int | None, most: int) -> list[list[int]]:
    """The indices in lists whose rows are within the budget, examples of like length together.

    Without a budget in lists of at most `most`.
    """
    out: list[list[int]] = []
    held = longest = 0
    for index in sorted(indices, key=lambda i: (-int(sampler.lengths[i]), i)):
        own = int(sampler.lengths[index])
        held = held + own if sampler.packed else held + longest
        if out and (held <= budget if budget is not None else len(out[-1]) < most):
            out[-1].append(index)
        else:
            out.append([index])
            held = longest = own
    return out


def _compute(forward: _Forward, work: list[_Part], cache: Any) -> None:
    """All forwards, spread over the ranks, each rank equally many."""
    import torch
    from tqdm import tqdm

    ranks, rank = 1, 0
    if torch.distributed.is_initialized():
        ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    total = sum(len(part.indices) for part in work)
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total, unit="pair", desc="reference", disable=rank > 0, mininterval=0.2 if terminal else 10.0
    )
    smallest = min(work, key=lambda part: len(part.indices))
    try:
        for turn, start in enumerate(range(0, len(work), ranks)):
            round_ = work[start : start + ranks]
            batch, logps = forward(round_[rank] if rank < len(round_) else smallest)
            cache.record(batch, logps)
            if turn % _ROUNDS == _ROUNDS - 1:
                cache.share()
            bar.update(sum(len(part.indices) for part in round_))
        cache.share()
    except KeyboardInterrupt as stop:
        if ranks == 1:
            cache.share()
        raise KeyboardInterrupt(f"{len(cache):,} pairs are kept; the same command goes on") from stop
    finally:
        bar.close()


class _Forward:
    """A part's batch on the model's device, and its log-probs."""

    def __init__(self, model: Any, rows: Any) -> None:
        self.model, self.rows = model, rows
        self.device = next(iter(model.parameters())).device

    def __call__(self, part: _Part) -> tuple[Any, Any]:
        import torch
        from lightning.fabric.utilities import move_data_to_device

        from trainer.data.sampler import MicroBatch
        from trainer.policy.logprobs import pair_logps
        from trainer.schema import StepShare

        batch = part.laid[MicroBatch(part.indices, StepShare(0.0, 0.0, True))]
        batch = move_data_to_device(batch, self.device)
        self.rows.try_on(self.model, batch, _on_any_rank)
        batch = self.rows.understood(batch)
        with torch.no_grad():
            return batch, pair_logps(self.model, batch)


def _on_any_rank(here: bool) -> bool:
    """Whether it is so on some rank."""
    import torch

    if not torch.distributed.is_initialized():
        return here
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, here)
    return any(found)
