"""Every shipped YAML is read by the command that it is for."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.building import build
from launch.cli import main
from launch.commands import evaluate_reward as reward_command
from launch.commands import evaluate_win_rate as win_rate_command
from launch.commands import pairs as pairs_command
from launch.commands import pairs_prompts as prompts_command
from launch.commands import scratch as scratch_command
from launch.commands import spin as spin_command
from launch.commands.evaluate_letters import parser as evaluation
from launch.errors import check_yaml
from launch.fit import TandemCLI
from launch.scratch.lessons import Lessons, write_lessons
from launch.self_play import parser as self_play_parser
from launch.sources import text_source
from launch.stages import load_recipe, plan
from tests.launch.helpers import ROOT
from trainer.data.sources import HubTexts, Source, TextSource
from trainer.judges import Judge
from trainer.pairs.prompts import PromptSource
from trainer.pairs.rubric import Rubric

CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RECIPES = [path for path in FILES if "stages" in (check_yaml(path) or {})]
TEXTS = [path for path in FILES if path.name.endswith("texts.yaml")]
HARDWARE = sorted((CONFIGS / "hardware").glob("*.yaml"))
STAGES = [path for path in FILES if {"model", "data"} <= {*(check_yaml(path) or {})}]
LETTERS = [path for path in STAGES if path.parent.name == "letters"]
# Read by launch/train_base.py, not by `fit`.
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
COMMANDS = {
    "imdb/*pairs*.yaml": lambda: pairs_command.build_parser("best-of-n"),
    "oasst_ru/*pairs*.yaml": lambda: pairs_command.build_parser("self-judge"),
    "imdb/*evaluation*.yaml": reward_command.parser,
    "oasst_ru/*evaluation*.yaml": reward_command.parser,
    "oasst_ru/instructions.yaml": prompts_command.parser,
    "hh_rlhf/win_rate.yaml": win_rate_command.parser,
    "spin/chats.yaml": spin_command.reformat_parser,
    "spin/*generate.yaml": spin_command.generate_parser,
    "*/tiny_base.yaml": lambda: scratch_command.model_parser("generator"),
    "*/tiny_generator.yaml": lambda: scratch_command.model_parser("generator"),
    "*/tiny_chat.yaml": lambda: scratch_command.model_parser("chat"),
    "*/tiny_reward.yaml": lambda: scratch_command.model_parser("classifier"),
}
"""Configs of other commands, and the parser that reads them."""
OF_COMMANDS = {path: parser for sign, parser in COMMANDS.items() for path in sorted(CONFIGS.glob(sign))}
CLASSES = {"judges/*.yaml": Judge, "hh_rlhf/rows.yaml": Source, "*/*prompts.yaml": PromptSource}
"""Objects that other configs name by their file, and what they are."""
_OTHERS = {path: kind for sign, kind in CLASSES.items() for path in sorted(CONFIGS.glob(sign))}
OF_CLASSES = {path: kind for path, kind in _OTHERS.items() if path not in OF_COMMANDS}
LESSONS = sorted(CONFIGS.glob("*/*lessons.yaml"))
RUBRICS = [path for path in FILES if "criteria" in (check_yaml(path) or {})]


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def parsed(*files: str):
    return TandemCLI([word for file in files for word in ("--config", file)], "inspect")


@pytest.fixture(autouse=True, scope="module")
def _in_the_checkout():
    with contextlib.chdir(ROOT):
        yield


def test_every_file_is_of_a_known_kind():
    assert (
        sorted([*RECIPES, *TEXTS, *HARDWARE, *STAGES, *MODELS, *OF_COMMANDS, *OF_CLASSES, *RUBRICS, *LESSONS])
        == FILES
    )


@pytest.mark.parametrize("file", named([*OF_COMMANDS]))
def test_configs_of_other_commands(file):
    given = OF_COMMANDS[ROOT / file]().parse_args(["--config", file, "--output", "out"])
    for key in check_yaml(file):
        assert key in given


@pytest.mark.parametrize("file", named([*OF_CLASSES]))
def test_files_that_name_a_class(file):
    assert isinstance(build(OF_CLASSES[ROOT / file], check_yaml(file), file), OF_CLASSES[ROOT / file])


@pytest.mark.parametrize("file", named(RUBRICS))
def test_rubrics(file):
    assert len(Rubric.read(file).criteria) == 5


@pytest.mark.parametrize("file", named(LESSONS))
def test_lessons(file, tmp_path):
    made = Lessons(file, "configs/oasst_ru/rubric_ru.yaml", answers=20, marks=20)
    assert write_lessons(made, tmp_path)["instructions"] > 100


@pytest.mark.parametrize("file", named(STAGES))
def test_stage_configs(file):
    cli = parsed(file)
    assert cli.data_only().batch_size == cli.config.data.init_args.batch_size


@pytest.mark.parametrize("file", named(LETTERS))
def test_stages_of_letters(file):
    data = parsed(file).data_only()
    assert data.source.prompt_template == "Repeat: {text}\n"
    assert isinstance(data.source.texts, TextSource)


@pytest.mark.parametrize("file", named(HARDWARE))
def test_hardware_stacks_on_a_stage(file):
    cli = parsed("configs/letters/dpo.yaml", file)
    assert cli.config.trainer.accelerator == check_yaml(file)["trainer"]["accelerator"]
    assert cli.config.trainer.max_steps == check_yaml("configs/letters/dpo.yaml")["trainer"]["max_steps"]


@pytest.mark.parametrize("file", named(TEXTS))
def test_text_sources(file):
    source = text_source(file)
    if not isinstance(source, HubTexts):
        assert len(source.load().rows) > 1000


@pytest.mark.parametrize("file", named(RECIPES))
def test_recipes_and_the_configs_that_they_name(file):
    steps = plan(load_recipe(Path(file)), {})
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert all(config.is_file() for config in step.configs)
        if step.command[0] == "fit":
            TandemCLI(step.words[1:], "inspect")


def test_letters_compares_equal_numbers_of_steps():
    names = load_recipe(CONFIGS / "letters" / "recipe.yaml").names
    assert names["sft_long_steps"] == names["sft_steps"] + names["dpo_steps"]


def test_sft_and_dpo_share_texts_and_the_reference_is_the_start():
    sft, dpo = (parsed(f"configs/letters/{name}.yaml").config for name in ("sft", "dpo"))
    assert sft.data.init_args.source.init_args.texts == dpo.data.init_args.source.init_args.texts
    reference = dpo.model.init_args.reference
    assert (reference.kind, reference.adapter) == ("shared", "start")


@pytest.mark.parametrize("recipe", ["recipe", "llama2_7b"])
def test_training_and_evaluation_part_the_texts_alike(recipe):
    shares = '{"sft": 0.2, "dpo": 0.2, "evaluation": 0.6}'
    for step in plan(load_recipe(CONFIGS / "letters" / f"{recipe}.yaml"), {"shares": shares}):
        if step.command[0] == "fit":
            config = TandemCLI(step.words[1:], "inspect").config
            given = config.data.init_args.source.init_args.stage_shares
        elif step.command[0] == "evaluate":
            given = evaluation().parse_args(list(step.words[2:])).stage_shares
        else:
            continue
        assert given == {"sft": 0.2, "dpo": 0.2, "evaluation": 0.6}


def test_the_long_sft_is_evaluated_at_its_last_step():
    steps = {step.name: step for step in plan(load_recipe(CONFIGS / "letters" / "recipe.yaml"), {})}
    given = evaluation().parse_args(list(steps["evaluate_sft_long"].words[2:]))
    assert given.adapter == "runs/letters/sft_long/checkpoints/last"
    # Listed under the same name, so that its content counts once it is there.
    assert given.adapter in steps["evaluate_sft_long"].inputs


@pytest.fixture(scope="module")
def llama_stages(tmp_path_factory, models):
    """Two optimizer steps of each Llama-2-7B config as it stands, on a tiny Llama and generated texts."""
    folder = tmp_path_factory.mktemp("llama")
    texts = folder / "texts.yaml"
    texts.write_text("class_path: trainer.data.sources.GeneratedTexts\ninit_args: {count: 200}\n")
    runs = {name: folder / name for name in ("sft", "dpo")}
    for name, run in runs.items():
        words = ["fit", "--config", f"configs/letters/llama2_7b_{name}.yaml", "--threads", "1"]
        words += ["--config", "configs/hardware/cpu.yaml", "--run", str(run), "--trainer.max_steps", "2"]
        words += ["--model.policy.base", str(models("llama")), "--data.source.texts", str(texts)]
        words += ["--checkpoint.save_steps", "1", "--data.max_length", "512"]
        words += ["--samples.sampling.max_new_tokens", "4", "--trainer.enable_progress_bar", "false"]
        words += ["--model.policy.start", str(runs["sft"])] if name == "dpo" else []
        assert main(words) == 0
    return runs


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_llama_s_configs_really_train(stage, llama_stages):
    run = llama_stages[stage]
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["step"]) == ("finished", 2)
    assert manifest["model"]["policy"]["dtype"] == "bfloat16"
    assert manifest["data"]["batch_size"] == 16
    adapter = load_file(run / "checkpoints" / "last" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert any((tensor != 1).any() for tensor in adapter.values())
    if stage == "dpo":
        losses = EventAccumulator(str(run)).Reload().Scalars("train/loss")
        assert losses[0].value == pytest.approx(math.log(2), abs=1e-6)
        assert manifest["reference"]["before"] == manifest["reference"]["after"] is not None


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_llama_has_the_published_settings(stage):
    config = parsed(f"configs/letters/llama2_7b_{stage}.yaml").config
    policy, data = config.model.init_args.policy, config.data.init_args
    assert policy.base == "NousResearch/Llama-2-7b-hf"
    assert policy.adapter.kind == "ia3"
    assert data.batch_size == 16
    assert config.trainer.max_epochs == 5
    assert config.model.init_args.optimizer.lr == 1e-4
    assert config.samples.sampling.do_sample
    assert config.samples.sampling.max_new_tokens == 100
    texts = data.source.init_args.texts
    assert texts.init_args.dataset == "MoritzLaurer/multilingual-NLI-26lang-2mil7"
    assert texts.init_args.split == "ru_mnli"


def test_spin_has_the_published_settings():
    config = parsed("configs/spin/published.yaml").config
    model, data = config.model.init_args, config.data.init_args
    assert (model.optimizer.name, model.optimizer.lr, model.objective.beta) == ("rmsprop", 5e-7, 0.1)
    assert (model.schedule.name, model.schedule.warmup_ratio) == ("linear", 0.1)
    assert (config.trainer.max_epochs, data.max_length) == (3, 1024)


@pytest.mark.parametrize("name", ["published", "lora", "ia3"])
def test_the_opponent_is_what_the_main_player_starts_as(name):
    model = parsed(f"configs/spin/{name}.yaml").config.model.init_args
    assert (model.objective.loss, model.reference.adapter) == ("sigmoid", "start")
    assert (model.reference.kind == "sharded") == (model.policy.adapter is None)


@pytest.mark.parametrize("recipe", ["recipe", "zephyr_7b"])
def test_the_recipes_of_spin_play_all_iterations(recipe):
    """Their first opponent is what SFT made, or the base, and they end with a lineage."""
    steps = {step.name: step for step in plan(load_recipe(CONFIGS / "spin" / f"{recipe}.yaml"), {})}
    given = self_play_parser().parse_args(list(steps["self_play"].words[2:]))
    assert (given.iterations, given.input_dir) == (3, str(steps["formatted"].folder))
    assert given.model == (
        f"{steps['sft'].folder}/checkpoints/best"
        if "sft" in steps
        else "alignment-handbook/zephyr-7b-sft-full"
    )
    assert steps["self_play"].folder / "lineage.json" in steps["self_play"].outputs
