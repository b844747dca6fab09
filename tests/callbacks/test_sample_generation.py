"""SampleGeneration with a real tiny policy and reference: what is written, when; training does not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.improved_loss_checkpoint import ImprovedLossCheckpoint
from callbacks.records import rewind
from callbacks.sample_generation import SampleGeneration, _described, _markdown
from tests.callbacks.language import LanguageModule
from tests.callbacks.tiny import fit, trainer
from trainer.data.homoglyphs import substitute
from trainer.generation import Generation, Sampling
from trainer.schema import UserError

PROMPTS = ["so cold", "рука"]
SAMPLED = Sampling(max_new_tokens=5, do_sample=True, seed=3)


def records(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_writes_policy_beside_reference(tmp_path: Path, tiny_llama: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = SampleGeneration(
        PROMPTS, every_n_steps=2, sampling=SAMPLED, prompt_template="Repeat: {text}\n"
    )
    module = LanguageModule(tiny_llama)
    fit(trainer(tmp_path, callback, logger=logger), module, [1.0] * 5)
    found = records(tmp_path)
    assert [(r["step"], r["prompt"]) for r in found] == [(step, p) for step in (0, 2, 4, 5) for p in PROMPTS]
    # A fresh adapter changes nothing, so at step 0 both answer the same; training moves the policy only.
    assert all(r["policy"] == r["reference"] and r["policy"] for r in found[:2])
    assert [r["policy"] for r in found[-2:]] != [r["policy"] for r in found[:2]]
    assert len({r["reference"] for r in found if r["prompt"] == PROMPTS[0]}) == 1
    assert module.tokenizer.decode(callback._ids[0], skip_special_tokens=True) == "Repeat: so cold\n"

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    texts = events.Tensors("samples/1/text_summary")
    assert [event.step for event in texts] == [0, 2, 4, 5]
    first = texts[0].tensor_proto.string_val[0].decode("utf-8")
    assert first == _markdown(found[0])
    assert first.startswith("prompt: so cold")
    assert [e.value for e in events.Scalars("samples/length_reference")][-1] == callback.length_reference


def test_marks_exchanged_letters() -> None:
    answer = Generation([5], substitute("so cold") + "!", True)
    described = _described("policy", "so cold", answer)
    assert described["policy_marked"] == "s**о** **со**ld!"
    assert described["policy_finished"]


def test_without_a_reference(tmp_path: Path, tiny_llama: Path) -> None:
    callback = SampleGeneration(PROMPTS, sampling=Sampling(max_new_tokens=3))
    fit(trainer(tmp_path, callback), LanguageModule(tiny_llama, reference=False), [1.0])
    assert "reference" not in records(tmp_path)[0]
    assert callback.length_reference is None


def test_training_draws_the_same_random_numbers(tmp_path: Path, tiny_llama: Path) -> None:
    def losses(*callbacks: SampleGeneration) -> list[float]:
        module = LanguageModule(tiny_llama)
        # Something in the model that draws, as dropout does.
        module.policy.register_forward_hook(lambda *_: torch.rand(1) and None)
        module.policy.get_base_model().register_forward_hook(lambda *_: torch.rand(1) and None)
        fit(trainer(tmp_path, *callbacks), module, [1.0] * 5)
        assert all(p.requires_grad == ("default" in n) for n, p in module.policy.named_parameters())
        return module.losses

    without = losses()
    assert losses(SampleGeneration(PROMPTS, every_n_steps=1, sampling=SAMPLED)) == without
    assert len(set(without)) == 5


def test_a_resumed_run_writes_each_step_once(tmp_path: Path, tiny_llama: Path) -> None:
    def run(resume: str | None) -> list[dict]:
        callback = SampleGeneration(PROMPTS, every_n_steps=2, sampling=SAMPLED)
        saver = ImprovedLossCheckpoint(save_steps=1, keep=-1)
        path = tmp_path / "checkpoints" / resume if resume else None
        fit(trainer(tmp_path, callback, saver), LanguageModule(tiny_llama), [1.0] * 5, resume=path)
        return records(tmp_path)

    assert [r["step"] for r in run(None)] == [0, 0, 2, 2, 4, 4, 5, 5]
    # A line that a kill cut short goes as well.
    with open(tmp_path / "samples.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 5, "ep')
    assert [r["step"] for r in run("step-00000003")] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert [r["step"] for r in run("step-00000005")] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert [r["step"] for r in run("step-00000004")] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert [r["step"] for r in run(None)] == [0, 0, 2, 2, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": []}, "prompts: give a list"),
        ({"prompts": "one text"}, "prompts: give a list"),
        ({"prompts": ["a", ""]}, "prompts: give a list"),
        ({"prompts": ["a"], "every_n_steps": 0}, "every_n_steps: 0"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size: 0"),
        ({"prompts": ["a"], "prompt_template": "Repeat:"}, "does not hold {text}"),
    ],
)
def test_misconfigured(tmp_path: Path, tiny_llama: Path, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fit(trainer(tmp_path, SampleGeneration(**settings)), LanguageModule(tiny_llama), [1.0])


def test_texts_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b"]
    lines = [
        json.dumps({"step": step, "policy": text}, ensure_ascii=False) for step, text in enumerate(texts)
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 1, "pol', encoding="utf-8")
    rewind(path, 1)
    kept = path.read_text(encoding="utf-8").split("\n")
    assert kept == [*lines[:2], ""]
