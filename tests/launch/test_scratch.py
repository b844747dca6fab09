"""Small models from scratch: parts that share no text, models that others load, the same from the same seed."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch.cli import main
from launch.commands.scratch import model_parser
from launch.scratch.models import Shape
from launch.scratch.texts import Texts, Windows, read, write_parts
from launch.scratch.training import Learning, Settings, make_classifier, make_generator
from tests.launch.helpers import ROOT
from trainer.generation import Sampling, generate
from trainer.policy.load import PolicyConfig, load_frozen, load_tokenizer
from trainer.rewards.classifier import ClassifierReward
from trainer.schema import UserError

SMALL = Shape(vocabulary=400, width=32, layers=1, heads=2, positions=32)
GOOD, BAD = (
    ("a wonderful film", "truly great acting", "I loved it"),
    ("an awful film", "truly bad acting", "I hated it"),
)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose labels are plain from their words."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    rows = [
        {"text": f"Film {n}: {words[n % 3]}, {words[(n // 3) % 3]}.", "label": label}
        for n in range(120)
        for label, words in ((0, BAD), (1, GOOD))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(path: Path, steps: int, **learning) -> Settings:  # type: ignore[no-untyped-def]
    return Settings(Texts(str(path)), SMALL, Learning(steps, 16, shortest=8, **learning), threads=1)


# --- parts


def test_parts_share_no_text_and_lose_none(reviews: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    shares = {"generator": 0.5, "reward": 0.3, "prompts": 0.2}

    def deal(path: Path, output: Path) -> dict[str, list[str]]:
        words = ["parts", "--path", str(path), "--shares", json.dumps(shares), "--output", str(output)]
        assert main(["scratch", *words]) == 0
        return {name: (output / f"{name}.jsonl").read_text().splitlines() for name in shares}

    parts = deal(reviews, tmp_path / "all")
    lines = reviews.read_text().splitlines()
    assert sorted(line for part in parts.values() for line in part) == sorted(lines)
    assert all(0.5 * share < len(parts[name]) / len(lines) < 1.5 * share for name, share in shares.items())
    # Which part a text is in does not depend on what else there is.
    (tmp_path / "half.jsonl").write_text("\n".join(lines[::-2]) + "\n")
    half = deal(tmp_path / "half.jsonl", tmp_path / "half")
    assert all(set(half[name]) <= set(parts[name]) for name in shares)
    written = json.loads((tmp_path / "all" / "parts.json").read_text())
    assert written["counts"] == {name: len(part) for name, part in parts.items()}
    assert f"generator: {len(parts['generator'])} texts" in capsys.readouterr().out


@pytest.mark.parametrize("shares", ['{"a": 0.5}', '{"a": 1.5, "b": -0.5}', "{}"])
def test_shares_that_cannot_be(reviews: Path, tmp_path: Path, shares: str, capsys) -> None:  # type: ignore[no-untyped-def]
    words = ["--path", str(reviews), "--shares", shares, "--output", str(tmp_path)]
    assert main(["scratch", "parts", *words]) == 2
    assert "sum to 1" in capsys.readouterr().err


def test_parts_can_be_joined(reviews: Path, tmp_path: Path) -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    counts = write_parts(Texts(str(reviews)), shares, tmp_path, joined={"both": ["a", "c"]})
    assert counts["both"] == counts["a"] + counts["c"]
    lines = {name: (tmp_path / f"{name}.jsonl").read_text() for name in counts}
    assert lines["both"] == lines["a"] + lines["c"]
    for name, members in (("a", ["b"]), ("both", ["d"]), ("both", [])):
        with pytest.raises(UserError, match=f"--join {name}: should have a new name"):
            write_parts(Texts(str(reviews)), shares, tmp_path, joined={name: members})


def test_texts_come_once(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("One film.", "  ", "one  FILM.", "Two films.")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(Texts(str(tmp_path / "texts.jsonl")), labelled=False) == [
        ("One film.", None),
        ("Two films.", None),
    ]


def test_lines_are_cut_in_two(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    lines = [f"line number {n} goes  on for {n} words" for n in range(60)]
    (tmp_path / "lines.txt").write_text("\n".join([*lines, lines[3], "too short"]))
    words = ["halves", "--path", str(tmp_path / "lines.txt"), "--output", str(tmp_path / "halves")]
    assert main(["scratch", *words]) == 0
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"halves/{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test", "texts")
    }
    assert f"train: {len(rows['train'])} lines" in (said := capsys.readouterr().out)
    assert "left out: 1 lines" in said
    whole = {name: [row["prompt"] + row["completion"] for row in rows[name]] for name in ("train", "test")}
    assert sorted(whole["train"] + whole["test"]) == sorted(" ".join(line.split()) for line in lines)
    assert [row["text"] for row in rows["texts"]] == whole["train"]
    assert 3 <= len(rows["test"]) <= 24
    assert rows["train"][0]["prompt"].split() == rows["texts"][0]["text"].split()[:4]
    # Where a line goes does not depend on what else there is.
    (tmp_path / "fewer.txt").write_text("\n".join(lines[::2]))
    assert (
        main(["scratch", "halves", "--path", str(tmp_path / "fewer.txt"), "--output", str(tmp_path / "f")])
        == 0
    )
    fewer = [json.loads(line) for line in (tmp_path / "f/test.jsonl").read_text().splitlines()]
    assert all(row in rows["test"] for row in fewer)


def test_lines_of_a_text_source(tmp_path: Path) -> None:
    made = tmp_path / "made.yaml"
    made.write_text(
        "class_path: trainer.data.sources.GeneratedTexts\ninit_args: {count: 30, languages: [en], seed: 4}\n"
    )
    assert main(["scratch", "halves", "--path", str(made), "--output", str(tmp_path / "halves")]) == 0
    assert (
        sum(json.loads((tmp_path / "halves/halves.json").read_text())["counts"][n] for n in ("train", "test"))
        == 30
    )


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        ("", [], "no text"),
        ("one two\n", [], "leave train.jsonl empty"),
        ("a b c d\n" * 9, ["--test_fraction", "1"], "--test_fraction 1.0"),
        (None, [], "lines.txt"),
    ],
)
def test_lines_that_cannot_be_cut(content, words, told, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    if content is not None:
        (tmp_path / "lines.txt").write_text(content)
    given = ["--path", str(tmp_path / "lines.txt"), "--output", str(tmp_path / "halves"), *words]
    assert main(["scratch", "halves", *given]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1


# --- windows


def test_windows_come_from_seed_and_number_alone() -> None:
    rows = [list(range(10 * i, 10 * i + n)) for i, n in ((1, 9), (2, 4), (3, 7))]
    first, again, other = (Windows(rows, [5, 6, 7], (3, 5), 0, 30, seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    for start in range(0, 30, 3):
        assert sorted(first[i]["labels"] for i in range(start, start + 3)) == [5, 6, 7]
    for item in first:
        ids = item["input_ids"][1:]
        assert item["input_ids"][0] == 0
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert 2 <= len(ids) <= 4
    starts = [item["input_ids"][1] % 10 for item in first if item["labels"] == 5]
    assert 0 in starts
    assert len(set(starts)) > 1


# --- models


@pytest.fixture(scope="module")
def generator(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scratch") / "generator"
    figures = make_generator(settings(reviews, 60, lr=5e-3), folder)
    # Chance is the vocabulary's size, some 350.
    assert figures["perplexity"] < 60
    return folder


def test_a_generator_is_a_base_like_any(generator: Path) -> None:
    config = PolicyConfig(str(generator), adapter=None)
    tokenizer = load_tokenizer(str(generator))
    ids = tokenizer("Film 3: ").input_ids
    assert ids[0] == tokenizer.bos_token_id
    answer = generate(load_frozen(config), tokenizer, [ids], Sampling(max_new_tokens=8))[0]
    assert answer.text
    assert (
        tokenizer.decode(tokenizer("Привет, <br />!").input_ids, skip_special_tokens=True)
        == "Привет, <br />!"
    )
    assert (
        AutoModelForCausalLM.from_pretrained(generator).generation_config.eos_token_id
        == tokenizer.eos_token_id
    )


def test_nothing_pickled_is_left(generator: Path) -> None:
    assert sorted(path.name for path in generator.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "scratch.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not any(generator.parent.glob(".*"))


def test_the_same_seed_gives_the_same_weights(reviews: Path, tmp_path: Path) -> None:
    def weights(seed: int, name: str) -> dict[str, torch.Tensor]:
        given = settings(reviews, 3)
        make_generator(Settings(given.texts, given.shape, given.learning, seed, 1), tmp_path / name)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    first, again, other = weights(0, "a"), weights(0, "b"), weights(1, "c")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_classifier_is_a_reward(reviews: Path, tmp_path: Path) -> None:
    figures = make_classifier(settings(reviews, 60, lr=5e-3, token_dropout=0.1), tmp_path / "reward")
    assert figures["accuracy"] > 0.9
    reward = ClassifierReward(str(tmp_path / "reward"))
    good, shouted, bad = reward(["Film 900: "] * 3, ["I loved it.", "I LOVED IT.", "I hated it."])
    assert good == shouted > 1 > -1 > bad
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "reward")("a")["input_ids"]) == 2


def test_labels_in_words(tmp_path: Path) -> None:
    rows = [{"text": f"{word} {n}", "mood": word} for n in range(40) for word in ("glad", "sad", "cross")]
    (tmp_path / "moods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = Texts(str(tmp_path / "moods.jsonl"), label="mood")
    make_classifier(Settings(texts, SMALL, Learning(2, 4, shortest=8), threads=1), tmp_path / "reward")
    assert ClassifierReward(str(tmp_path / "reward"), label="glad").describe()["label"] == 1


# --- the command


def test_the_command_and_its_config(reviews: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "generator.yaml"
    config.write_text(
        "shape: {vocabulary: 400, width: 32, layers: 1, heads: 2, positions: 32}\n"
        "learning: {steps: 2, batch_size: 4, shortest: 8}\nthreads: 1\n"
    )
    words = ["scratch", "generator", "--config", str(config), "--texts.path", str(reviews)]
    assert main([*words, "--output", str(tmp_path / "made")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("loss: ")
    assert "\nperplexity: " in said.out
    assert json.loads((tmp_path / "made" / "scratch.json").read_text())["settings"]["learning"]["steps"] == 2
    # Again over its own, but not over what is none of it.
    assert main([*words, "--output", str(tmp_path / "made")]) == 0
    assert main([*words, "--output", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--shape.width", "30", "--shape.heads", "4"], "multiple of heads"),
        (["--shape.vocabulary", "100"], "vocabulary 100"),
        (["--learning.longest", "999"], "shape.positions"),
        (["--learning.token_dropout", "0.5"], "no effect on a generator"),
        (["--learning.steps", "0"], "steps 0"),
        (["--texts.column", "review"], "no column 'review'"),
        (["--texts.validation_fraction", "1.0"], "validation_fraction: 1.0"),
        (["--learning.stepz", "3"], "stepz"),
    ],
)
def test_mistakes_are_one_line(reviews: Path, tmp_path: Path, change: list[str], words: str, capsys) -> None:  # type: ignore[no-untyped-def]
    given = [
        "scratch",
        "generator",
        "--texts.path",
        str(reviews),
        "--output",
        str(tmp_path / "made"),
        *change,
    ]
    assert main(given) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tandem: error: ")
    assert words in said
    assert not (tmp_path / "made").exists()


def test_kinds_are_told_and_misspelt_ones_guessed(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["scratch", "--help"]) == 0
    assert "classifier  train a classifier" in capsys.readouterr().out
    assert main(["scratch", "genrator"]) == 2
    assert "scratch genrator: no such kind; did you mean generator?" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_a_config_s_mistakes_name_file_and_key(kind: str, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    config = tmp_path / "made.yaml"
    for content, told in (
        ("learning: {steps: many}\n", "learning.steps: 'many' where int is needed"),
        ("shape: [1\n", "not valid YAML"),
    ):
        config.write_text(content)
        words = [
            "scratch",
            kind,
            "--config",
            str(config),
            "--texts.path",
            "x",
            "--output",
            str(tmp_path / "m"),
        ]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"tandem: error: {config}: ")
        assert told in line


def test_one_label_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "film {n}", "label": 1}}\n' for n in range(40)))
    with pytest.raises(UserError, match="column 'label' holds 1; there should be two"):
        make_classifier(settings(tmp_path / "a.jsonl", 1), tmp_path / "reward")


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("configs/*/tiny_generator.yaml")), ids=lambda path: path.parent.name
)
def test_shipped_generators(file: Path) -> None:
    _read("generator", file)


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("configs/*/tiny_reward.yaml")), ids=lambda path: path.parent.name
)
def test_shipped_classifiers(file: Path) -> None:
    _read("classifier", file)


def _read(kind: str, file: Path) -> None:
    parser = model_parser(kind)
    given = parser.instantiate(parser.parse_args(["--config", str(file), "--output", "x"]))
    assert given.learning.lengths(given.shape)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--threads", "0"], "threads: 0 is not possible"),
        (["--seed", "-1"], "seed: -1 is not possible; give 0 to 4294967295"),
        (["--learning.lr", "-1"], "lr -1.0 and weight_decay"),
        (["--learning.lr", "1e9"], "gave a loss of nan, and nothing is written; give a lower one"),
    ],
)
def test_a_model_that_is_there_stays_where_another_cannot_be_made(
    generator: Path, reviews: Path, tmp_path: Path, change: list[str], words: str, capsys
) -> None:  # type: ignore[no-untyped-def]
    there = tmp_path / "there"
    shutil.copytree(generator, there)
    given = ["scratch", "generator", "--texts.path", str(reviews), "--output", str(there)]
    small = ["--shape.width", "32", "--shape.layers", "1", "--shape.positions", "32", "--learning.steps", "5"]
    assert main([*given, *small, "--learning.shortest", "8", *change]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert (there / "model.safetensors").read_bytes() == (generator / "model.safetensors").read_bytes()


def test_a_disk_that_takes_no_more_is_an_error_of_the_system(reviews: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match="not written, what was there before is untouched") as caught:
            make_generator(settings(reviews, 1), tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("label", [None, [1], {"a": 1}, " "])
def test_labels_that_are_none(tmp_path: Path, label: object) -> None:
    rows = [{"text": f"film {n}", "label": label if n == 7 else n % 2} for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="beside 'film 7'; it should be a number or a word"):
        make_classifier(settings(tmp_path / "a.jsonl", 1), tmp_path / "reward")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_names_of_parts_stay_in_their_folder(reviews: Path, tmp_path: Path, name: str, capsys) -> None:  # type: ignore[no-untyped-def]
    output = tmp_path / "parts"
    words = ["scratch", "parts", "--path", str(reviews), "--output", str(output)]
    for more in (
        ["--shares", json.dumps({name: 0.5, "b": 0.5})],
        ["--shares", '{"a": 0.5, "b": 0.5}', "--join", json.dumps({name: ["a"]})],
    ):
        assert main([*words, *more]) == 2
        assert f"part {name!r}: is to name a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_says_that_parts_are_there_goes_before_they_do(reviews: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    write_parts(Texts(str(reviews)), {"a": 0.5, "b": 0.5}, output)
    (output / "b.jsonl").unlink()
    (output / "b.jsonl").mkdir()
    with pytest.raises(OSError):
        write_parts(Texts(str(reviews)), {"a": 0.5, "b": 0.5}, output)
    assert not (output / "parts.json").exists()
