"""RewardEvaluation with a tiny policy, reference and classifier: what is logged and written, when, on ranks too."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.reward_evaluation import RewardEvaluation
from launch.fit import TandemCLI
from tests.callbacks.language import LanguageModule
from tests.callbacks.tiny import fit, trainer
from tests.launch.helpers import ROOT, fit_config
from tests.rewards import classifiers
from trainer.generation import Sampling
from trainer.pairs.prompts import NoPrompt, TextPrompts
from trainer.rewards.classifier import ClassifierReward
from trainer.schema import UserError

SAMPLED = Sampling(max_new_tokens=5, do_sample=True, seed=3)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> ClassifierReward:
    return ClassifierReward(str(classifiers.distilbert(tmp_path_factory.mktemp("reward"))))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> TextPrompts:
    path = tmp_path_factory.mktemp("prompts") / "texts.txt"
    path.write_text("".join(f"Review {n} of a film\n" for n in range(6)))
    return TextPrompts(str(path), tokens=12, part="all")


def words(prompts, completions) -> list[float]:  # type: ignore[no-untyped-def]
    return [float(len(text)) for text in completions]


def lines(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "reward_evaluations.jsonl").read_text().splitlines()]


def test_what_is_logged_and_written(tmp_path: Path, tiny_llama: Path, prompts, reward) -> None:  # type: ignore[no-untyped-def]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    rewards = {"reward": reward, "characters": words}
    callback = RewardEvaluation(prompts, rewards, every_n_steps=2, samples=2, sampling=SAMPLED, examples=1)
    fit(trainer(tmp_path, callback, logger=logger), LanguageModule(tiny_llama), [1.0] * 5)
    found = lines(tmp_path)
    assert [each["step"] for each in found] == [0, 2, 4, 5]
    first, last = found[0], found[-1]
    # A fresh adapter changes nothing; training moves the policy away.
    assert first["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert last["kl"]["mean"] > 1e-3
    assert first["rewards"] != last["rewards"]
    assert first["prompts"] == 6
    assert first["rewards"]["reward"]["n"] == 12
    assert len(first["examples"]) == 1

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("reward/")}
    names = {"mean", "low", "high", "characters", "entropy", "kl", "self_similarity", "length"}
    assert tags == {f"reward/{name}" for name in names | {f"distinct_{n}" for n in (1, 2, 3)}}
    for tag, value in (
        ("mean", lambda each: each["rewards"]["reward"]["mean"]),
        ("high", lambda each: each["rewards"]["reward"]["interval"][1]),
        ("characters", lambda each: each["rewards"]["characters"]["mean"]),
        ("entropy", lambda each: each["entropy"]["mean"]),
        ("distinct_2", lambda each: each["distinct_2"]),
    ):
        logged = events.Scalars(f"reward/{tag}")
        assert [event.step for event in logged] == [0, 2, 4, 5]
        assert [event.value for event in logged] == pytest.approx([value(each) for each in found])


def test_without_a_reference_there_is_no_kl(tmp_path: Path, tiny_llama: Path) -> None:
    callback = RewardEvaluation(NoPrompt(3), {"characters": words}, sampling=SAMPLED)
    fit(trainer(tmp_path, callback), LanguageModule(tiny_llama, reference=False), [1.0])
    assert [each["kl"] for each in lines(tmp_path)] == [None, None]


def test_training_draws_the_same_random_numbers(tmp_path: Path, tiny_llama: Path, prompts, reward) -> None:  # type: ignore[no-untyped-def]
    def losses(*callbacks: RewardEvaluation) -> list[float]:
        module = LanguageModule(tiny_llama)
        module.policy.get_base_model().register_forward_hook(lambda *_: torch.rand(1) and None)
        fit(trainer(tmp_path, *callbacks), module, [1.0] * 4)
        assert all(p.requires_grad == ("default" in n) for n, p in module.policy.named_parameters())
        return module.losses

    without = losses()
    assert losses(RewardEvaluation(prompts, {"reward": reward}, every_n_steps=1, sampling=SAMPLED)) == without
    assert len(set(without)) == 4


def test_a_resumed_run_writes_each_step_once(tmp_path: Path, tiny_llama: Path) -> None:
    def run(resume: str | None) -> list[dict]:
        callback = RewardEvaluation(NoPrompt(3), {"characters": words}, every_n_steps=2, sampling=SAMPLED)
        saver = ImprovedLossCheckpoint(save_steps=1, keep=-1)
        path = tmp_path / "checkpoints" / resume if resume else None
        fit(trainer(tmp_path, callback, saver), LanguageModule(tiny_llama), [1.0] * 5, resume=path)
        return lines(tmp_path)

    assert [each["step"] for each in run(None)] == [0, 2, 4, 5]
    with open(tmp_path / "reward_evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 5, "ep')
    assert [each["step"] for each in run("step-00000003")] == [0, 2, 4, 5]
    assert [each["step"] for each in run("step-00000005")] == [0, 2, 4, 5]
    assert [each["step"] for each in run(None)] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompts": None}, "prompts: is missing"),
        ({"rewards": {}}, "rewards: none is given"),
        ({"every_n_steps": 0}, "every_n_steps: 0"),
        ({"samples": 0}, "samples: 0"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"examples": -1}, "examples: -1"),
        ({"samples": 2, "sampling": Sampling(max_new_tokens=2)}, "samples: 2"),
        ({"rewards": {"first": words, "entropy": words}}, "'entropy' is another"),
        ({"rewards": {"first": words, "low": words}}, "'low' is another"),
    ],
)
def test_misconfigured(tmp_path: Path, tiny_llama: Path, settings: dict, match: str) -> None:
    given = {"prompts": NoPrompt(3), "rewards": {"characters": words}, **settings}
    with pytest.raises(UserError, match=match):
        fit(trainer(tmp_path, RewardEvaluation(**given)), LanguageModule(tiny_llama), [1.0])


def test_a_reward_that_fails_ends_the_run_with_a_line(tmp_path: Path, tiny_llama: Path) -> None:
    def broken(prompts, completions) -> list[float]:  # type: ignore[no-untyped-def]
        raise KeyError("gone")

    with pytest.raises(UserError, match=r"broken: fails at '', the first of 3 prompts \(KeyError: 'gone'\)"):
        fit(
            trainer(tmp_path, RewardEvaluation(NoPrompt(3), {"broken": broken})),
            LanguageModule(tiny_llama),
            [1.0],
        )


def test_fit_has_it_where_prompts_are_given(tmp_path: Path, tiny_llama: Path) -> None:
    config = str(fit_config(tmp_path, tiny_llama))
    assert TandemCLI(["--config", config], "inspect").config.reward_evaluation.prompts is None
    prompts = {"class_path": "trainer.pairs.prompts.NoPrompt", "init_args": {"count": 2}}
    rewards = {
        "reward": {
            "class_path": "trainer.rewards.classifier.ClassifierReward",
            "init_args": {"model": "here"},
        }
    }
    given = [
        "--reward_evaluation.prompts",
        json.dumps(prompts),
        "--reward_evaluation.rewards",
        json.dumps(rewards),
    ]
    read = TandemCLI(
        ["--config", config, *given, "--reward_evaluation.sampling.max_new_tokens", "7"], "inspect"
    ).config
    assert read.reward_evaluation.prompts.init_args.count == 2
    assert read.reward_evaluation.rewards["reward"].init_args.model == "here"
    assert read.reward_evaluation.sampling.max_new_tokens == 7
    assert read.reward_evaluation.sampling.do_sample


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_have_the_numbers_of_one(
    tmp_path: Path, tiny_llama: Path, reward, strategy, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    """A run of `fit` on one and on two ranks: before training, and after, all figures are the same."""
    config = fit_config(tmp_path, tiny_llama, steps=2)
    (tmp_path / "prompts.txt").write_text("".join(f"Review {n} of a film\n" for n in range(5)))
    prompts = {"path": str(tmp_path / "prompts.txt"), "tokens": 12, "part": "all"}
    settings = {
        "prompts": {"class_path": "trainer.pairs.prompts.TextPrompts", "init_args": prompts},
        "rewards": {
            "reward": {
                "class_path": "trainer.rewards.classifier.ClassifierReward",
                "init_args": {"model": reward.model},
            }
        },
        "samples": 2,
        "sampling": {"do_sample": True, "max_new_tokens": 5},
        "batch_size": 2,
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(name: str, *more: str) -> list[dict]:
        words = [
            "fit",
            "--config",
            str(config),
            "--run",
            str(tmp_path / name),
            "--reward_evaluation",
            json.dumps(settings),
        ]
        command = [sys.executable, "-m", "launch", *words, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return lines(tmp_path / name)

    one = run("one")
    two = run("two", "--trainer.devices", "2", "--trainer.strategy", strategy, "--rank_timeout", "60")
    assert [each["step"] for each in one] == [each["step"] for each in two] == [0, 2]
    assert one[1]["kl"]["mean"] > 1e-4
    for before, after in zip(one, two, strict=True):
        assert after["rewards"]["reward"]["mean"] == pytest.approx(
            before["rewards"]["reward"]["mean"], abs=1e-3
        )
        assert after["kl"]["mean"] == pytest.approx(before["kl"]["mean"], abs=1e-4, rel=1e-3)
        assert after["entropy"]["mean"] == pytest.approx(before["entropy"]["mean"], rel=1e-4)
        assert [each["completion"] for each in after["examples"]] == [
            each["completion"] for each in before["examples"]
        ]
