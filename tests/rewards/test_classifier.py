"""ClassifierReward: what it scores, that batches do not matter, how fast they are, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launch.building import build
from tests.rewards import classifiers
from trainer.rewards import Reward, described
from trainer.rewards.classifier import ClassifierReward
from trainer.schema import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return classifiers.distilbert(tmp_path_factory.mktemp("rewards") / "distilbert")


@pytest.fixture(scope="module")
def last_token(tmp_path_factory) -> Path:
    return classifiers.gpt2(tmp_path_factory.mktemp("rewards") / "gpt2")


def texts(count: int, longest: int = 60) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    words = ["good ", "bad ", "фильм ", "a ", "masterpiece! ", "\n"]
    drawn = ["".join(rng.choices(words, k=rng.randint(1, longest // 8))) for _ in range(count)]
    return ["The film "] * count, drawn


def by_hand(folder: Path, text: str) -> torch.Tensor:
    """The logits of one text, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def test_the_logit_and_the_probability_of_a_label(folder: Path) -> None:
    logits = by_hand(folder, "The film was good")
    score = ClassifierReward(str(folder))(["The film"], [" was good"])
    assert score == [pytest.approx(float(logits[1]), abs=2e-5)]
    other = ClassifierReward(str(folder), label="NEGATIVE")(["The film"], [" was good"])
    assert other == [pytest.approx(float(logits[0]), abs=2e-5)]
    chance = ClassifierReward(str(folder), label=0, output="probability")(["The film"], [" was good"])
    assert chance == [pytest.approx(float(logits.softmax(-1)[0]), abs=2e-5)]
    assert ClassifierReward(str(folder))([], []) == []


@pytest.mark.parametrize("kind", ["folder", "last_token"])
def test_scores_do_not_depend_on_the_batch(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    prompts, completions = texts(40)
    alone = ClassifierReward(str(path), batch_size=1)(prompts, completions)
    together = ClassifierReward(str(path), batch_size=16)(prompts, completions)
    assert together == pytest.approx(alone, abs=2e-5)
    backwards = ClassifierReward(str(path), batch_size=7)(prompts[::-1], completions[::-1])
    assert backwards[::-1] == pytest.approx(alone, abs=2e-5)
    assert len(set(alone)) > 20
    assert alone[3] == pytest.approx(float(by_hand(path, prompts[3] + completions[3])[1]), abs=2e-5)


def test_equal_texts_tie(folder: Path) -> None:
    prompts, completions = texts(30)
    scores = ClassifierReward(str(folder), batch_size=4)(
        [*prompts, prompts[0]], [*completions, completions[0]]
    )
    assert scores[0] == scores[-1]


def test_a_long_text_keeps_its_end(folder: Path) -> None:
    short = ClassifierReward(str(folder), max_length=12)
    assert short(["x" * 500], ["the end has it"]) == short(["y" * 500], ["the end has it"])
    assert short(["x" * 500], ["the end has it"]) != short(["x" * 500], ["the end had it"])
    # Without max_length the classifier's own positions are the limit.
    assert len(ClassifierReward(str(folder))(["x" * 500], ["end"])) == 1


def test_batches_are_three_times_faster(folder: Path) -> None:
    prompts, completions = texts(300, longest=64)
    reward = ClassifierReward(str(folder))

    def seconds(parts: list[slice]) -> float:
        begun = time.perf_counter()
        for part in parts:
            reward(prompts[part], completions[part])
        return time.perf_counter() - begun

    one_by_one = [slice(i, i + 1) for i in range(len(prompts))]
    seconds(one_by_one[:3])
    # The best of some: others work on this machine, too.
    assert min(seconds(one_by_one) for _ in range(3)) > 3 * min(seconds([slice(None)]) for _ in range(5))


def test_a_config_names_it_by_its_class_path(folder: Path) -> None:
    settings = {
        "class_path": "trainer.rewards.classifier.ClassifierReward",
        "init_args": {"model": str(folder), "label": "NEGATIVE"},
    }
    reward = build(Reward, settings, "reward.yaml")
    assert described(reward)["label"] == 0
    assert len(described(reward)["weights"]) == 64
    with pytest.raises(UserError, match=r"reward.yaml: .*batch_sise"):
        build(Reward, {**settings, "init_args": {"batch_sise": 3}}, "reward.yaml")


def test_what_it_is_is_known_before_a_text_comes(folder: Path, tmp_path: Path) -> None:
    other = classifiers.distilbert(tmp_path, seed=5)
    assert ClassifierReward(str(folder)).describe() == ClassifierReward(str(folder)).describe()
    assert (
        ClassifierReward(str(folder)).describe()["weights"]
        != ClassifierReward(str(other)).describe()["weights"]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"output": "score"}, "output: 'score'"),
        ({"dtype": "float16"}, "dtype: 'float16'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"max_length": 2}, "max_length: 2"),
        ({"device": "gpu"}, r"ClassifierReward\.device: gpu: no such device"),
    ],
)
def test_settings_that_cannot_work(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClassifierReward(**settings)


def test_refusals_when_it_is_used(folder: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    def refused(match: str, **settings) -> None:  # type: ignore[no-untyped-def]
        reward = ClassifierReward(**{"model": str(folder), **settings})
        with pytest.raises(UserError, match=match) as caught:
            reward(["a"], ["b"])
        assert "\n" not in str(caught.value)

    if not torch.cuda.is_available():
        refused(r"ClassifierReward\.device: cuda: there is no CUDA device", device="cuda")
    refused("no label 'JOY'; it has NEGATIVE, POSITIVE", label="JOY")
    refused("no label 2", label=2)
    refused("has 128 positions", max_length=129)
    refused("is no sequence classifier", model=str(tiny_gpt2))
    refused("is no folder", model=str(tmp_path / "nowhere"))
    refused("needs the network", model="lvwerra/distilbert-imdb", offline=True)
    refused("cannot be reached on the hub", model="lvwerra/no-such-thing")
    single = classifiers.gpt2(tmp_path / "single", labels=1)
    refused("has one output", model=str(single), output="probability")
    assert len(ClassifierReward(str(single))(["a"], ["b"])) == 1
    with pytest.raises(UserError, match="no tokens"):
        ClassifierReward(str(single))([""], [""])


def test_folders_whose_parts_do_not_fit(folder: Path, tmp_path: Path) -> None:
    def refused(match: str, name: str, *left_out: str, **config) -> None:  # type: ignore[no-untyped-def]
        copy = tmp_path / name
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(*left_out))
        known = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(known | config))
        with pytest.raises(UserError, match=f"^ClassifierReward.model: '{copy}' {match}"):
            ClassifierReward(str(copy))(["a"], ["b"])

    refused("has no tokenizer", "bare", "tokenizer*", "vocab*", "merges*", "special_tokens*")
    refused(r"cannot be loaded \(its weights have other shapes", "narrow", dim=8, n_heads=1)
    small = tmp_path / "small"
    shutil.copytree(folder, small)
    weights = load_file(small / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    save_file(weights | {name: weights[name][:9].clone()}, small / "model.safetensors", {"format": "pt"})
    known = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(known | {"vocab_size": 9}))
    with pytest.raises(UserError, match="has 9 embeddings, and its tokenizer gives ids up to"):
        ClassifierReward(str(small))(["a"], ["b"])


def test_a_score_that_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the score of 'a bad film' is nan"):
        ClassifierReward(str(tmp_path))(["a bad "], ["film"])
