"""`tandem evaluate win-rate` on real configs, tiny models and a real llama.cpp: whole, resumed, refused in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from tests.judges.conftest import gguf  # noqa: F401
from tests.judges.servers import chat, serving
from tests.launch.helpers import ROOT, tandem

CONFIGS = ROOT / "configs" / "hh_rlhf"


def rows(path: Path, count: int = 80) -> Path:
    """Dialogues in the form of hh-rlhf."""
    asked = [f"\n\nHuman: Is {n} enough?\n\nAssistant:" for n in range(count)]
    lines = [{"chosen": f"{text} It is, {n}.", "rejected": f"{text} No."} for n, text in enumerate(asked)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(tiny_gpt2, tmp_path_factory) -> Path:
    """A folder with rows.jsonl and a run that trained on them, with scales that say something else than the base."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("trained")
    words = [
        "fit",
        "--config",
        str(CONFIGS / "ia3.yaml"),
        "--config",
        str(ROOT / "configs/hardware/cpu.yaml"),
    ]
    words += [
        "--run",
        str(folder / "run"),
        "--data.source.path",
        str(rows(folder / "rows.jsonl")),
        "--threads",
        "1",
    ]
    words += ["--model.policy.base", str(tiny_gpt2), "--data.max_length", "256", "--trainer.max_steps", "2"]
    words += ["--trainer.enable_progress_bar", "false", "--samples.sampling.max_new_tokens", "2"]
    assert main(words) == 0
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    best = folder / "run" / "checkpoints" / "last"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), best).save_pretrained(
        folder / "adapter"
    )
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * -2 for name, tensor in load_file(weights).items()}, weights)
    return folder


def words(trained: Path, output: Path, *more: str) -> list[str]:
    given = [
        "evaluate",
        "win-rate",
        "--config",
        str(CONFIGS / "win_rate.yaml"),
        "--adapter",
        str(trained / "adapter"),
    ]
    given += ["--data.path", str(trained / "rows.jsonl"), "--data.test_fraction", "0.3", "--threads", "1"]
    return [*given, "--sampling.max_new_tokens", "16", "--output", str(output), *more]


def test_against_base_and_answers(gguf, trained, tmp_path, capsys) -> None:  # noqa: F811
    output = tmp_path / "win_rate.json"
    given = words(trained, output, "--judge", str(gguf()), "--judge.n_ctx", "2048", "--questions", "6")
    assert main(given) == 0
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(output.read_text())
    assert (result["kind"], result["label"], result["questions"], result["stopped"]) == (
        "win_rate",
        "DPO",
        6,
        None,
    )
    for found in result["against"].values():
        place = printed.index(f"Number of wins of the base model: {found['losses']}")
        assert printed[place + 1] == f"Number of wins of the DPO model: {found['wins']}"
        assert printed[place + 2] == f"Winner: {found['winner']}"
        printed = printed[place + 1 :]
        assert found["wins"] + found["losses"] + found["ties"] + found["invalid"] == 6
    assert result["judge"]["class"] == "LlamaCppJudge"
    assert result["data"]["counts"]["kept"] > 6
    assert {"model", "sampling", "versions", "git", "prompt"} <= set(result)
    assert len(result["examples"]) == 12
    again = tmp_path / "again.json"
    assert (
        main(words(trained, again, "--judge", str(gguf()), "--judge.n_ctx", "2048", "--questions", "6")) == 0
    )
    assert json.loads(again.read_text())["against"] == result["against"]


def test_the_judge_that_always_says_a(gguf, trained, tmp_path, capsys) -> None:  # noqa: F811
    assert main(words(trained, tmp_path / "w.json", f"--judge={gguf('A')}", "--questions", "3")) == 0
    printed = capsys.readouterr().out
    assert printed.count("Number of wins of the base model: 0") == 2
    assert printed.count("Number of wins of the DPO model: 0") == 2
    assert printed.count("Winner: Both") == 2
    assert "picks of the first place: 100.0%" in printed


