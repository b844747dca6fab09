"""`tandem evaluate reward` on a tiny model and classifier: its file, its lines, its references and its refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from launch.commands.evaluate_reward import parser
from tests.launch.helpers import ROOT
from tests.rewards import classifiers
from trainer.policy.load import PolicyConfig, load_policy

CONFIG = """\
prompts:
  class_path: trainer.pairs.prompts.TextPrompts
  init_args: {{path: {texts}, tokens: 8, part: all}}
rewards:
  reward:
    class_path: trainer.rewards.classifier.ClassifierReward
    init_args: {{model: {model}}}
  negative:
    class_path: trainer.rewards.classifier.ClassifierReward
    init_args: {{model: {model}, label: NEGATIVE, output: probability}}
sampling: {{max_new_tokens: 5, seed: 4}}
samples: 2
threads: 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    texts, model = folder / "texts.txt", classifiers.distilbert(folder / "reward")
    texts.write_text("".join(f"Review {n} of a film\n" for n in range(1, 6)))
    (folder / "evaluation.yaml").write_text(CONFIG.format(texts=texts, model=model))
    return folder / "evaluation.yaml"


@pytest.fixture(scope="module")
def adapter(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter that changes something."""
    policy = load_policy(PolicyConfig(base=str(tiny_gpt2)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "default" in name:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    policy.save_pretrained(str(folder))
    return folder


def test_an_adapter_beside_its_base(
    config: Path, tiny_gpt2: Path, adapter: Path, tmp_path: Path, capsys
) -> None:  # type: ignore[no-untyped-def]
    def evaluated(name: str, *words: str) -> dict:
        output = tmp_path / f"{name}.json"
        given = ["evaluate", "reward", "--config", str(config), "--label", name, "--output", str(output)]
        assert main([*given, *words]) == 0
        return json.loads(output.read_text())

    trained = evaluated("DPO", "--adapter", str(adapter), "--base", str(tiny_gpt2))
    said = capsys.readouterr().out
    assert said.startswith("reward reward: ")
    assert "\nkl: " in said
    assert "\nfinished: " in said
    assert (trained["kind"], trained["label"]) == ("reward", "DPO")
    assert trained["rewards"]["reward"]["n"] == 10
    assert 0 < trained["rewards"]["negative"]["mean"] < 1
    assert trained["model"]["adapter"] == str(adapter)
    assert trained["sampling"] == {**trained["sampling"], "do_sample": True, "max_new_tokens": 5, "seed": 4}
    assert {"versions", "git", "prompt_source", "texts"} <= trained.keys()

    base = evaluated("Base", "--base", str(tiny_gpt2))
    assert base["kl"] is None
    assert "kl" not in capsys.readouterr().out
    assert base["examples"][0]["prompt"] == trained["examples"][0]["prompt"]
    # The KL divergence is from the adapter's base, which can be named as well.
    assert trained["kl"]["mean"] > 1e-3
    named = evaluated(
        "named", "--adapter", str(adapter), "--base", str(tiny_gpt2), "--reference", str(tiny_gpt2)
    )
    assert named["kl"]["mean"] == pytest.approx(trained["kl"]["mean"], rel=1e-4)
    own = evaluated("own", "--adapter", str(adapter), "--base", str(tiny_gpt2), "--reference", str(adapter))
    assert own["kl"]["mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--rewards", "{}"], "rewards: none is given"),
        (["--samples", "0"], "samples: 0"),
        (["--prompts.init_args.tokens", "400"], "no prompt is left"),
        (["--prompts.init_args.path", "/no/such.txt"], "no such file"),
        (["--output", "{folder}"], "is a folder"),
        (["--sampling.temperature", "0"], "temperature: 0"),
        (["--sampling.heat", "1"], "heat"),
        (["--config", "/no/such.yaml"], "no such config file"),
    ],
)
def test_mistakes_are_one_line(
    config: Path, tiny_gpt2: Path, tmp_path: Path, words, match: str, capsys
) -> None:  # type: ignore[no-untyped-def]
    given = ["evaluate", "reward", "--config", str(config), "--base", str(tiny_gpt2)]
    output = ["--output", str(tmp_path / "reward.json")]
    assert main([*given, *output, *(word.replace("{folder}", str(tmp_path)) for word in words)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("tandem: error: ")
    assert match in said
    assert not any(tmp_path.iterdir())


def test_a_reference_of_another_vocabulary(
    config: Path, tiny_gpt2: Path, tmp_path: Path, capsys, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("trainer.evaluation.reward.generate", None)
    other = tmp_path / "other"
    shutil.copytree(tiny_gpt2, other)
    words = AutoTokenizer.from_pretrained(other)
    words.add_tokens(["another"])
    words.save_pretrained(other)
    given = ["evaluate", "reward", "--config", str(config), "--base", str(tiny_gpt2)]
    given += ["--output", str(tmp_path / "reward.json"), "--reference", str(other)]
    assert main(given) == 2
    assert f"--reference: {other} has another vocabulary" in capsys.readouterr().err
    wider = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    wider.resize_token_embeddings(500)
    wider.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(other)
    assert main(given) == 2
    assert "(500 and " in capsys.readouterr().err


def test_the_shipped_config_is_read() -> None:
    given = parser().parse_args(
        ["--config", str(ROOT / "configs" / "imdb" / "evaluation.yaml"), "--output", "x.json"]
    )
    assert given.sampling.do_sample
    assert given.prompts.init_args.part == "held_out"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("sharded", [[], ["--sharded"]])
def test_two_ranks_have_the_numbers_of_one(
    config: Path, tiny_gpt2: Path, adapter: Path, tmp_path: Path, sharded
) -> None:  # type: ignore[no-untyped-def]
    given = [
        "evaluate",
        "reward",
        "--config",
        str(config),
        "--adapter",
        str(adapter),
        "--base",
        str(tiny_gpt2),
    ]
    given += ["--batch_size", "3"]
    assert main([*given, "--output", str(tmp_path / "one.json")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "launch.cli", *given, *sharded, "--output", str(tmp_path / "two.json")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("entropy:") == 1, "one rank speaks for both"
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["examples"] == two["examples"]
    for name in ("entropy", "kl", "length"):
        assert two[name]["mean"] == pytest.approx(one[name]["mean"], rel=1e-4)
    assert two["rewards"]["reward"]["mean"] == pytest.approx(one["rewards"]["reward"]["mean"], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--examples", "-1"], "examples: -1 where a whole number of 0 or more is needed"),
        (["--batch_size", "0"], "batch_size: 0 where a whole number of 1 or more is needed"),
        (["--base", ""], "--base: is empty; give a model, or leave it out"),
        (["--output", "{folder}"], "is a folder; give a file in it"),
        (["--output", "{folder}/texts.txt/r.json"], "texts.txt/r.json: cannot be written ("),
        (["--output", "/proc/nowhere/r.json"], "/proc/nowhere/r.json: cannot be written ("),
        (
            ["--rewards", '{"r": {"class_path": "tests.pairs.rewards.Unmade"}}'],
            "tests.pairs.rewards.Unmade: cannot be made (ZeroDivisionError: no letters)",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(
    config, tiny_gpt2, tmp_path, capsys, more, message
) -> None:
    (tmp_path / "texts.txt").write_text("a file")
    words = ["evaluate", "reward", "--config", str(config), "--base", str(tiny_gpt2)]
    more = [word.format(folder=tmp_path) if word.startswith("{folder}") else word for word in more]
    assert main([*words, "--output", str(tmp_path / "r.json"), *more]) == 2
    told = capsys.readouterr().err
    assert message in told.strip().splitlines()[-1]
    assert "generating" not in told
