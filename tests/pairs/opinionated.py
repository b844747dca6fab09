"""Tiny chat models that answer in the forms that self-judging asks for: random weights, but for what follows what."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer, config

GEMMA2_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
"""Gemma 2's own, as its tokenizer has it."""

ANSWERS = (
    "Париж",
    "Это город Лион, он стоит на Роне",
    "It is Rome",
    "Море, горы и леса",
    "Так бывает каждый год весной",
)
OPENINGS = tuple(
    opening for each in ANSWERS for opening in (f'{{"answer": "{each}", "estimate": ', f"{each}, ")
)
NONSENSE = "Не знаю"
_OTHER, _OPENED, _SCORED, _CLOSED = range(1, 5)


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and one for each opening of an answer; the chat template of the family."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*OPENINGS, NONSENSE])
    if family == "gemma2":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA2_TEMPLATE if family == "gemma2" else CHAT_TEMPLATE
    return tokenizer


def make(family: str, folder: Path, form: str = "json", seed: int = 0) -> Path:
    """Write a model of `family` (llama or gemma2): an opening of an answer in `form`, a digit, an end.

    Hidden dimensions 1 to 4 say what kind of token came last; the rest is random, so that prompts matter.
    """
    tokenizer = tokenizer_of(family)
    made = config(family, len(tokenizer))
    made.max_position_embeddings, made.tie_word_embeddings = 4096, False
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = tokenizer.get_vocab()
    openings = [ids[each] for each in OPENINGS if (each[0] == "{") == (form == "json")]
    digits, close, end = [ids[digit] for digit in "12345"], ids["}"], tokenizer.eos_token_id
    kinds = {
        **dict.fromkeys(openings, _OPENED),
        **dict.fromkeys(digits, _SCORED),
        close: _CLOSED,
        ids[NONSENSE]: _SCORED,
    }
    allowed = {
        _OTHER: [*openings, ids[NONSENSE]],
        _OPENED: digits,
        _SCORED: [close] if form == "json" else [end],
        _CLOSED: [end],
    }
    with torch.no_grad():
        inner, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        inner[:, 1:5], head[:, 1:5] = 0.0, -4.0
        for token in range(len(tokenizer)):
            inner[token, kinds.get(token, _OTHER)] = 3.0
        for kind, following in allowed.items():
            head[following, kind] = 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CRITERIA = {"brevity": "Brevity", "clarity": "Clarity"}
_TEXTS = {
    "answer": "Answer: {instruction}",
    "plain": "Answer, then a score by\n{criteria}\n{instruction}",
    "json": 'As {"answer": "...", "estimate": 1}, by\n{criteria}\n{instruction}',
    "one": "{instruction} -> {answer}\n{criterion}: {description} 1 to 5?",
    "two": "How is {answer} to {instruction} by {criterion} ({description}) from 1 to 5?",
}


def short_rubric(folder: Path, language: str = "ru") -> Path:
    """A rubric with few words, two criteria and two wordings: what it asks is soon computed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    content = {
        "language": language,
        "criteria": {key: {"name": name, "asks": f"is it {key}?"} for key, name in CRITERIA.items()},
        "prompts": {name: f"{name}.txt" for name in ("answer", "plain", "json")}
        | {"score": ["one.txt", "two.txt"]},
    }
    (folder / "rubric.yaml").write_text(yaml.safe_dump(content))
    return folder / "rubric.yaml"
