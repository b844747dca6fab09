"""The frozen reference behind one interface: the policy's own base (`shared`), a copy (`sharded`), or `cached`.

Whatever the kind, log-probs that are known need no forward: the first epoch records them, later ones read them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
from trainer.policy.reference_cache import ReferenceCache, identity
from trainer.policy.reference_files import CacheFolder
from trainer.provenance import sha256_text
from trainer.schema import PairLogps, PreferenceBatch, TokenizedPreference, UserError

FOLDER = "reference_cache"
"""The automatic cache's name in a run's folder."""

Examples = Sequence[TokenizedPreference]


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """What the policy is compared with.

    Args:
        kind: `shared` uses the policy's own frozen base (half the memory); `sharded` holds a frozen copy of
            its own, which ZeRO-3 spreads over the ranks like the policy. `cached` holds no weights: log-probs come
            from `cache`, which `tandem cache-reference` has made.
        adapter: `start`: as the policy was at its start (the bare base if it has none). A path: that saved
            adapter. null: the bare base.
        cache: where log-probs are kept that were computed once, so that an epoch whose pairs are all there needs no
            reference forward. `auto`: the run's folder, or memory where there is none. A path: a folder that other
            runs with this reference may use, too; where it holds all pairs no reference weights are loaded.
            null: computed anew for every batch.
    """

    kind: Literal["shared", "sharded", "cached"] = "shared"
    adapter: str | None = "start"
    cache: str | None = "auto"

    def __post_init__(self) -> None:
        if self.cache is not None and not self.cache.strip():
            raise UserError(f"reference.cache: '{self.cache}' names no folder; give one, auto or null")
        if self.kind == "cached" and self.folder is None:
            given = "null" if self.cache is None else f"'{self.cache}'"
            raise UserError(
                f"reference.cache: {given} names no folder; reference.kind: cached reads log-probs from a folder that"
                " `tandem cache-reference` has made"
            )

    @property
    def folder(self) -> Path | None:
        """The folder that `cache` names, if it names one."""
        return Path(self.cache).expanduser() if self.cache not in (None, "auto") else None


class Reference(nn.Module):
    """A model that never moves. Build it with `build_reference`.

    Args:
        model: the frozen copy, or the policy whose base is shared; None where all log-probs are in the cache.
        config: what was asked for.
        origin: which weights it is made of, for the manifest.
        adapter: shared only: the frozen adapter to switch in; None switches the policy's adapter off.
        cache: the log-probs that are known; None computes all of them anew.
        complete: every pair is in the cache, and nothing is ever computed.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | None,
        config: ReferenceConfig,
        origin: dict[str, Any],
        adapter: str | None = None,
        cache: ReferenceCache | None = None,
        complete: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.origin, self.adapter = config, origin, adapter
        self.cache, self.complete = cache, complete
        # A shared model is the policy's: held in a tuple, so that its parameters are not counted or saved
        # twice.
        self.model = model if config.kind == "sharded" and not complete else None
        self._shared = (model,)
        self._first_hash: str | None = None
        self._pass = _Pass(reads=complete, records=cache is not None)
        self._known: dict[str, tuple[Examples, int, bool]] = {}

    @property
    def present(self) -> bool:
        """Whether its weights are here, so that it can answer prompts; log-probs it gives either way."""
        return self._shared[0] is not None

    @override
    def train(self, mode: bool = True) -> Reference:
        """The reference stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """The pairs' log-probabilities (sums in nats, and token counts) under the reference; no gradient.

        Raises:
            UserError: nothing may be computed, and a pair is not in the cache.
        """
        if self._pass.reads:
            return self._read(batch)
        with self.applied() as model:
            found = pair_logps(model, batch)
        if self._pass.records and self.cache is not None and len(batch.keys) == batch.pairs:
            self.cache.record(batch, found)
        return found

    def _read(self, batch: PreferenceBatch) -> PairLogps:
        assert self.cache is not None
        if len(missing := self.cache.missing(batch.keys)):
            raise self._not_there(f"example {batch.ids[missing[0]]}")
        found, device = self.cache.get(batch.keys), batch.rows.input_ids.device
        return PairLogps(
            found.chosen.to(device),
            found.rejected.to(device),
            found.chosen_tokens.to(device),
            found.rejected_tokens.to(device),
        )

    def _not_there(self, missing: str) -> UserError:
        folder = self.config.folder
        return UserError(
            f"reference.cache: {folder} does not hold {missing}; `tandem cache-reference` with this run's"
            f" arguments and --output {folder} adds what is missing"
        )

    # The cache's moments. Ranks decide alike: under ZeRO-3 a forward needs all of them.

    def open(self, run: Path | None, new: bool) -> None:
        """Keep what is recorded in the run's folder, if it has one and `cache` is auto.

        Args:
            new: the run begins now, and what an earlier one left there is none of its own.
        """
        if self.cache is not None and self.config.cache == "auto" and run is not None:
            self.cache.attach(CacheFolder(run / FOLDER, self.cache.identity), new=new)

    def begin(self, split: str, examples: Examples | None, records: bool = True) -> _Pass:
        """Begin to pass over a split's pairs: read them if all are known, or compute all and record them.

        Every rank must call it. Returns what was done before, for `back`.

        Args:
            examples: the split's pairs; None where they cannot be seen, which leaves it to what is known of the cache.
            records: whether what is computed will be wanted again.

        Raises:
            UserError: nothing may be computed, and a pair is not in the cache.
        """
        before = self._pass
        if self.cache is not None:
            reads = self._knows(split, examples) if examples is not None else self.complete
            self._pass = _Pass(reads, records)
        return before

    def back(self, before: _Pass) -> None:
        """Go on with the pass that another one has interrupted."""
        self._pass = before

    def _knows(self, split: str, examples: Examples) -> bool:
        assert self.cache is not None
        asked, size, known = self._known.get(split, (None, -1, False))
        if asked is examples and (known or size == len(self.cache)):
            return known
        missing = self.cache.first_missing(examples)
        if missing is not None and self.complete:
            count = self.cache.count_missing(examples)
            raise self._not_there(f"{count:,} of {len(examples):,} {split} pairs, such as example {missing}")
        self._known[split] = examples, len(self.cache), missing is None
        return missing is None

    def share(self) -> None:
        """Make known to all ranks, and write down, what was recorded. Every rank must call it."""
        if self.cache is not None:
            self.cache.share()

    def close(self) -> None:
        """Let go of the cache's folder."""
        if self.cache is not None:
            self.cache.close()

    def state(self) -> dict[str, Any] | None:
        """The cache's content, for a checkpoint; None where a folder holds it or nothing is known."""
        in_memory = self.cache is not None and (self.cache.folder is None or self.cache.full)
        return self.cache.state() if self.cache is not None and in_memory and len(self.cache) else None

    def load_state(self, state: Any) -> None:
        """Take in what `state` gave; another reference's log-probs are refused."""
        if self.cache is not None:
            self.cache.load_state(state)

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
        assert policy is not None, "the reference's weights are not here; ask `present`"
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
        """SHA-256 over all tensors that the reference reads; under ZeRO-3 over this rank's own shards.

        With a folder for its cache: of what it is made of, as long as the tensors stay what they first were. So a
        resume that finds all log-probs there, and needs no weights, is still seen to have the same reference.
        """
        if self.cache is None or self.config.folder is None:
            return self._hash()
        now = self._hash() if self.present else ""
        if self._first_hash is None:
            self._first_hash = now
        return self.cache.key if now == self._first_hash else sha256_text(self.cache.key, now)

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._tensors():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        (model,) = self._shared
        if model is None:
            return
        skipped = {POLICY, REFERENCE} - {self.adapter} if self.model is None else set()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not skipped & set(name.split(".")):
                # DeepSpeed keeps a rank's shard in `ds_tensor` and leaves the parameter empty.
                yield name, getattr(tensor, "ds_tensor", tensor)

    def describe(self) -> dict[str, Any]:
        """What the run's manifest says of the reference: kind, adapter, which weights it is made of, its cache."""
        return {**dataclasses.asdict(self.config), **self.origin, "log_probs": self._describe_cache()}

    def _describe_cache(self) -> dict[str, Any] | None:
        if self.cache is None:
            return None
        folder = self.config.folder or (self.cache.folder.path if self.cache.folder else None)
        where = "cache" if self.complete else "first epoch"
        return {
            "from": where,
            "folder": folder and str(folder),
            "entries": len(self.cache),
            "key": self.cache.key,
        }