def test_a_transformers_judge_by_its_folder(trained, tiny_llama, tmp_path) -> None:
    more = ("--judge", str(tiny_llama), "--judge.chat", "false", "--prompt", str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_text("{question}\nA {first}\nB {second}\n")
    assert main(words(trained, tmp_path / "w.json", *more)) == 0
    result = json.loads((tmp_path / "w.json").read_text())
    assert result["judge"]["class"] == "TransformersJudge"
    assert result["prompt"] == "{question}\nA {first}\nB {second}\n"
    assert result["questions"] == 5


def served(url: str, folder: Path) -> str:
    settings = {"url": url, "model": "tiny", "wait": 0.01, "timeout": 5, "attempts": 2, "parallel": 1}
    path = folder / "judge.yaml"
    path.write_text(
        yaml.safe_dump({"class_path": "trainer.judges.served.ServerJudge", "init_args": settings})
    )
    return str(path)


def test_a_server_that_goes_away_and_comes_back(trained, tmp_path, capsys) -> None:
    output, state = tmp_path / "w.json", {"up": 7}

    def answer(n: int, body: dict):
        state["up"] -= 1
        return (200, chat("A")) if state["up"] >= 0 else (503, {})

    with serving(answer) as asked:
        given = words(trained, output, "--judge", served(asked.url, tmp_path))
        assert main(given) == 2
        printed = capsys.readouterr()
        assert "the same command asks again" in printed.err
        assert printed.err.rstrip().splitlines()[-1].startswith("tandem: error: the judge gave no answer to")
        result = json.loads(output.read_text())
        found = result["against"].values()
        assert sum(each["invalid"] for each in found) == sum(each["unanswered"] for each in found) == 7
        assert sum(each["wins"] for each in found) == 0
        assert "without an answer" in printed.out
        state["up"], before = 1000, len(asked.bodies)
        assert main(given) == 0
        assert len(asked.bodies) - before == 20 - 7
    assert [each["invalid"] for each in json.loads(output.read_text())["against"].values()] == [0, 0]


def test_a_server_that_talks_nonsense(trained, tmp_path, capsys) -> None:
    with serving(lambda n, body: (200, chat("Bananas"))) as asked:
        assert main(words(trained, tmp_path / "w.json", "--judge", served(asked.url, tmp_path))) == 0
    assert capsys.readouterr().out.count("invalid: 5") == 2


def test_a_kill_asks_nothing_twice(trained, tmp_path) -> None:
    """SIGKILL while the judge is at work; the same command then asks what is missing."""
    seen: list[str] = []

    def answer(n: int, body: dict):
        seen.append(body["messages"][0]["content"])
        time.sleep(0.02)
        return 200, chat("B")

    with serving(answer) as asked:
        given = words(
            trained, tmp_path / "w.json", "--judge", served(asked.url, tmp_path), "--questions", "12"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", *given], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 120
        while len(seen) < 10 and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        first = len(seen)
        assert 10 <= first < 48
        assert main(given) == 0
    # What was under way when the signal came may be asked again.
    assert len(seen) - 48 <= 1
    assert len(set(seen)) == 48
    assert (tmp_path / "w.json").is_file()


def test_down_from_the_beginning(trained, tmp_path, capsys) -> None:
    with serving(lambda n, body: (500, {})) as asked:
        judge = served(asked.url, tmp_path)
    assert main(words(trained, tmp_path / "w.json", "--judge", judge)) == 2
    said = capsys.readouterr()
    assert "cannot be reached" in said.err
    assert said.out.count("Number of wins of the DPO model: 0") == 2
    assert said.out.count("invalid: 5 (5 without an answer)") == 2


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--judge", "no/such.gguf"), "judge.model: no/such.gguf is no file"),
        (("--judge", "no.such.Judge"), "judge"),
        (("--judge", ""), "judge: "),
        (("--judge.n_ctx", "0"), "n_ctx: 0"),
        (
            ("--data.prompt_ends", "Nobody:"),
            "data: the part test has no row (rows 80, dropped_prompts_differ 80)",
        ),
        (("--prompt", "no_such.txt"), "--prompt no_such.txt"),
        (("--questions", "0"), "questions"),
        (("--split", "train"), "split"),
        (("--output", "."), "give a file such as"),
        (("--output", "out"), "give a file such as out/win_rate.json"),
        (("--adapter", "no/such/folder"), "no/such/folder"),
        (("--offline",), "offline refuses"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, capsys, monkeypatch, more, told) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    assert main(words(trained, tmp_path / "w.json", *more)) == 2
    said = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert said.startswith("tandem: error: ")
    assert told in said


def test_it_needs_a_trained_model(trained, tmp_path, capsys) -> None:
    given = words(trained, tmp_path / "w.json")
    place = given.index("--adapter")
    assert main(given[:place] + given[place + 2 :]) == 2
    assert "--adapter: is missing" in capsys.readouterr().err


def test_weights_that_were_all_trained_are_compared_with_their_base(
    trained, tiny_gpt2, models, tmp_path, capsys
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = tmp_path / "whole"
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.transformer.h[0].mlp.c_proj.weight.data *= -1
    model.save_pretrained(whole)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(whole)
    judge = ("--judge", str(models("llama")), "--judge.chat", "false", "--adapter", str(whole))
    assert main(words(trained, tmp_path / "w.json", *judge)) == 2
    assert "give --base, too" in capsys.readouterr().err
    assert main(words(trained, tmp_path / "w.json", *judge, "--base", str(tiny_gpt2))) == 0
    examples = json.loads((tmp_path / "w.json").read_text())["examples"]
    assert any(each["dpo"] != each["other"] for each in examples if each["against"] == "base")


OWN = """
from trainer.judges import Choice, Judge


class Longer(Judge):
    def __init__(self, margin: int = 0) -> None:
        self.margin = margin

    def choose(self, questions):
        for question in questions:
            _, first, second = question.text.split("|||")
            more = len(first) - len(second)
            pick = "C" if abs(more) <= self.margin else "A" if more > 0 else "B"
            yield [Choice(question.key, pick)]

    def describe(self):
        return {"class": "Longer", "margin": self.margin}
"""


def test_a_judge_of_one_s_own_is_one_file_and_one_line(trained, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_judge.py").write_text(OWN)
    (tmp_path / "p.txt").write_text("{question}|||{first}|||{second}")
    monkeypatch.chdir(tmp_path)
    more = ("--judge", "own_judge.Longer", "--judge.margin", "2", "--prompt", str(tmp_path / "p.txt"))
    assert main(words(trained, tmp_path / "w.json", *more)) == 0
    result = json.loads((tmp_path / "w.json").read_text())
    assert result["judge"] == {"class": "Longer", "margin": 2}
    for each in result["examples"]:
        more_text = len(each["dpo"]) - len(each["other"])
        assert each["verdict"] == ("tie" if abs(more_text) <= 2 else "win" if more_text > 0 else "loss")
    assert all(found["length_bias"]["rate"] in (None, 1.0) for found in result["against"].values())


def test_help_names_the_judges() -> None:
    done = tandem(["evaluate", "win-rate", "--help"])
    assert done.returncode == 0
    assert "--judge" in done.stdout
    assert ".gguf" in done.stdout


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharded", [[], ["--sharded"]])
def test_two_ranks_answer_as_one(trained, tiny_llama, tmp_path, sharded) -> None:
    judge = ("--judge", str(tiny_llama), "--judge.chat", "false", "--prompt", str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_text("{question}\nA {first}\nB {second}\n")
    more = (*judge, "--batch_size", "2")
    assert main(words(trained, tmp_path / "one.json", *more)) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "launch.cli", *words(trained, tmp_path / "two.json", *more, *sharded)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Winner: ") == 2, "one rank speaks for both"
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["examples"] == two["examples"]
    assert one["against"] == two["against"]
