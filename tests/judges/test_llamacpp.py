"""The real llama.cpp over a tiny GGUF file: constrained, repeatable, and one line for what cannot work."""

from __future__ import annotations

import sys

import pytest

from trainer.judges import Judge, Question
from trainer.judges.llamacpp import LlamaCppJudge
from trainer.schema import UserError

CHOICES = ("A", "B", "C")


def questions(*texts: str, choices: tuple[str, ...] = CHOICES) -> list[Question]:
    return [Question(str(number), text, choices) for number, text in enumerate(texts)]


def picks(judge: Judge, asked: list[Question]) -> list[str | None]:
    choices = [choice for some in judge.choose(asked) for choice in some]
    assert [choice.key for choice in choices] == [question.key for question in asked]
    return [choice.pick for choice in choices]


@pytest.mark.parametrize("chat", [True, False])
def test_says_nothing_but_a_choice(gguf, chat) -> None:
    judge = LlamaCppJudge(str(gguf()), chat=chat, n_ctx=512, threads=1)
    asked = questions(*(f"Which is better, {'x' * n}?" for n in range(20)))
    found = picks(judge, asked)
    assert set(found) <= set(CHOICES)
    # Without the grammar such a model says anything but a choice.
    free = judge._llama.create_completion(asked[0].text, temperature=0.0, max_tokens=4)["choices"][0]["text"]
    assert free.strip() not in CHOICES
    if chat:
        assert len(set(found)) > 1


def test_a_choice_follows_from_its_question_alone(gguf) -> None:
    judge = LlamaCppJudge(str(gguf()), n_ctx=512, threads=1)
    asked = questions(*(f"Which is better, {'y' * n}?" for n in range(8)))
    together = picks(judge, asked)
    assert [picks(judge, [each])[0] for each in reversed(asked)] == together[::-1]


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_model_with_one_answer(gguf, letter) -> None:
    judge = LlamaCppJudge(str(gguf(letter)), n_ctx=512, threads=1)
    assert picks(judge, questions("one", "two")) == [letter, letter]


def test_longer_choices(gguf) -> None:
    judge = LlamaCppJudge(str(gguf()), n_ctx=512, threads=1)
    assert set(picks(judge, questions(*"abcdef", choices=("first", "second", '"tie"')))) <= {
        "first", "second", '"tie"',
    }  # fmt: skip


def test_a_question_that_is_too_long_is_invalid(gguf) -> None:
    judge = LlamaCppJudge(str(gguf()), n_ctx=256, threads=1)
    long, short = (choice for some in judge.choose(questions("x" * 400, "x")) for choice in some)
    assert long.pick is None
    assert "longer than n_ctx" in long.said
    assert long.answered
    assert short.pick in CHOICES


def test_the_file_is_known_by_its_content(gguf, tmp_path) -> None:
    moved = tmp_path / gguf().name
    moved.write_bytes(gguf().read_bytes())
    assert LlamaCppJudge(str(moved)).describe() == LlamaCppJudge(str(gguf())).describe()
    assert LlamaCppJudge(str(gguf("A"))).describe() != LlamaCppJudge(str(gguf())).describe()


def test_control_tokens_are_broken_up(gguf) -> None:
    marks = LlamaCppJudge(str(gguf()), n_ctx=512, threads=1)._marks
    assert marks[-2:] == ["<s>", "</s>"]
    assert "[/INST]" in marks  # of the template that a file without one gets


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": "no/such.gguf"}, r"judge.model: no/such.gguf is no file"),
        ({"model": "a/b/c.gguf", "offline": True}, "offline refuses"),
        ({"model": "."}, "is no file"),
        ({"n_ctx": 0}, "n_ctx: 0"),
    ],
)
def test_what_cannot_work(settings, told) -> None:
    with pytest.raises(UserError, match=told):
        LlamaCppJudge(**settings).describe()


def test_a_file_that_is_no_model(gguf, tmp_path) -> None:
    (tmp_path / "x.gguf").write_text("no model")
    with pytest.raises(UserError, match=r"x\.gguf is no model"):
        picks(LlamaCppJudge(str(tmp_path / "x.gguf")), questions("x"))


def test_layers_on_a_gpu_that_llama_cpp_cannot_use(gguf) -> None:
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("llama.cpp is built for a GPU here")
    with pytest.raises(UserError, match="GGML_CUDA=on"):
        picks(LlamaCppJudge(str(gguf()), n_gpu_layers=4), questions("x"))
    assert picks(LlamaCppJudge(str(gguf()), n_gpu_layers=0, n_ctx=256), questions("x"))[0] in CHOICES


def test_without_the_extra(tmp_path, monkeypatch) -> None:
    (tmp_path / "x.gguf").write_text("x")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[judge\]'") as error:
        picks(LlamaCppJudge(str(tmp_path / "x.gguf")), questions("x"))
    assert "\n" not in str(error.value)
