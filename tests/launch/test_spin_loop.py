"""The loop of `tandem spin --iterations`: which steps run, with which words, and what it points at; no step is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from launch import recipe, self_play
from launch.cli import main
from launch.recipe import state
from launch.self_play_lineage import _examples
from launch.self_play_steps import Loop
from launch.stages import Step, fingerprint, load_recipe, plan, record
from tests.policy.test_load import save_plain
from trainer.policy.load import load_tokenizer
from trainer.provenance import read_json
from trainer.report.self_play_view import self_play_view

EMPTY = {"base": "", "adapter": None}


class Loops:
    """A loop whose steps write what they would, at once."""

    def __init__(self, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.base, self.ran, self.pointed = folder, base, [], []
        self.forced: list[bool] = []
        self.words: dict[str, tuple[str, ...]] = {}
        self.same_weights = False
        point = self_play.point
        monkeypatch.setattr(self_play, "run_step", self._step)
        monkeypatch.setattr(self_play, "describe", self._told)
        monkeypatch.setattr(self_play, "summary", lambda told: f"iteration {told['iteration']}")
        monkeypatch.setattr(
            self_play, "point", lambda link, to: (self.pointed.append(str(to)), point(link, to))
        )
        monkeypatch.setattr(self_play, "opponent_of", lambda weights: {"digest": "x"})

    def _step(
        self, step: Step, force: bool, offline: bool, ranks: int, kept: Path | None
    ) -> tuple[int, float]:
        self.ran.append(step.name)
        self.forced.append(force)
        self.words[step.name] = step.words
        out = step.outputs[0]
        if step.name.startswith("train"):
            shutil.copytree("sft", out, dirs_exist_ok=True)
            (step.folder / "manifest.json").write_text(json.dumps({"status": "finished", "run": step.name}))
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"made by": step.words}))
        if step.name.startswith("generate"):
            (step.folder / "settings.json").write_text(json.dumps({"opponent": {"digest": "x"}}))
        record(step, "finished", fingerprint(step))
        return 0, 0.0

    def _told(self, loop: Loop, iteration: int) -> dict[str, Any]:
        digests = [{"digest": "same" if self.same_weights else n} for n in (iteration - 1, iteration)]
        return {
            "iteration": iteration,
            "told_apart": True,
            "opponent": digests[0],
            "adapter": digests[1],
            "lr": 1e-9,
        }

    def run(self, *more: str, iterations: int = 3) -> int:
        self.ran, self.pointed, self.forced = [], [], []
        words = ["--iterations", str(iterations), "--config", "train.yaml", "--model", "sft"]
        words += ["--base_model", str(self.base), "--output_dir", "out", "--stop_confidence", "never"]
        return main(["spin", *words, *more])

    @property
    def lineage(self) -> list[int]:
        return [each["iteration"] for each in read_json(Path("out/lineage.json"))["iterations"]]


@pytest.fixture
def loops(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    save_plain(tiny_llama, tmp_path / "sft", LoraConfig(task_type="CAUSAL_LM", r=4))
    (tmp_path / "formatted").mkdir()
    (tmp_path / "formatted" / "train.jsonl").write_text("{}\n")
    (tmp_path / "train.yaml").write_text("threads: 1\n")
    return Loops(tmp_path, tiny_llama, monkeypatch)


def test_a_rerun_never_points_back(loops):
    assert loops.run() == 0
    assert [Path(path).parts[-3] for path in loops.pointed] == ["train-1", "train-2", "train-3"]
    link = Path("out/last").resolve()
    for gone in (None, "validate-1", "convert-2", "generate-3", "train-3"):
        if gone is not None:
            shutil.rmtree(Path("out") / gone)
        assert loops.run() == 0
        again = ["train-2", "train-3"] if gone == "train-3" else ["train-3"]
        assert [Path(path).parts[-3] for path in loops.pointed] == again, gone
        assert Path("out/last").resolve() == link
        assert loops.lineage == [1, 2, 3]
    loops.run()
    assert loops.ran == []
    # Where an adapter has to be made again, those that follow from it do not count until it is there.
    shutil.rmtree("out/train-2")
    loops.run()
    assert [Path(path).parts[-3] for path in loops.pointed] == ["train-1", "train-3"]
    assert loops.ran == ["train-2"]
    loops.run(iterations=2)
    assert (loops.lineage, loops.ran) == ([1, 2], [])


def test_a_generation_that_was_begun_keeps_its_shards(loops, capsys):
    assert loops.run("--shards", "2", iterations=1) == 0
    assert loops.ran == ["generate-1-1", "generate-1-2", "convert-1", "train-1", "validate-1"]
    assert loops.run("--shards", "3", iterations=2) == 0
    assert loops.ran[:4] == ["generate-2-1", "generate-2-2", "generate-2-3", "convert-2"]
    said = capsys.readouterr().out
    assert (
        "generate-1: was begun with 2 shards, and keeps them; --shards 3 is for those that were not" in said
    )
    # Begun, and cut off.
    shutil.rmtree("out/generate-2/shard-2-of-3")
    assert loops.run(iterations=2) == 0
    assert loops.ran == ["generate-2-2"]
    # What lies there of other numbers, whoever put it there, would be refused.
    shutil.copytree("out/generate-2/shard-1-of-3", "out/generate-2/shard-1-of-1")
    assert loops.run("--shards", "3", iterations=2) == 0
    assert sorted(path.name for path in Path("out/generate-2").iterdir()) == [
        f"shard-{number}-of-3" for number in (1, 2, 3)
    ]
    assert Path("out/.stale/generate-2-shard-1-of-1/settings.json").is_file()


def test_force_runs_what_is_done(loops, monkeypatch):
    loops.run("--shards", "2", iterations=1)
    assert loops.run("--force", iterations=1) == 0
    assert loops.ran == ["generate-1", "convert-1", "train-1", "validate-1"]
    assert all(loops.forced)
    assert Path("out/.stale/generate-1-shard-1-of-2/manifest.json").is_file()
    loops.run(iterations=1)
    assert loops.ran == []
    # A recipe's stage that is forced hands it on.
    started: list[list[str]] = []
    monkeypatch.setattr(recipe, "_process", lambda words, captured: (started.append(words), (2, ""))[1])
    step = next(
        each
        for each in plan(
            load_recipe(Path(__file__).parents[2] / "configs/spin/recipe.yaml"), {"base": "google/x"}
        )
        if each.name == "self_play"
    )
    monkeypatch.setattr(recipe, "missing", lambda step: None)
    for force in (True, False):
        recipe.run_step(step, force)
    assert ["--force" in words for words in started] == [True, False]
    assert "--stop_confidence 0.95" in step.shown
    assert state(step, force=True) == "forced"


def test_a_training_that_changes_no_weight_is_one_line(loops, capsys):
    loops.same_weights = True
    assert loops.run() == 2
    said = capsys.readouterr().err
    assert (
        "train-1: has changed no weight, so that iteration 2 would have the same opponent; raise --lr (1e-09"
        in said
    )
    assert "generate-2" not in loops.ran
    assert loops.run(iterations=1) == 0, "there is no next one"


def test_revision_and_remote_code_reach_every_step(loops):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.policy.base.check_name", lambda *_: None)
        assert loops.run("--revision", "v2", "--trust_remote_code", iterations=2) == 0
    for name in ("generate-1", "generate-2"):
        shown = " ".join(loops.words[name])
        assert "--revision v2" in shown
        assert "--trust_remote_code" in shown
    for name in ("train-2", "validate-2"):
        shown = " ".join(loops.words[name])
        assert "--model.policy.revision v2 --model.policy.trust_remote_code true" in shown
    given = self_play.parser().parse_args(["--model", "sft", "--revision", "v2", "--trust_remote_code"])
    loop = Loop(given, (), self_play._first(given))
    opponent = loop.saved("sft")
    assert (opponent.revision, opponent.trust_remote_code) == ("v2", True)
    assert (loop.first.revision, loop.first.trust_remote_code) == ("v2", True)


def test_a_tokenizer_that_training_would_not_take_is_refused(loops, tiny_llama, capsys):
    own = load_tokenizer(str(tiny_llama))
    own.save_pretrained("same")
    own.chat_template = own.chat_template.replace("[", "<")
    own.save_pretrained("other")
    own.chat_template = load_tokenizer(str(tiny_llama)).chat_template
    own.add_tokens(["more"])
    own.save_pretrained("more")
    for name in ("same", "other", "more"):
        shutil.copy(tiny_llama / "config.json", name)
    assert loops.run("--tokenizer", "same", iterations=1) == 0
    assert "--tokenizer same" in " ".join(loops.words["generate-1"])
    for name, part in (("other", "chat template"), ("more", "vocabulary")):
        assert loops.run("--tokenizer", name) == 2
        said = capsys.readouterr().err
        assert f"--tokenizer {name}: training takes that of" in said
        assert f"whose {part} is another" in said
        assert loops.ran == []


@pytest.mark.parametrize(("given", "kept"), [("never", None), ("null", None), ("0.9", 0.9)])
def test_a_confidence_or_never(given, kept, loops, monkeypatch):
    """In a recipe's YAML `null` is a flag without a value: `never` says the same in words."""
    seen = []
    monkeypatch.setattr(self_play, "_run", lambda loop: seen.append(loop.given.stop_confidence) or 0)
    assert loops.run("--stop_confidence", given) == 0
    assert seen == [kept]


