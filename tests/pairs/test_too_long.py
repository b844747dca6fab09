"""A prompt that leaves the model no position for an answer: counted with its reason, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pairs.opinionated import make, short_rubric
from tests.pairs.rewards import CountReward
from trainer.generation import Sampling
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import build
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.instructions import InstructionPrompts
from trainer.pairs.prompts import TextPrompts
from trainer.pairs.self_judge import SelfJudge
from trainer.schema import UserError


def candidates(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Each prompt's, by its beginning."""
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    return {row["prompt"][:12]: row["candidates"] for row in rows}


@pytest.mark.parametrize("way", ["apart", "together"])
def test_an_instruction_is_left_out_as_invalid(tmp_path, way) -> None:
    long = "Слишком длинное задание " * 200
    (tmp_path / "list.txt").write_text("\n".join(["Назови город", long, "Назови реку"]))
    builder = SelfJudge(
        LocalGenerator(str(make("llama", tmp_path / "llama", "plain")), chat=True),
        InstructionPrompts(str(tmp_path / "list.txt"), where={}, part="all"),
        str(short_rubric(tmp_path / "rubric")),
        way=way,  # type: ignore[arg-type]
        form="plain" if way == "together" else None,
        n=4,
        sampling=Sampling(24, True),
    )
    built = build(builder, tmp_path / "out")
    assert built.manifest is not None
    bad = candidates(tmp_path / "out")["Слишком длин"]
    assert len(bad) == 4
    assert {each["invalid"].partition(" (")[0] for each in bad} == {"the prompt is too long"}
    assert " tokens; the model has 4096 positions for prompt and answer)" in bad[0]["invalid"]
    assert all(each["score"] is None and each["text"] == "" for each in bad)
    assert built.manifest["counts"]["prompts"] == 3
    assert built.manifest["counts"]["dropped_invalid"] == 1
    judging = built.manifest["judging"]
    assert judging["unread"]["the prompt is too long"] == 4
    (example,) = [each for each in judging["unread_examples"] if each["why"] == bad[0]["invalid"]]
    assert example["prompt"] == long.strip()[:80], "which one it is, in its own first words"


def test_a_beginning_is_left_out_and_the_others_stay_as_they_were(tiny_gpt2, tmp_path) -> None:
    """The model has 512 positions, one token for each byte."""
    found = []
    for name, lines in (("with", ["one", "x" * 600, "two"]), ("without", ["one", "two"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        prompts = TextPrompts(str(tmp_path / f"{name}.txt"), tokens=None, part="all")
        sampling = Sampling(max_new_tokens=6, do_sample=True, seed=3)
        made = BestOfN(LocalGenerator(str(tiny_gpt2)), prompts, CountReward("abc"), 4, sampling, 0.0, 1)
        try:
            build(made, tmp_path / name)
        except UserError as error:
            assert "no pair is left" in str(error)  # noqa: PT017
        found.append(candidates(tmp_path / name))
    bad = found[0].pop("x" * 12)
    assert {each["invalid"][:22] for each in bad} == {"the prompt is too long"}
    assert found[0] == found[1]


def test_prompts_that_are_all_too_long_say_so(tiny_gpt2, tmp_path) -> None:
    (tmp_path / "texts.txt").write_text("x" * 600)
    prompts = TextPrompts(str(tmp_path / "texts.txt"), tokens=None, part="all")
    made = BestOfN(LocalGenerator(str(tiny_gpt2)), prompts, CountReward(), 2, Sampling(6, True))
    with pytest.raises(
        UserError,
        match=r"no pair is left .*, to 'xxx.*the prompt is too long \(60\d tokens; the model has 512",
    ):
        build(made, tmp_path / "out")
