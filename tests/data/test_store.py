"""Stores of tokens: the same examples in and out, damage found, nothing half-written."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from trainer.data.store import Damaged, TokenStore, content, lengths, longest, write_store
from trainer.provenance import sha256_text
from trainer.schema import TokenizedDemonstration, TokenizedPreference, UserError


def pairs(count: int, highest: int = 500, seed: int = 0) -> list[TokenizedPreference]:
    rng = random.Random(seed)

    def ids(least: int) -> list[int]:
        return [rng.randrange(highest) for _ in range(rng.randint(least, 12))]

    return [TokenizedPreference(ids(1), ids(1), ids(1), f"№ {i}\ud800") for i in range(count)]


def demonstrations(count: int) -> list[TokenizedDemonstration]:
    return [TokenizedDemonstration(pair.prompt, pair.chosen, pair.id) for pair in pairs(count)]


def stored(folder: Path, examples: list[Any], vocabulary: int = 500) -> TokenStore:
    kind = "demonstration" if examples and isinstance(examples[0], TokenizedDemonstration) else "preference"
    write_store(folder, iter(examples), kind, vocabulary, lambda: {"counts": {"kept": len(examples)}})
    return TokenStore(folder)


@pytest.mark.parametrize("examples", [pairs(1), pairs(700), demonstrations(300), []], ids=len)
def test_what_goes_in_comes_out(tmp_path: Path, examples: list[Any]) -> None:
    store = stored(tmp_path / "s", examples)
    assert list(store) == examples
    assert len(store) == len(examples)
    assert store[-3:] == examples[-3:]
    assert store.manifest["about"] == {"counts": {"kept": len(examples)}}
    assert store.manifest["tokens"] == lengths(examples).sum()
    if examples:
        assert store[-1] == examples[-1] == store[np.int64(len(examples) - 1)]
    for beyond in (len(examples), -len(examples) - 1):
        with pytest.raises(IndexError):
            store[beyond]


@pytest.mark.parametrize(("vocabulary", "width"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_are_as_wide_as_the_vocabulary_asks(tmp_path: Path, vocabulary: int, width: int) -> None:
    edge = TokenizedPreference([vocabulary - 1], [0], [1, 2], "x")
    store = stored(tmp_path / "s", [edge], vocabulary)
    assert list(store) == [edge]
    assert (tmp_path / "s" / "tokens.bin").stat().st_size == 4 * width


def test_an_id_beyond_the_vocabulary_is_no_other_id(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        stored(tmp_path / "s", [TokenizedPreference([1 << 16], [0], [1], "x")])
    with pytest.raises(Damaged, match=r"manifest\.json: no such file"):
        TokenStore(tmp_path / "s")


def test_what_the_sampler_asks_is_the_same_for_a_store_and_a_list(tmp_path: Path) -> None:
    for name, examples in {"pairs": pairs(400), "shown": demonstrations(400)}.items():
        store = stored(tmp_path / name, examples)
        assert lengths(store).dtype == lengths(examples).dtype == np.int32
        np.testing.assert_array_equal(lengths(store), lengths(examples))
        assert longest(store) == longest(examples) == max(example.longest for example in examples)
        assert content(store) == content(examples) == sha256_text(*(example.id for example in examples))
    assert longest([]) == 0
    assert lengths([]).shape == (0, 2)


def test_a_pickled_store_is_its_path(tmp_path: Path) -> None:
    examples = pairs(500)
    raw = pickle.dumps(stored(tmp_path / "s", examples))
    assert len(raw) < 500
    assert list(pickle.loads(raw)) == examples


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_it(tmp_path: Path, start: str) -> None:
    examples = pairs(60)
    store = stored(tmp_path / "s", examples)
    loader = DataLoader(store, batch_size=None, num_workers=2, multiprocessing_context=start, collate_fn=same)
    assert list(loader) == examples
    assert store[7] == examples[7], "what the workers close is theirs"


def same(example: Any) -> Any:
    return example


FILES = ("tokens.bin", "lengths.bin", "offsets.bin", "ids.bin", "id_offsets.bin", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["gone", "cut", "flipped"])
def test_every_damage_is_found_and_named(tmp_path: Path, name: str, harm: str) -> None:
    stored(tmp_path / "s", pairs(20))
    path = tmp_path / "s" / name
    raw = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(raw[:-7])
    else:
        # In the manifest: a digit, so that it stays JSON.
        at = raw.index(b'"kept": 20') + 8 if name == "manifest.json" else len(raw) // 2
        raw[at] ^= 1
        path.write_bytes(raw)
    with pytest.raises(Damaged, match=name.replace(".", r"\.")):
        TokenStore(tmp_path / "s")


def test_a_store_that_is_cut_while_it_is_read_says_so(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", pairs(50))
    os.truncate(tmp_path / "s" / "tokens.bin", 10)
    with pytest.raises(UserError, match="was cut while it was in use"):
        store[49]


def test_an_error_of_the_examples_is_theirs(tmp_path: Path) -> None:
    def broken() -> Any:
        yield pairs(1)[0]
        raise FileNotFoundError("the source's own")

    with pytest.raises(FileNotFoundError, match="the source's own"):
        write_store(tmp_path / "s", broken(), "preference", 500, dict)
