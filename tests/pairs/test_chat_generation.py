"""Answers of chat models: the template is the model's own, with a system text also where it knows no such role."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.judges.servers import chat as answered
from tests.judges.servers import serving
from tests.pairs.opinionated import make, tokenizer_of
from tests.pairs.rewards import CountReward
from trainer.data.chat import render, render_prompt
from trainer.data.preferences import PreferenceFile
from trainer.data.tokenize import tokenize_preferences, tokenize_prompt
from trainer.generation import Sampling
from trainer.pairs.best_of_n import BestOfN
from trainer.pairs.building import build
from trainer.pairs.continuations import LocalGenerator
from trainer.pairs.prompts import Prompt, TextPrompts
from trainer.pairs.served import ServerGenerator
from trainer.schema import UserError

GEMMA = tokenizer_of("gemma2")
PLAIN = tokenizer_of("llama")
USER = {"role": "user", "content": " Как дела?\n"}
SYSTEM = {"role": "system", "content": "Отвечай кратко."}
PROMPTS = [Prompt("a", "Назови город"), Prompt("b", "Где тепло?"), Prompt("c", "Зачем?")]


def test_a_gemma_2_chat_is_apply_chat_template_s() -> None:
    expected = "<s><start_of_turn>user\nКак дела?<end_of_turn>\n<start_of_turn>model\n"
    assert render_prompt(GEMMA, [USER]) == expected
    assert GEMMA.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == expected
    ids = GEMMA.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert tokenize_prompt([USER], GEMMA) == ids
    assert ids.count(GEMMA.bos_token_id) == 1
    answer = {"role": "assistant", "content": "Хорошо."}
    opening, (closing,) = render(GEMMA, [USER], [[answer]])
    assert opening + closing == GEMMA.apply_chat_template([USER, answer], tokenize=False)


def test_a_system_text_stands_before_the_user_s_where_the_template_has_no_such_role() -> None:
    both = "<s><start_of_turn>user\nОтвечай кратко.\n\nКак дела?<end_of_turn>\n<start_of_turn>model\n"
    assert render_prompt(GEMMA, [SYSTEM, USER]) == both
    assert render_prompt(PLAIN, [SYSTEM, USER]) == "<s>[system]Отвечай кратко.[user] Как дела?\n[assistant]"
    further = [SYSTEM, USER, {"role": "assistant", "content": "Да."}, {"role": "user", "content": "А ещё?"}]
    assert render_prompt(GEMMA, further) == (
        both[: -len("<start_of_turn>model\n")] + "<start_of_turn>model\nДа.<end_of_turn>\n"
        "<start_of_turn>user\nА ещё?<end_of_turn>\n<start_of_turn>model\n"
    )
    # Training and generation render alike, also with an answer behind it.
    opening, _ = render(GEMMA, [SYSTEM, USER], [[{"role": "assistant", "content": "Да."}]])
    assert opening == both


@pytest.mark.parametrize("turns", [[SYSTEM], [USER, USER], [SYSTEM, USER, USER]])
def test_what_a_template_refuses_otherwise_it_still_does(turns) -> None:
    with pytest.raises(UserError, match="the chat template refuses these messages"):
        render_prompt(GEMMA, turns)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("system", [None, "Отвечай кратко."])
def test_greedy_answers_are_plain_transformers_own(tmp_path, family, system) -> None:
    folder = make(family, tmp_path / family)
    generator = LocalGenerator(str(folder), chat=True, system=system, batch_size=2)
    batches = list(generator.continued(PROMPTS, 1, Sampling(24)))
    found = {prompt.key: texts[0] for batch in batches for prompt, texts in batch}
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    for prompt in PROMPTS:
        text = prompt.text if system is None or family == "llama" else f"{system}\n\n{prompt.text}"
        turns = [{"role": "user", "content": text}]
        if system is not None and family == "llama":
            turns = [{"role": "system", "content": system}, *turns]
        ids = torch.tensor(
            [tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)]
        )
        out = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert found[prompt.key].text == tokenizer.decode(out, skip_special_tokens=True)
        assert found[prompt.key].finished == (tokenizer.eos_token_id in out.tolist())
        assert found[prompt.key].text.startswith('{"answer": "')


def test_a_chat_is_another_generator_and_plain_text_the_one_it_was(tmp_path) -> None:
    folder = str(make("llama", tmp_path / "llama"))
    plain, chat = LocalGenerator(folder), LocalGenerator(folder, chat=True)
    assert set(plain.describe()) == {"class", "base", "adapter", "dtype"}
    assert chat.describe() == plain.describe() | {"chat": True, "system": None}


def test_pairs_of_a_chat_are_trained_as_they_were_generated(tmp_path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"Назови город {number}" for number in range(4)))
    folder = str(make("gemma2", tmp_path / "gemma2", "plain"))
    generator = LocalGenerator(folder, chat=True, system="Кратко.")
    prompts = TextPrompts(str(tmp_path / "list.txt"), tokens=None, part="all")
    build(BestOfN(generator, prompts, CountReward("ои"), 4, Sampling(12, True)), tmp_path / "out")
    loaded = PreferenceFile(str(tmp_path / "out" / "pairs.jsonl"), validation_fraction=0.0).load("train")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = {f"Назови город {number}" for number in range(4)}
    for record, tokens in zip(loaded.records, tokenize_preferences(loaded.records, tokenizer), strict=True):
        assert [turn["role"] for turn in record.prompt] == ["system", "user"]
        assert record.prompt[1]["content"] in asked
        assert tokens.prompt == tokenize_prompt(record.prompt, tokenizer)
        assert tokens.prompt == tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Кратко.\n\n{record.prompt[1]['content']}"}],
            add_generation_prompt=True,
            return_dict=False,
        )


def test_a_server_is_asked_for_a_chat() -> None:
    with serving(lambda number, body: (200, answered(body["messages"][-1]["content"].upper()))) as asked:
        generator = ServerGenerator(asked.url, "some", chat=True, system="short", parallel=1)
        batches = list(generator.continued([Prompt("a", "why?")], 2, Sampling(9, True, temperature=0.5)))
    assert [text.text for batch in batches for _, texts in batch for text in texts] == ["WHY?", "WHY?"]
    assert asked.paths == ["/v1/chat/completions"] * 2
    wanted = [{"role": "system", "content": "short"}, {"role": "user", "content": "why?"}]
    assert all(body["messages"] == wanted and body["max_tokens"] == 9 for body in asked.bodies)
    assert len({body["seed"] for body in asked.bodies}) == 2


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: LocalGenerator("x", system="s"), "LocalGenerator.system: has no effect without chat: true"),
        (
            lambda: ServerGenerator("http://h/v1", "m", system="s"),
            "ServerGenerator.system: has no effect without",
        ),
        (
            lambda: ServerGenerator("http://h/v1", "m", bos="b", chat=True),
            "ServerGenerator.bos: has no effect with",
        ),
    ],
)
def test_settings_without_effect_are_refused(made, message) -> None:
    with pytest.raises(UserError, match=message):
        made()


def test_a_model_without_a_template_is_named(tmp_path, models) -> None:
    folder = make("llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no chat template"):
        list(LocalGenerator(str(folder), chat=True).continued(PROMPTS, 1, Sampling(4)))
