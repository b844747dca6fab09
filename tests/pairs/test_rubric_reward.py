"""A rubric as a reward: its parts, what has no score, and evaluations with it before and after training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import main
from tests.pairs import opinionated
from trainer.evaluation.reward import evaluate_reward
from trainer.generation import Sampling
from trainer.judges import Choice, Judge, Question
from trainer.judges.scored import TransformersJudge
from trainer.pairs.prompts import Prompt
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.pairs.rubric_reward import RubricReward
from trainer.policy.load import PolicyConfig, load_frozen, load_tokenizer
from trainer.report.collect import collect
from trainer.report.render import render_html, render_markdown
from trainer.rewards import scored
from trainer.schema import UserError

ASKED = ["Назови столицу Франции.", "Что такое море?", "Когда цветут сады?"]
SAID = ["Париж", "Это вода.", "Весной, и ещё раз весной."]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> TransformersJudge:
    return TransformersJudge(str(opinionated.make("gemma2", tmp_path_factory.mktemp("judge"))))


class Wordless(Judge):
    """Gives digits without probabilities, and nonsense to whatever speaks of Paris."""

    def choose(self, questions):  # type: ignore[no-untyped-def]
        for each in questions:
            nonsense = "Париж" in each.text
            yield [Choice(each.key, None, "nonsense (so it said)") if nonsense else Choice(each.key, "4")]

    def describe(self) -> dict[str, str]:
        return {"class": "Wordless"}


def test_parts_are_the_judges_expected_digits(judge: TransformersJudge) -> None:
    rubric = Rubric.read(RUBRIC)
    found = RubricReward(judge).by_part(ASKED, SAID)
    for asked, said, by in zip(ASKED, SAID, found, strict=True):
        assert isinstance(by, dict)
        for criterion in rubric.criteria:
            ((choice,),) = judge.choose([rubric.question("k", asked, said, criterion, 0)])
            assert choice.probabilities is not None
            expected = sum(n * share for n, share in enumerate(choice.probabilities, start=1))
            assert by[criterion.key] == pytest.approx(expected, abs=1e-5)
    whole = scored(RubricReward(judge), ASKED, SAID)
    assert whole == pytest.approx([sum(by.values()) / 5 for by in found])  # type: ignore[union-attr]
    assert len(set(whole)) == 3


def test_another_wording_gives_other_scores(judge: TransformersJudge) -> None:
    assert scored(RubricReward(judge, wording=2), ASKED, SAID) != scored(RubricReward(judge), ASKED, SAID)
    with pytest.raises(UserError, match=r"wording: 4 is not possible; .*rubric_ru.yaml has 1 to 3"):
        RubricReward(judge, wording=4)


def test_answers_without_a_score_are_in_no_mean(tmp_path: Path) -> None:
    reward = RubricReward(Wordless())
    assert reward.by_part(ASKED, ["Париж", " ", "Весной"]) == [
        "nonsense (so it said)",
        "a blank answer",
        dict.fromkeys(("brevity", "helpfulness", "accuracy", "clarity", "conciseness"), 4.0),
    ]
    with pytest.raises(UserError, match=r"RubricReward: 'Париж' got no score \(nonsense"):
        reward(ASKED, SAID)
    folder = opinionated.make("gemma2", tmp_path / "model")
    model, tokenizer = load_frozen(PolicyConfig(str(folder), adapter=None)), load_tokenizer(str(folder))
    prompts = [Prompt(f"k{n}", text) for n, text in enumerate(ASKED * 4)]
    sampling = Sampling(max_new_tokens=4, do_sample=True)
    result = evaluate_reward(
        model, tokenizer, prompts, {"outside": reward}, sampling=sampling, samples=4, chat=True
    )
    found, texts = result["rewards"]["outside"], [each["completion"] for each in result["examples"]]
    assert found["n"] + sum(found["unscored"].values()) == 48
    assert found["unscored"]["nonsense"] > 0
    assert found["mean"] == 4.0
    assert found["parts"]["accuracy"] == {"mean": 4.0, "interval": [4.0, 4.0]}
    assert [each["rewards"]["outside"] for each in result["examples"]] == [
        None if "Париж" in text or not text.strip() else 4.0 for text in texts
    ]


def test_none_scored_is_an_error() -> None:
    class Silent(Wordless):
        def choose(self, questions: list[Question]):  # type: ignore[no-untyped-def]
            yield [Choice(each.key, None, "nonsense") for each in questions]

    from trainer.evaluation.reward import Score, _told

    scores = [Score(None, why=str(by)) for by in RubricReward(Silent()).by_part(ASKED, SAID)]
    with pytest.raises(UserError, match=r"rewards.outside: 0 of 3 texts got a score \(nonsense 3\)"):
        _told("outside", scores, 1)


def test_before_and_after_in_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tandem evaluate reward --chat true` with the model itself and another as judges; the page has each criterion."""
    own, other = (
        opinionated.make("gemma2", tmp_path / name, seed=seed) for seed, name in enumerate(["own", "other"])
    )
    (tmp_path / "asked.txt").write_text("\n".join(ASKED))
    rewards = {
        name: {
            "class_path": "trainer.pairs.rubric_reward.RubricReward",
            "init_args": {
                "judge": {
                    "class_path": "trainer.judges.scored.TransformersJudge",
                    "init_args": {"model": str(model)},
                }
            },
        }
        for name, model in (("self", own), ("outside", other))
    }
    prompts = {
        "class_path": "trainer.pairs.instructions.InstructionPrompts",
        "init_args": {"path": str(tmp_path / "asked.txt"), "where": {}, "part": "all"},
    }
    for stage, model in (("base", own), ("dpo", other)):
        words = ["--base", str(model), "--prompts", json.dumps(prompts), "--rewards", json.dumps(rewards)]
        words += ["--chat", "true", "--sampling.max_new_tokens", "6", "--sampling.do_sample", "true"]
        assert (
            main(["evaluate", "reward", *words, "--output", str(tmp_path / f"runs/{stage}/reward.json")]) == 0
        )
    assert "reward self: " in (said := capsys.readouterr().out)
    assert "  brevity " in said
    found = json.loads((tmp_path / "runs/base/reward.json").read_text())
    assert found["chat"] is True
    assert found["rewards"]["self"]["n"] == 3
    parts = found["rewards"]["self"]["parts"]
    assert found["rewards"]["self"]["mean"] == pytest.approx(sum(each["mean"] for each in parts.values()) / 5)
    report = collect(tmp_path / "runs")
    for rendered in (render_html(report), render_markdown(report)):
        assert "brevity" in rendered
        assert "conciseness" in rendered
    assert f"{parts['brevity']['mean']:.2f}" in render_markdown(report)


