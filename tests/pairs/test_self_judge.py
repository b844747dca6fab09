"""Self-judging by tiny models, both ways: what rows hold, where scores come from, shards, kills, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.judges.servers import chat as answered
from tests.judges.servers import serving
from tests.pairs.opinionated import ANSWERS, CRITERIA, NONSENSE, make, short_rubric
from trainer.data.preferences import PreferenceFile
from trainer.data.tokenize import Limits, tokenize_preferences
from trainer.generation import Sampling
from trainer.pairs.building import Shard, build, merge
from trainer.pairs.candidates import CandidateFile
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.instructions import InstructionPrompts
from trainer.pairs.rubric import RUBRIC, Rubric
from trainer.pairs.self_judge import SelfJudge
from trainer.pairs.served import ServerGenerator
from trainer.report.pairs import pairs_of_folder
from trainer.schema import UserError

FILES = ("candidates.jsonl", "pairs.jsonl", "manifest.json")
FAMILIES = ("llama", "gemma2")
WAYS: dict[str, dict[str, Any]] = {
    "apart": {"way": "apart", "rescored": 1},
    "json": {"way": "together", "form": "json"},
    "plain": {"way": "together", "form": "plain", "rescored": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("self")
    (folder / "list.txt").write_text("\n".join(f"Назови город {number}" for number in range(8)))
    short_rubric(folder / "rubric")
    for family in FAMILIES:
        for form in ("json", "plain"):
            make(family, folder / f"{family}_{form}", form)
    return folder


@pytest.fixture(scope="module")
def builder(place) -> Callable[..., SelfJudge]:
    def made(family: str, kind: str, batch_size: int = 16, **settings: Any) -> SelfJudge:
        base = place / f"{family}_{'json' if kind == 'json' else 'plain'}"
        return SelfJudge(
            LocalGenerator(str(base), chat=True, batch_size=batch_size),
            InstructionPrompts(str(place / "list.txt"), where={}, part="all"),
            str(place / "rubric" / "rubric.yaml"),
            **{"n": 4, "sampling": Sampling(24, True, seed=3), **WAYS[kind], **settings},
        )

    return made


@pytest.fixture(scope="module")
def whole(place, builder):
    """The folder of one whole run, made once for each family and way."""

    def folder(family: str, way: str) -> Path:
        out = place / f"out_{family}_{way}"
        if not out.exists():
            build(builder(family, way), out)
        return out

    return folder


def rows(folder: Path, name: str = "candidates.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def same(one: Path, two: Path) -> None:
    for name in FILES[:2]:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    kept = ("counts", "scores", "judging", "files", "builder")
    assert {key: manifest(one)[key] for key in kept} == {key: manifest(two)[key] for key in kept}


@pytest.mark.parametrize("way", ["json", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_scores_in_one_go(whole, family, way) -> None:
    found = [each for row in rows(whole(family, way)) for each in row["candidates"]]
    read = [each for each in found if "invalid" not in each]
    assert len(found) == 32
    assert {each["text"] for each in read} <= set(ANSWERS)
    assert len({each["text"] for each in read}) > 2
    assert {each["score"] for each in read} <= {1, 2, 3, 4, 5}
    assert len({each["score"] for each in read}) > 2
    for each in read:
        assert each["scores"] == {"estimate": each["score"]}
        assert each["finished"]
        assert each["tokens"] == (len(each["text"].encode()))
    left = [each for each in found if "invalid" in each]
    assert left, "the model says nonsense now and then"
    assert {(each["text"], each["score"], each["said"][: len(NONSENSE)]) for each in left} == {
        ("", None, NONSENSE)
    }
    told = manifest(whole(family, way))["judging"]
    assert told["labelled"] == len(read)
    assert told["unread"] == {"no_score": len(left)}
    assert [each["said"][: len(NONSENSE)] for each in told["unread_examples"]] == [NONSENSE] * len(left)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_apart_are_the_digits_expected_value(place, whole, family) -> None:
    rubric, base = Rubric.read(place / "rubric" / "rubric.yaml"), place / f"{family}_plain"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    for row in rows(whole(family, "apart"))[:2]:
        for each in row["candidates"][:2]:
            masses = [each["mass"], *each["again_mass"]]
            for wording, scores in enumerate((each["scores"], each["again"][0])):
                for criterion in rubric.criteria:
                    question = rubric.question("", row["prompt"], each["text"], criterion, wording).text
                    turns = [{"role": "user", "content": question}]
                    asked = tokenizer.apply_chat_template(
                        turns, add_generation_prompt=True, return_dict=False
                    )
                    expected, mass = by_hand(model, tokenizer, asked)
                    assert scores[criterion.key] == pytest.approx(expected, abs=1e-4)
                    assert masses[wording][criterion.key] == pytest.approx(mass, abs=1e-5)
            assert each["score"] == pytest.approx(sum(each["scores"].values()) / len(CRITERIA))


def by_hand(model: Any, tokenizer: Any, asked: list[int]) -> tuple[float, float]:
    """The expected digit, and what the digits hold, from plain transformers: each way to write each in a row."""
    shares = []
    for digit in "12345":
        ways = []
        for written in (digit, " " + digit):
            ids = tokenizer.encode(written, add_special_tokens=False)
            with torch.no_grad():
                logps = model(torch.tensor([asked + ids])).logits[0].log_softmax(-1)
            ways.append(sum(logps[len(asked) - 1 + place, token].double() for place, token in enumerate(ids)))
        shares.append(torch.stack(ways).logsumexp(0))
    table = torch.stack(shares)
    expected = table.softmax(0) @ torch.arange(1.0, 6.0, dtype=torch.float64)
    return float(expected), float(table.exp().sum())


@pytest.mark.parametrize("way", WAYS)
def test_the_pair_s_prompt_is_the_plain_instruction(place, whole, way) -> None:
    folder = whole("gemma2", way)
    # The first of those that say the same stands for them.
    texts = {row["key"]: {each["text"]: each for each in row["candidates"][::-1]} for row in rows(folder)}
    for pair in rows(folder, "pairs.jsonl"):
        (turn,) = pair["prompt"]
        assert turn["role"] == "user"
        assert turn["content"] in (place / "list.txt").read_text().splitlines()
        assert pair["way"] == WAYS[way]["way"]
        for side in ("chosen", "rejected"):
            candidate = texts[pair["id"]][pair[side][0]["content"]]
            assert pair[f"{side}_scores"] == candidate["scores"]
            assert pair[f"{side}_score"] == candidate["score"]
        assert pair["chosen_score"] > pair["rejected_score"]
    loaded = PreferenceFile(str(folder / "pairs.jsonl"), validation_fraction=0.0).load("train")
    assert loaded.counts["kept"] == manifest(folder)["counts"]["kept"] == len(rows(folder, "pairs.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(place / "gemma2_json")
    tokens = tokenize_preferences(loaded.records, tokenizer, Limits(512))
    prompt = tokenizer.decode(tokens[0].prompt)
    assert prompt.startswith("<s><start_of_turn>user\nНазови город ")
    assert prompt.endswith("<end_of_turn>\n<start_of_turn>model\n")
    assert "score" not in prompt
    assert pairs_of_folder(folder)["pairs"] == loaded.counts["kept"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_give_what_one_run_gives(builder, whole, tmp_path, family, way) -> None:
    first = build(builder(family, way, batch_size=8), tmp_path, Shard(1, 2))
    assert (first.new, first.missing, first.manifest) == (4, 4, None)
    build(builder(family, way), tmp_path, Shard(2, 2))
    same(tmp_path, whole(family, way))
    before = (tmp_path / "manifest.json").read_bytes()
    merge(builder(family, way), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("way", WAYS)
def test_what_a_kill_left_is_gone_on_with(builder, whole, tmp_path, way) -> None:
    (tmp_path / "parts").mkdir()
    source = whole("llama", way)
    (tmp_path / "settings.json").write_bytes((source / "settings.json").read_bytes())
    lines = (source / "parts" / "1-of-1.0.jsonl").read_bytes().splitlines(keepends=True)
    # Three whole rows and half of one.
    (tmp_path / "parts" / "1-of-1.0.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:50])
    assert build(builder("llama", way, batch_size=4), tmp_path).new == 5
    same(tmp_path, source)


def test_other_settings_are_refused_and_margins_are_not(builder, whole, tmp_path) -> None:
    out = tmp_path / "out"
    build(builder("llama", "json"), out)
    with pytest.raises(UserError, match=r"made with other settings \(.*form was \"json\", is \"plain\""):
        build(builder("llama", "json", form="plain"), out)
    assert manifest(out)["counts"]["dropped_margin"] == 0
    build(builder("llama", "json", min_margin=2.0), out)
    counts = manifest(out)["counts"]
    assert counts["dropped_margin"] > 0
    assert all(pair["chosen_score"] - pair["rejected_score"] >= 2 for pair in rows(out, "pairs.jsonl"))


def test_a_server_answers_and_scores(place, tmp_path) -> None:
    """Both calls of `apart` go to one server; scores come from its log-probs."""

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        said = body["messages"][-1]["content"]
        if body.get("logprobs"):
            good = "Paris" in said
            top = (
                {"5": -0.2231435, "1": -1.6094379} if good else {"2": -1.6094379, "3": -1.6094379, "x": -9.0}
            )
            return 200, answered("5" if good else "2", top=top)
        return 200, answered("Paris" if body["seed"] % 2 else "I cannot say")

    with serving(answer) as asked:
        generator = ServerGenerator(asked.url, "some", chat=True)
        prompts = InstructionPrompts(str(place / "list.txt"), where={}, part="all")
        rubric = str(short_rubric(tmp_path / "rubric", "en"))
        built = build(SelfJudge(generator, prompts, rubric, n=6), tmp_path / "out")
    assert built.manifest is not None
    assert {each["text"]: round(each["score"], 5) for row in rows(tmp_path / "out") for each in row["candidates"]} == {
        "Paris": 4.2, "I cannot say": 2.5,
    }  # fmt: skip
    mass = built.manifest["judging"]["mass"]
    said = [{each["text"] for each in row["candidates"]} for row in rows(tmp_path / "out")]
    sure, unsure = (2 * sum(text in each for each in said) for text in ("Paris", "I cannot say"))
    assert mass == {
        "questions": sure + unsure,
        "mean": pytest.approx((sure + 0.4 * unsure) / (sure + unsure)),
        "min": pytest.approx(0.4),
        "below_half": pytest.approx(unsure / (sure + unsure)),
    }
    assert built.manifest["judging"]["language"] == {
        "wanted": "en", "threshold": 0.5, "answers": 48, "without_letters": 0, "not_read": 0, "other": 0,
        "share": 0.0,
    }  # fmt: skip


def test_a_score_for_each_criterion_in_one_go(place, tmp_path) -> None:
    """A model that scores each criterion where one score was asked for: the label is their mean."""

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        city, scores = ("Рим", [5, 4]) if body["seed"] % 2 else ("Лион", [1, 2])
        return 200, answered(json.dumps({"answer": city, "estimate": scores}, ensure_ascii=False))

    with serving(answer) as asked:
        prompts = InstructionPrompts(str(place / "list.txt"), where={}, part="all")
        rubric = str(place / "rubric" / "rubric.yaml")
        made = SelfJudge(ServerGenerator(asked.url, "some", chat=True), prompts, rubric, "together", n=6)
        built = build(made, tmp_path / "out")
    found = {each["text"]: each for row in rows(tmp_path / "out") for each in row["candidates"]}
    assert {text: each["score"] for text, each in found.items()} == {"Рим": 4.5, "Лион": 1.5}
    assert found["Рим"]["scores"] == {"brevity": 5, "clarity": 4}
    assert found["Рим"]["repairs"] == ["list"]
    assert json.loads(found["Рим"]["said"]) == {"answer": "Рим", "estimate": [5, 4]}
    assert built.manifest is not None
    assert built.manifest["judging"]["repaired"] == {"list": 48}
    assert built.manifest["judging"]["criteria"]["brevity"]["chosen_mean"] == 5


@pytest.mark.parametrize("language", ["ru", "en"])
@pytest.mark.parametrize("way", WAYS)
def test_the_shipped_rubrics(place, tmp_path, language, way) -> None:
    (tmp_path / "list.txt").write_text("Назови город\nНазови реку")
    base = place / f"llama_{'json' if way == 'json' else 'plain'}"
    prompts = InstructionPrompts(str(tmp_path / "list.txt"), where={}, part="all")
    generator = LocalGenerator(str(base), chat=True)
    rubric = str(RUBRIC.with_name(f"rubric_{language}.yaml"))
    made = SelfJudge(generator, prompts, rubric, n=4, sampling=Sampling(24, True, seed=3), **WAYS[way])
    built = build(made, tmp_path / "out")
    assert built.manifest is not None
    judging = built.manifest["judging"]
    assert judging["labelled"] >= 4
    assert judging["language"]["wanted"] == language
    assert list(judging["names"]) == ["brevity", "helpfulness", "accuracy", "clarity", "conciseness"]
    assert len(judging["criteria"]) == (5 if way == "apart" else 1)


def test_questions_that_get_nonsense_for_ever_do_not_end_the_run(place, tmp_path) -> None:
    """Both criteria of one answer: it has no score, a rerun asks nothing, and all others are scored."""

    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        said = body["messages"][-1]["content"]
        if not body.get("logprobs"):
            return 200, answered(f"City {'ABC'[body['seed'] % 3]}")
        return (200, b"<html>") if "City C" in said else (200, answered("4", top={"4": -0.1}))

    with serving(answer) as asked:
        generator = ServerGenerator(asked.url, "some", chat=True, attempts=2, wait=0.01)
        prompts = InstructionPrompts(str(place / "list.txt"), where={}, part="all", limit=3)
        rubric = str(place / "rubric" / "rubric.yaml")
        made = SelfJudge(generator, prompts, rubric, n=6)
        with pytest.raises(UserError, match=r"no pair is left .*dropped_tie"):
            build(made, tmp_path / "out")
        number = len(asked.bodies)
        with pytest.raises(UserError, match="no pair is left"):
            build(made, tmp_path / "out")
        assert len(asked.bodies) == number
    for each in (each for row in rows(tmp_path / "out") for each in row["candidates"]):
        assert (each["score"] is None) == (each["text"] == "City C")
        assert "no OpenAI-compatible answer" in each.get("invalid", "no OpenAI-compatible answer")


def test_a_score_that_is_missing_makes_the_answer_invalid(place, tmp_path) -> None:
    def answer(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        said = body["messages"][-1]["content"]
        if not body.get("logprobs"):
            return 200, answered(f"City {'ABC'[body['seed'] % 3]}")
        if "City C" in said and "Clarity" in said:
            return 200, answered("I would rather not", top={"I": -0.1})
        return 200, answered("4", top={"4" if "City A" in said else "3": -0.1})

    with serving(answer) as asked:
        generator = ServerGenerator(asked.url, "some", chat=True)
        prompts = InstructionPrompts(str(place / "list.txt"), where={}, part="all")
        rubric = str(place / "rubric" / "rubric.yaml")
        built = build(SelfJudge(generator, prompts, rubric, n=6), tmp_path / "out")
    found = [each for row in rows(tmp_path / "out") for each in row["candidates"]]
    left = [each for each in found if each["text"] == "City C"]
    assert left
    assert all(each["score"] is None and each["scores"] is None for each in left)
    assert {each["invalid"] for each in left} == {"no score (clarity: I would rather not)"}
    assert {each["score"] for each in found if each["text"] != "City C"} == {3.0, 4.0}
    assert built.manifest is not None
    assert built.manifest["judging"]["unread"] == {"no score": len(left)}
    assert built.manifest["judging"]["language"]["share"] == 1.0, "Russian was asked for"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"way": "sideways", "rescored": 0},
            r"SelfJudge\.way: 'sideways' is not possible; give together or apart",
        ),
        ({"form": "json"}, r"SelfJudge\.form: json has no effect with way: apart"),
        ({"n": 1}, r"SelfJudge\.n: 1 is not possible"),
        ({"sampling": Sampling(8)}, r"SelfJudge\.sampling\.do_sample: is false"),
        (
            {"rescored": 2},
            r"SelfJudge\.rescored: 2 is not possible; .*rubric.yaml has wordings for 0 to 1 times",
        ),
        ({"way": "together", "rescored": 3}, "has wordings for 0 to 2 times"),
        ({"min_margin": -1.0}, r"SelfJudge\.min_margin: -1\.0 is not possible"),
        ({"min_tokens": 0}, r"SelfJudge\.min_tokens: 0 is not possible"),
        ({"language_threshold": 0.0}, r"SelfJudge\.language_threshold: 0\.0 is not possible"),
        ({"scoring_batch_size": 0}, r"SelfJudge\.scoring_batch_size: 0 is not possible"),
        (
            {"way": "together", "rescored": 0, "scoring_batch_size": 4},
            "scoring_batch_size: has no effect with way: tog",
        ),
    ],
)
def test_what_cannot_be_is_named(builder, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        builder("llama", "apart", **settings)


def test_a_generator_that_cannot_is_named(place, tmp_path) -> None:
    prompts = InstructionPrompts(str(place / "list.txt"), where={}, part="all")
    with pytest.raises(UserError, match=r"SelfJudge\.generator\.chat: is false; set it to true"):
        SelfJudge(LocalGenerator(str(place / "llama_json")), prompts)
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="take `tandem pairs rescore`"):
        SelfJudge(CandidateFile(str(tmp_path / "texts.jsonl")), prompts)
