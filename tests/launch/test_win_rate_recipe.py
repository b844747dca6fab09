"""The hh_rlhf configs: what the published system set, and the recipes whole, from rows to win rates and report."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from launch.cli import main
from launch.commands.evaluate_win_rate import parser
from launch.errors import check_yaml
from launch.fit import TandemCLI
from launch.stages import load_recipe, missing, plan
from tests.judges.conftest import gguf  # noqa: F401
from tests.launch.helpers import ROOT
from tests.launch.test_win_rate import rows
from trainer.judges.llamacpp import LlamaCppJudge

HH = ROOT / "configs" / "hh_rlhf"


@pytest.fixture(autouse=True, scope="module")
def _in_the_checkout():
    with contextlib.chdir(ROOT):
        yield


def settings(name: str):
    return TandemCLI(["--config", f"configs/hh_rlhf/{name}.yaml"], "inspect")


def test_the_published_settings() -> None:
    cli = settings("published")
    model, data, trainer = cli.config.model.init_args, cli.config.data.init_args, cli.config.trainer
    assert (model.policy.base, model.policy.adapter.kind) == ("openai-community/gpt2", "lora")
    assert (data.batch_size, model.optimizer.lr, model.objective.beta) == (5, 1e-6, 0.1)
    assert (model.schedule.warmup_steps, trainer.max_epochs) == (150, 300)
    (stopping,) = trainer.callbacks
    assert (stopping.class_path.rpartition(".")[2], stopping.init_args.patience) == ("EarlyStopping", 50)
    assert stopping.init_args.monitor == cli.config.checkpoint.monitor == "val/loss"
    # One validation an epoch.
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (None, 1)
    assert (load_recipe(HH / "recipe.yaml").names["examples"], data.source.init_args.path) == (
        3000,
        "Anthropic/hh-rlhf",
    )


def test_ia3_has_a_learning_rate_that_moves_it() -> None:
    model = settings("ia3").config.model.init_args
    assert (model.policy.adapter.kind, model.optimizer.lr) == ("ia3", 1e-3)


@pytest.mark.parametrize("name", ["recipe", "tiny"])
def test_training_and_questions_come_from_the_same_rows(name) -> None:
    steps = {step.name: step for step in plan(load_recipe(HH / f"{name}.yaml"), {"rows": "other.jsonl"})}
    trained = TandemCLI(steps["dpo"].words[1:], "inspect").config.data.init_args.source
    asked = parser().parse_args(list(steps["win_rate"].words[2:])).data
    assert trained.init_args.path == asked.init_args.path == "other.jsonl"
    for each in ("prompt_ends", "test_fraction", "validation_fraction", "broken", "empty"):
        assert trained.init_args[each] == asked.init_args[each]
    assert trained.init_args.test_fraction > 0


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "judges").glob("*.yaml")), ids=lambda path: path.stem
)
def test_judges(file) -> None:
    words = ["--judge", str(file), "--data", str(HH / "rows.yaml"), "--output", "x.json"]
    made = parser()
    ready = made.instantiate(made.parse_args(words))
    assert check_yaml(file)["class_path"].endswith(type(ready.judge).__name__)


def test_the_judge_is_the_published_one() -> None:
    ready = parser()
    given = ready.instantiate(ready.parse_args(["--config", str(HH / "win_rate.yaml"), "--output", "x.json"]))
    assert isinstance(given.judge, LlamaCppJudge)
    assert given.judge.model == "TheBloke/Llama-2-7b-Chat-GGUF/llama-2-7b-chat.Q4_K_M.gguf"
    assert given.questions == 5


def test_its_first_stage_starts_from_names_of_the_hub() -> None:
    recipe = load_recipe(HH / "recipe.yaml")
    first = plan(recipe, {})[0]
    assert recipe.names["base"] in first.inputs
    assert missing(first) is None


def run(recipe: str, folder: Path, **names: object) -> Path:
    words = ["run", f"configs/hh_rlhf/{recipe}.yaml", "--output", str(folder)]
    for name, value in names.items():
        words += ["--set", f"{name}={value}"]
    assert main(words) == 0
    return folder


def check(folder: Path, judge: str, questions: int) -> None:
    result = json.loads((folder / "dpo" / "win_rate.json").read_text())
    assert result["judge"]["class"] == judge
    assert result["questions"] == questions
    assert all(
        found["wins"] + found["losses"] + found["ties"] == questions for found in result["against"].values()
    )
    assert "Winner" in (folder / "report.md").read_text() or "win" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_the_tiny_recipe(gguf, tmp_path) -> None:  # noqa: F811
    file = rows(tmp_path / "rows.jsonl", 200)
    names = {"rows": file, "judge": gguf(), "steps": 5, "epochs": 1, "questions": 4, "max_new_tokens": 8}
    check(run("tiny", tmp_path / "runs", **names), "LlamaCppJudge", 4)


@pytest.mark.slow
def test_the_recipe_with_local_names(tiny_gpt2, tiny_llama, tmp_path) -> None:
    prompt = tmp_path / "short.txt"
    prompt.write_text("{question}\nA {first}\nB {second}\n")
    names = {
        "rows": rows(tmp_path / "rows.jsonl", 200), "base": tiny_gpt2, "judge": tiny_llama, "prompt": prompt,
        "hardware": "configs/hardware/cpu.yaml", "examples": 40, "epochs": 1, "questions": 4,
    }  # fmt: skip
    check(run("recipe", tmp_path / "runs", **names), "TransformersJudge", 4)