def test_a_system_text_needs_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = opinionated.make("gemma2", tmp_path / "model")
    model, tokenizer = load_frozen(PolicyConfig(str(folder), adapter=None)), load_tokenizer(str(folder))
    prompts = [Prompt(f"k{n}", text) for n, text in enumerate(ASKED)]
    with pytest.raises(UserError, match="system: has no effect without chat: true"):
        evaluate_reward(
            model, tokenizer, prompts, {"r": RubricReward(Wordless())}, sampling=Sampling(), system="Кратко."
        )


def test_a_judge_by_its_name(judge: TransformersJudge, tmp_path: Path) -> None:
    """A folder, the .yaml of a judge, or the class: the same scores."""
    folder = judge.model
    file = tmp_path / "judge.yaml"
    file.write_text(
        f"class_path: trainer.judges.scored.TransformersJudge\ninit_args: {{model: {folder}, batch_size: 2}}\n"
    )
    wanted = scored(RubricReward(judge), ASKED, SAID)
    for name in (str(folder), str(file)):
        assert scored(RubricReward(name), ASKED, SAID) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a", "describes no judge; it should hold class_path and init_args"),
        ("class_path: nowhere.Judge", "class_path 'nowhere.Judge' cannot be loaded"),
        ("class_path: pathlib.Path", "class_path 'pathlib.Path' is no trainer.judges.Judge"),
        (
            "class_path: trainer.judges.scored.TransformersJudge\ninit_args: {modle: x}",
            "init_args: got an unexpected keyword argument 'modle'",
        ),
        ("class_path: trainer.judges.Judge", "cannot be made"),
        ("class_path: trainer.judges.scored.TransformersJudge\ninit_args: 3", "init_args is 3"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_judge(content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"judge .*judge.yaml: ") as error:
        RubricReward(str(file))
    assert told in str(error.value)


def test_the_judge_that_is_missing_is_named(judge: TransformersJudge) -> None:
    rewards = {"self": RubricReward(judge), "outside": RubricReward("/nowhere")}
    prompts = [Prompt(f"k{n}", text) for n, text in enumerate(ASKED)]
    with pytest.raises(UserError, match=r"^rewards.outside: judge.model: /nowhere"):
        evaluate_reward(None, None, prompts, rewards, sampling=Sampling())  # type: ignore[arg-type]


def test_a_judge_that_would_not_have_said_a_digit(caplog: pytest.LogCaptureFixture) -> None:
    class Absent(Wordless):
        def choose(self, questions: list[Question]):  # type: ignore[no-untyped-def]
            yield [
                Choice(each.key, "3", probabilities=(0.2, 0.2, 0.2, 0.2, 0.2), mass=0.01)
                for each in questions
            ]

    assert RubricReward(Absent())(ASKED, SAID) == pytest.approx([3.0] * 3)
    assert "the digits hold 1.0 % of" in caplog.text


def test_prompts_that_leave_no_room_are_counted(judge: TransformersJudge) -> None:
    model, tokenizer = (
        load_frozen(PolicyConfig(str(judge.model), adapter=None)),
        load_tokenizer(str(judge.model)),
    )
    prompts = [Prompt(f"k{n}", text) for n, text in enumerate([*ASKED, "a" * 5000])]
    rewards = {"length": lambda asked, said: [float(len(text)) for text in said]}
    found = evaluate_reward(
        model, tokenizer, prompts, rewards, sampling=Sampling(max_new_tokens=2), chat=True
    )  # type: ignore[arg-type]
    assert (found["prompts"], found["too_long"]) == (3, 1)
