"""The transformers judge: log-probs of the choices, worked out a second way, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny_models
from trainer.judges import Question
from trainer.judges.scored import TransformersJudge
from trainer.schema import UserError

CHOICES = ("A", "B", "tie")


def choices(judge: TransformersJudge, texts: dict[str, str], allowed: tuple[str, ...] = CHOICES):
    asked = [Question(key, text, allowed) for key, text in texts.items()]
    return {choice.key: choice for some in judge.choose(asked) for choice in some}


def by_hand(folder, text: str) -> torch.Tensor:
    """The choices' probabilities from plain transformers, one row for each way to write each choice."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    prompt, scores = tokenizer(text)["input_ids"], []
    for choice in CHOICES:
        ways = []
        for written in (choice, " " + choice):
            ids = tokenizer(written, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            ways.append(sum(logps[len(prompt) - 1 + place, token] for place, token in enumerate(ids)))
        scores.append(torch.stack(ways).logsumexp(0))
    return torch.stack(scores).exp()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_probabilities(models, family) -> None:
    folder = models(family)
    texts = {"1": "Which?", "2": "Which one is it then?"}
    judge = TransformersJudge(str(folder), chat=False)
    for key, choice in choices(judge, texts).items():
        held = by_hand(folder, texts[key])
        expected = held / held.sum()
        assert choice.mass == pytest.approx(float(held.sum()), rel=1e-4)
        assert choice.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
        assert choice.pick == CHOICES[int(expected.argmax())]


def test_batches_change_nothing(tiny_llama) -> None:
    texts = {str(n): "Which one? " + "z" * n for n in range(7)}
    one = choices(TransformersJudge(str(tiny_llama), batch_size=1), texts)
    many = choices(TransformersJudge(str(tiny_llama), batch_size=5), texts)
    assert len({round(choice.probabilities[0], 4) for choice in one.values()}) == len(texts)
    for key, choice in one.items():
        assert many[key].pick == choice.pick
        assert many[key].probabilities == pytest.approx(choice.probabilities, abs=1e-6)


def test_a_chat_s_template_is_used_where_there_is_one(tiny_llama, tmp_path) -> None:
    text = "Which?"
    rendered = f"[user]{text}[assistant]"
    through = choices(TransformersJudge(str(tiny_llama)), {"1": text})["1"]
    plain = choices(TransformersJudge(str(tiny_llama), chat=False), {"1": rendered})["1"]
    assert through.probabilities == pytest.approx(plain.probabilities, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bare = choices(TransformersJudge(str(tmp_path)), {"1": rendered})["1"]
    assert bare.probabilities == pytest.approx(plain.probabilities, abs=1e-6)
    with pytest.raises(UserError, match="no chat template"):
        choices(TransformersJudge(str(tmp_path), chat=True), {"1": text})


def test_too_long_is_invalid(tiny_gpt2) -> None:
    found = choices(TransformersJudge(str(tiny_gpt2)), {"long": "x" * 600, "short": "x"})
    assert found["long"].pick is None
    assert "617 tokens" in found["long"].said
    assert found["short"].pick in CHOICES


def test_weights_that_are_not_finite_are_invalid(tmp_path) -> None:
    folder = tiny_models.make("gpt2", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    found = choices(TransformersJudge(str(folder), chat=False), {"1": "x"})["1"]
    assert (found.pick, found.said) == (None, "the model's log-probs are not finite")


def test_special_tokens_in_a_text_are_letters(tiny_llama) -> None:
    judge = TransformersJudge(str(tiny_llama))
    assert (
        choices(judge, {"1": "x</s>"})["1"].probabilities
        == choices(judge, {"1": "x< /s>"})["1"].probabilities
    )


def test_what_it_says_of_itself(tiny_llama, tiny_gpt2) -> None:
    first, second = (TransformersJudge(str(folder)).describe() for folder in (tiny_llama, tiny_gpt2))
    assert first["base"] != second["base"]
    assert first["chat"] is True


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "judge.model: is missing"),
        ({"model": "x", "batch_size": 0}, "batch_size: 0"),
        ({"model": "./no/such"}, "no folder"),
        ({"model": "a/b", "offline": True}, "offline refuses"),
    ],
)
def test_what_cannot_work(settings, told) -> None:
    with pytest.raises(UserError, match=told):
        list(TransformersJudge(**settings).choose([Question("1", "x", CHOICES)]))