@dataclasses.dataclass(frozen=True)
class _Pass:
    """How log-probs come: read from the cache; or computed, and recorded or not."""

    reads: bool
    records: bool


def build_reference(
    config: ReferenceConfig,
    policy_config: PolicyConfig,
    policy: nn.Module,
    examples: Mapping[str, Examples] | None = None,
) -> Reference:
    """The reference for a policy that stands at its start.

    Args:
        examples: the pairs of each split: where a cache's folder holds them all, no weights are loaded.

    Raises:
        UserError: a shared reference for a policy whose base is trained, an adapter that does not fit, or a cache that
            is stale, damaged or not there.
    """
    made_of = made_of_settings(config, policy_config)
    origin = {"fingerprint": fingerprint(made_of)}
    if config.kind == "shared" and not isinstance(policy, PeftModel):
        raise UserError(
            "reference.kind: 'shared' needs a frozen base, but policy.adapter is null, so every weight is "
            "trained; set reference.kind: sharded"
        )
    cache = None if config.cache is None else _open_cache(config, made_of, origin)
    if cache is not None and (config.kind == "cached" or _holds(config, cache, examples)):
        # The bare base is here at no cost, for whoever wants an answer of the reference.
        bare = made_of.start is None and isinstance(policy, PeftModel)
        model = policy if bare else None
        reference = Reference(model, config, origin, cache=cache, complete=True)  # type: ignore[arg-type]
        for split, pairs in (examples or {}).items():
            reference._knows(split, pairs)  # what is not there is told before anything is trained
        return reference.eval()
    if config.kind == "sharded":
        return Reference(load_frozen(made_of), config, origin, cache=cache).eval()
    assert isinstance(policy, PeftModel)
    if made_of.start is None:
        return Reference(policy, config, origin, cache=cache).eval()
    _share_adapter(policy, made_of)
    return Reference(policy, config, origin, REFERENCE, cache).eval()


def _open_cache(config: ReferenceConfig, made_of: PolicyConfig, origin: dict[str, Any]) -> ReferenceCache:
    cache = ReferenceCache(identity(made_of, origin["fingerprint"]))
    if config.folder is not None:
        cache.attach(CacheFolder(config.folder, cache.identity), strict=config.kind == "cached")
    return cache


def _holds(config: ReferenceConfig, cache: ReferenceCache, examples: Mapping[str, Examples] | None) -> bool:
    """Whether the named folder knows all pairs. Every rank asks, so that all load weights or none does."""
    if config.folder is None or examples is None or not any(map(len, examples.values())):
        return False
    return all(cache.first_missing(pairs) is None for pairs in examples.values() if len(pairs))


def made_of_settings(config: ReferenceConfig, policy: PolicyConfig) -> PolicyConfig:
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
