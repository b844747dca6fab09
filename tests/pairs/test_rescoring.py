"""Another judge on the same answers: what it is asked, what is compared, what a rerun asks, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.judges.servers import chat as answered
from tests.judges.servers import serving
from tests.pairs.opinionated import make, short_rubric
from tests.pairs.rewards import CountReward
from trainer.generation import Sampling
from trainer.judges.scored import TransformersJudge
from trainer.judges.served import ServerJudge
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import build
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.instructions import InstructionPrompts
from trainer.pairs.rescoring import rescore, rubric_of
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.pairs.self_judge import SelfJudge
from trainer.schema import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Self-judged pairs of a tiny model, in JSON."""
    (tmp_path / "list.txt").write_text("\n".join(f"Назови город {number}" for number in range(6)))
    base = str(make("llama", tmp_path / "llama"))
    prompts = InstructionPrompts(str(tmp_path / "list.txt"), where={}, part="all")
    rubric = str(short_rubric(tmp_path / "rubric"))
    generator = LocalGenerator(base, chat=True)
    build(
        SelfJudge(generator, prompts, rubric, "together", n=4, sampling=Sampling(24, True)),
        tmp_path / "pairs",
    )
    return tmp_path / "pairs"


def labelled(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    return [(row["prompt"], each) for row in rows for each in row["candidates"] if each["score"] is not None]


def agreeing(folder: Path, better: bool = True):
    """A server that gives each answer the score that it has, or its opposite; 3 by the second criterion."""
    scores = {(prompt, each["text"]): each["score"] for prompt, each in labelled(folder)[::-1]}

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        question = body["messages"][0]["content"]
        if "Clarity" in question:
            return 200, answered("3")
        (score,) = (
            score for (prompt, text), score in scores.items() if question.startswith(f"{prompt} -> {text}\n")
        )
        return 200, answered(f"{score if better else 6 - score:.0f}")

    return answer


def test_a_judge_of_one_mind_with_the_model(folder) -> None:
    rubric = Rubric.read(folder.parent / "rubric" / "rubric.yaml")
    with serving(agreeing(folder)) as asked:
        found = rescore(folder, ServerJudge(asked.url, "m"), rubric)
        number = len(asked.bodies)
        again = rescore(folder, ServerJudge(asked.url, "m"), rubric)
    texts = {(prompt, each["text"]) for prompt, each in labelled(folder)}
    assert number == 2 * len(texts), "each text once by each criterion"
    assert len(asked.bodies) == number, "a rerun asks nothing"
    assert again == found == json.loads((folder / "rescored" / "outside.json").read_text())
    same = len(texts) == len(labelled(folder))
    assert found["compared"]["answers"] == len(labelled(folder))
    assert found["compared"]["pairs_confirmed"] == 1.0
    assert found["compared"]["spearman"] > (0.99 if same else 0.3)
    assert found["criteria"]["clarity"] == {"mean": 3.0, "spearman": None}
    assert found["unscored"] == {}


def test_a_judge_of_the_opposite_mind(folder) -> None:
    rubric = Rubric.read(folder.parent / "rubric" / "rubric.yaml")
    with serving(agreeing(folder, better=False)) as asked:
        found = rescore(folder, ServerJudge(asked.url, "m"), rubric, "contrary")
    assert found["compared"]["pairs_confirmed"] == 0.0
    assert found["compared"]["spearman"] < -0.3
    assert (folder / "rescored" / "contrary.json").is_file()


def test_a_rerun_asks_what_is_missing(folder) -> None:
    rubric = Rubric.read(folder.parent / "rubric" / "rubric.yaml")
    answer = agreeing(folder)

    def gone(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        return answer(number, body) if number < 20 else (500, {"error": "down"})

    with serving(gone) as asked, pytest.raises(UserError, match=r"got no answer|same command asks again"):
        rescore(folder, ServerJudge(asked.url, "m", attempts=1, parallel=1, wait=0.01), rubric)
    kept = [json.loads(line) for line in (folder / "rescored/outside/parts/0.jsonl").read_text().splitlines()]
    assert kept
    with serving(answer) as asked:
        with pytest.raises(UserError, match=r"made with other settings .*; give another --label, or"):
            rescore(folder, ServerJudge(asked.url, "other"), rubric)
        # The server has moved; its scores are the same.
        found = rescore(folder, ServerJudge(asked.url, "m"), rubric)
        texts = {(prompt, each["text"]) for prompt, each in labelled(folder)}
        assert len(asked.bodies) == 2 * (len(texts) - sum(len(row["scores"]) for row in kept))
    assert found["compared"]["pairs_confirmed"] == 1.0


def test_words_that_are_no_score_are_counted(folder) -> None:
    rubric = Rubric.read(folder.parent / "rubric" / "rubric.yaml")
    with serving(lambda number, body: (200, answered("no idea"))) as asked:
        found = rescore(folder, ServerJudge(asked.url, "m", tries=1), rubric)
    assert found["unscored"] == {"no idea": 2 * len(labelled(folder))}
    assert found["compared"]["answers"] == 0
    assert found["mean"] is None


def test_pairs_of_a_reward_can_be_rescored_too(tmp_path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"Назови город {number}" for number in range(4)))
    base = str(make("llama", tmp_path / "llama", "plain"))
    prompts = InstructionPrompts(str(tmp_path / "list.txt"), where={}, part="all")
    made = BestOfN(LocalGenerator(base, chat=True), prompts, CountReward("ои"), 4, Sampling(12, True))
    build(made, tmp_path / "out")
    rubric = Rubric.read(short_rubric(tmp_path / "rubric"))
    found = rescore(tmp_path / "out", TransformersJudge(base), rubric)
    assert found["compared"]["answers"] == len(labelled(tmp_path / "out")) == 16
    assert found["same_rubric"] is None
    assert rubric_of(tmp_path / "out") == Rubric.read(RUBRIC)
    assert all(1 <= each["mean"] <= 5 and each["spearman"] is None for each in found["criteria"].values())


def test_the_pairs_rubric_goes_with_their_folder(folder) -> None:
    rubric = Rubric.read(folder.parent / "rubric" / "rubric.yaml")
    shutil.rmtree(folder.parent / "rubric")
    assert rubric_of(folder) == rubric
    with serving(agreeing(folder)) as asked:
        found = rescore(folder, ServerJudge(asked.url, "m"))
    assert found["rubric"] == rubric.describe()
    assert found["same_rubric"] is True


def test_another_rubric_is_said_and_its_criteria_are_not_compared(folder, capsys) -> None:
    other = short_rubric(folder.parent / "other")
    (other.parent / "one.txt").write_text("{instruction} -> {answer}\nBy {criterion}, {description} 1 to 5?")
    words = ["pairs", "rescore", str(folder), "--judge", str(folder.parent / "llama"), "--rubric", str(other)]
    assert main(words) == 0
    assert "by another rubric than the one the pairs were made by: criteria are" in capsys.readouterr().out
    found = json.loads((folder / "rescored" / "outside.json").read_text())
    assert found["same_rubric"] is False
    assert {each["spearman"] for each in found["criteria"].values()} == {None}
    assert found["compared"]["answers"] == len(labelled(folder))
    assert main(["pairs", "show", str(folder)]) == 0
    assert (
        "asked by another rubric than the one the pairs were made by" in (folder / "pairs.html").read_text()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not hold the rubric that its pairs were made by; give --rubric FILE"),
        ("{}", "rubric.json: holds no rubric"),
        ("other", "rubric.json: is not the rubric that the pairs were made by"),
    ],
)
def test_a_rubric_that_is_not_the_pairs_is_refused(folder, capsys, content, message) -> None:
    if content is None:
        (folder / "rubric.json").unlink()
    else:
        (folder / "rubric.json").write_text(Rubric.read(RUBRIC).as_json() if content == "other" else content)
    assert main(["pairs", "rescore", str(folder), "--judge", str(folder.parent / "llama")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command(folder, capsys) -> None:
    words = ["pairs", "rescore", str(folder)]
    assert main([*words, "--judge", str(folder.parent / "llama"), "--label", "itself"]) == 0
    out = capsys.readouterr()
    assert f"{len(labelled(folder))} answers: Spearman with their own scores" in out.out
    assert " % contradicted, " in out.out
    # Its weights are random: few digits, whatever it is asked.
    assert "warning: probability of the digits: " in out.out
    assert f"written to {folder}/rescored/itself.json" in out.err
    found = json.loads((folder / "rescored" / "itself.json").read_text())
    assert found["judge"]["class"] == "TransformersJudge"
    assert found["same_rubric"] is True
    assert 0 <= found["mass"]["mean"] < 0.5
    assert found["mass"]["questions"] == 2 * len(
        {(prompt, each["text"]) for prompt, each in labelled(folder)}
    )
    assert main(["pairs", "show", str(folder)]) == 0
    page = (folder / "pairs.html").read_text()
    assert "Another judge (itself)" in page
    assert "What the model says of itself" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["{folder}", "--judge", "{model}", "--label", "../up"],
            "--label ../up: should be a name of letters",
        ),
        (["{folder}/nowhere", "--judge", "{model}"], "holds no pairs that were begun"),
        (
            ["{folder}", "--judge", "{model}", "--rubric", "/nowhere.yaml"],
            "rubric /nowhere.yaml: cannot be read",
        ),
        (["{folder}", "--judge", "/nowhere.gguf"], "/nowhere.gguf"),
        (["{folder}"], "judge"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, message) -> None:
    filled = [word.format(folder=folder, model=folder.parent / "llama") for word in words]
    assert main(["pairs", "rescore", *filled]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert not any("Traceback" in line for line in told)
