"""Pairs in batches, shards and reruns: the same files, whatever the way to them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.pairs.rewards import CountReward
from trainer.generation import Sampling
from trainer.pairs import building
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import Shard, build, merge
from trainer.pairs.continuations import Continued, LocalGenerator
from trainer.pairs.prompts import NoPrompt, Prompt, TextPrompts
from trainer.schema import UserError

FILES = ("candidates.jsonl", "pairs.jsonl", "prompts.jsonl")
SAMPLING = Sampling(max_new_tokens=6, do_sample=True, seed=3)


@pytest.fixture
def texts(tmp_path) -> str:
    lines = [f"{'longer ' * (i % 3)}beginning number {i}" for i in range(7)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return str(tmp_path / "texts.txt")


def builder(base: Path, texts: str, batch_size: int = 8, **settings: Any) -> BestOfN:
    given = {"n": 3, "sampling": SAMPLING, "reward": CountReward()} | settings
    prompts = TextPrompts(texts, tokens=None, part="all")
    return BestOfN(LocalGenerator(str(base), batch_size=batch_size), prompts, **given)


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def whole(tiny_gpt2, texts, tmp_path) -> dict[str, bytes]:
    assert build(builder(tiny_gpt2, texts), tmp_path / "whole").missing == 0
    return read(tmp_path / "whole")


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_other_batch_sizes_give_the_same_files(tiny_gpt2, texts, tmp_path, whole, batch_size) -> None:
    built = build(builder(tiny_gpt2, texts, batch_size), tmp_path / "out")
    assert (built.new, built.missing) == (7, 0)
    assert read(tmp_path / "out") == whole


def test_samples_of_a_prompt_differ_and_pairs_are_what_the_rows_say(whole) -> None:
    rows = [json.loads(line) for line in whole["candidates.jsonl"].splitlines()]
    assert all(len({each["text"] for each in row["candidates"]}) == 3 for row in rows)
    for pair in map(json.loads, whole["pairs.jsonl"].splitlines()):
        (row,) = [row for row in rows if row["key"] == pair["id"]]
        scores = {each["text"]: each["score"] for each in row["candidates"]}
        assert scores[pair["chosen"]] == pair["chosen_score"] == max(scores.values())
        assert scores[pair["rejected"]] == pair["rejected_score"] == min(scores.values())
        finished = {each["text"]: each["finished"] for each in row["candidates"]}
        assert pair["chosen_finished"] == finished[pair["chosen"]]


def test_shards_in_any_order_give_the_same_files(tiny_gpt2, texts, tmp_path, whole) -> None:
    out, made = tmp_path / "out", builder(tiny_gpt2, texts)
    assert build(made, out, Shard(3, 3)).missing == 5
    with pytest.raises(UserError, match=r"5 of 7 prompts have no row yet, of shard 1/3, 2/3; run them again"):
        merge(made, out)
    assert build(made, out, Shard(1, 3)).missing == 2
    assert not (out / "pairs.jsonl").exists()
    built = build(made, out, Shard(2, 3))
    assert built.manifest is not None, "the shard that sees the last row merges"
    assert read(out) == whole
    before = (out / "manifest.json").stat().st_mtime_ns
    assert build(made, out, Shard(2, 3)).new == 0
    assert merge(made, out)["files"] == built.manifest["files"]
    assert (out / "manifest.json").stat().st_mtime_ns == before, "the same manifest is not written again"


def test_other_shards_go_on_with_what_is_there(tiny_gpt2, texts, tmp_path, whole) -> None:
    out, made = tmp_path / "out", builder(tiny_gpt2, texts)
    build(made, out, Shard(1, 3))
    assert build(made, out).new == 4
    assert read(out) == whole


class Breaking(LocalGenerator):
    """Gives up after some batches."""

    def continued(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> Iterator[Continued]:
        for number, batch in enumerate(super().continued(prompts, n, sampling)):
            if number == 2:
                raise UserError("enough")
            yield batch

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"class": "LocalGenerator"}


def test_what_was_made_before_an_error_is_kept(tiny_gpt2, texts, tmp_path, whole) -> None:
    out, made = tmp_path / "out", builder(tiny_gpt2, texts, 3)
    made.generator.__class__ = Breaking
    with pytest.raises(UserError, match="enough"):
        build(made, out)
    made.generator.__class__ = LocalGenerator
    assert build(made, out).new == 5
    assert read(out) == whole


def test_another_margin_makes_no_text_anew(tiny_gpt2, texts, tmp_path, whole) -> None:
    out = tmp_path / "whole"
    built = build(builder(tiny_gpt2, texts, min_margin=1.0, min_tokens=2), out)
    assert built.new == 0
    assert built.manifest["builder"]["min_margin"] == 1.0
    assert read(out)["candidates.jsonl"] == whole["candidates.jsonl"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"n": 4}, "n was 3, is 4"), ({"sampling": Sampling(6, True, seed=4)}, "sampling was"),
     ({"reward": CountReward("x")}, "reward was")],
)  # fmt: skip
def test_rows_of_other_settings_are_refused(tiny_gpt2, texts, tmp_path, whole, settings, named) -> None:
    with pytest.raises(UserError, match=f"{named}.*another folder"):
        build(builder(tiny_gpt2, texts, **settings), tmp_path / "whole")


def test_no_prompt_begins_at_bos(tiny_llama, tiny_gpt2, tmp_path) -> None:
    made = BestOfN(LocalGenerator(str(tiny_llama)), NoPrompt(4), CountReward(), 3, SAMPLING)
    build(made, tmp_path / "out")
    with pytest.raises(UserError, match="the tokenizer has no BOS"):
        build(BestOfN(LocalGenerator(str(tiny_gpt2)), NoPrompt(4), CountReward()), tmp_path / "none")
    rows = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [""] * 4
    assert len({each["text"] for row in rows for each in row["candidates"]}) == 12


def test_a_folder_without_rows_cannot_be_merged(tiny_gpt2, texts, tmp_path) -> None:
    with pytest.raises(UserError, match=r"holds no pairs that were begun"):
        merge(builder(tiny_gpt2, texts), tmp_path / "nothing")


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "a/b", "1/0", "\u0663/\u0664"])
def test_shards_that_cannot_be(text) -> None:
    with pytest.raises(UserError, match=r"should be such as 3/16"):
        Shard.parse(text)
    assert Shard.parse("3/16") == Shard(3, 16)


def test_no_model(tmp_path, texts) -> None:
    with pytest.raises(UserError, match="no folder"):
        build(builder(tmp_path / "nothing", texts), tmp_path / "out")
    with pytest.raises(UserError, match="neither base nor adapter"):
        LocalGenerator()
    assert os.listdir(tmp_path) == ["texts.txt"], "a mistake leaves no folder behind"


def test_a_threshold_that_leaves_no_pair_leaves_no_old_one(tiny_gpt2, texts, tmp_path, whole) -> None:
    out = tmp_path / "whole"
    with pytest.raises(UserError, match="no pair is left"):
        build(builder(tiny_gpt2, texts, min_margin=1000.0), out)
    assert not (out / "pairs.jsonl").exists()
    assert not (out / "manifest.json").exists()
    assert merge(builder(tiny_gpt2, texts), out)["files"].keys() == {"pairs.jsonl", "candidates.jsonl"}
    assert read(out) == whole


def test_a_kill_between_leaves_no_manifest_of_other_files(
    tiny_gpt2, texts, tmp_path, whole, monkeypatch
) -> None:
    out = tmp_path / "whole"
    merge(builder(tiny_gpt2, texts), out)
    (out / "pairs.jsonl").write_text("other pairs\n")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(builder(tiny_gpt2, texts), out)
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "prompts.jsonl",
            '{"key": "a"',
            r"prompts\.jsonl: holds no prompts; run the same `tandem pairs` again",
        ),
        ("prompts.jsonl", '{"kay": "a"}', r"prompts\.jsonl: holds no prompts"),
        ("about.json", "{}", r"about\.json: says nothing of the builder"),
        ("about.json", "[]", r"about\.json: says nothing of the builder"),
        ("settings.json", "[]", r"settings\.json: holds no settings"),
    ],
)
def test_a_folder_that_someone_broke_is_named(
    tiny_gpt2, texts, tmp_path, whole, name, content, message
) -> None:
    out = tmp_path / "whole"
    (out / name).write_text(content)
    with pytest.raises(UserError, match=message):
        merge(builder(tiny_gpt2, texts), out)
    if name != "settings.json":
        build(builder(tiny_gpt2, texts), out)
        assert read(out) == whole


def test_a_row_that_someone_changed_is_named(tiny_gpt2, texts, tmp_path, whole) -> None:
    part = tmp_path / "whole" / "parts" / "1-of-1.0.jsonl"
    first, *rest = part.read_text().splitlines(keepends=True)
    row = json.loads(first)
    del row["candidates"]
    part.write_text("".join([json.dumps(row) + "\n", *rest]))
    with pytest.raises(UserError, match=f"BestOfN: makes nothing of the row '{row['key']}' .KeyError"):
        merge(builder(tiny_gpt2, texts), tmp_path / "whole")


def test_a_model_of_broken_weights_is_named(tiny_gpt2, texts, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_gpt2, broken)
    weights = load_file(broken / "model.safetensors")
    name = next(iter(weights))
    weights[name][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"broken: its weights are broken \(.* holds what is no number\)"):
        build(builder(broken, texts), tmp_path / "out")