def test_chats_that_end_alike_are_told_apart(tmp_path):
    """By all that came before, and by their real answers."""
    chat = [("user", "hi"), ("assistant", "yes?"), ("user", "and now?")]
    rows = [
        (chat, "one"),
        ([("user", "bye"), *chat[1:]], "two"),
        ([chat[-1]], "three"),
        ([chat[-1]], "four"),
    ]
    lines = []
    for history, real in rows:
        turns = [{"role": role, "content": text} for role, text in history]
        both = {
            name: [*turns, {"role": "assistant", "content": text}]
            for name, text in (("real", real), ("generated", "x"))
        }
        lines.append(json.dumps(both) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(lines))
    found = _examples(tmp_path)
    assert [each["prompt"] for each in found] == [
        "[user] hi\n\n[assistant] yes?\n\n[user] and now?",
        "[user] bye\n\n[assistant] yes?\n\n[user] and now?",
        "and now?",
        "and now?",
    ]
    told = {
        "iteration": 1,
        "validation": {},
        "pairs": {"counts": {"train": {"kept": 1, "previous": 0}}, "similarity": {"train": 0.5}},
        "accuracy_interval": None,
        "lr": 1.0,
        "beta": 0.1,
        "steps": 1,
        "opponent": {"digest": "a"},
        "adapter": {"digest": "b"},
        "examples": found,
    }
    (view,) = self_play_view({"spin": {"iterations": [told, {**told, "iteration": 2}]}})
    assert [len(each["answers"]) for each in view["examples"]] == [3, 3, 3, 3]
