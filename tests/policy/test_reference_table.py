"""The table of reference log-probs in memory: what it takes in, and what it gives a checkpoint."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.policy.reference_cache import ReferenceCache
from trainer.policy.reference_files import CacheFolder
from trainer.schema import PairLogps, UserError


def batch_of(keys: list[bytes]) -> Any:
    return SimpleNamespace(keys=keys, ids=[str(i) for i in range(len(keys))])


def logps_of(*chosen: float) -> PairLogps:
    ones = torch.ones(len(chosen))
    return PairLogps(torch.tensor(chosen), -ones, ones.long(), ones.long())


def test_what_is_not_finite_is_not_kept(tmp_path) -> None:
    keys = [bytes([i]) * 16 for i in range(1, 5)]
    cache = ReferenceCache({"base": "a"})
    cache.attach(CacheFolder(tmp_path / "kept", cache.identity))
    cache.record(batch_of(keys), logps_of(-1.0, float("nan"), float("-inf"), -4.0))
    cache.share()
    assert cache.missing(keys).tolist() == [1, 2]
    cache.record(batch_of(keys[1:2]), logps_of(-2.0))
    cache.share()
    cache.close()
    again = ReferenceCache({"base": "a"})
    again.attach(CacheFolder(tmp_path / "kept", again.identity))
    assert again.missing(keys).tolist() == [2]
    assert again.get(keys[:2]).chosen.tolist() == [-1.0, -2.0]


def test_a_checkpoints_log_probs_are_those_of_its_reference() -> None:
    cache = ReferenceCache({"base": "a", "transformers": "4.0"})
    cache.record(batch_of([b"1" * 16]), logps_of(-1.0))
    cache.share()
    state = cache.state()
    same = ReferenceCache(dict(cache.identity))
    same.load_state(state)
    assert len(same) == 1
    with pytest.raises(UserError, match=r"checkpoint's log-probs.*transformers was 4.0 and is 5.0"):
        ReferenceCache({"base": "a", "transformers": "5.0"}).load_state(state)


def test_a_checkpoint_that_names_no_reference_is_computed_anew(caplog) -> None:
    cache = ReferenceCache({"base": "a"})
    with caplog.at_level(logging.WARNING):
        cache.load_state(torch.zeros(36, dtype=torch.uint8))
    assert len(cache) == 0
    assert len(caplog.records) == 1
