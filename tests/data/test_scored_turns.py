"""All answers of a chat scored: which tokens those are, whatever the template, the layout and the limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers_of_kinds import KINDS
from tests.tiny_models import byte_tokenizer
from trainer.data.chat import render_prompt, render_turns
from trainer.data.datamodule import SupervisedData
from trainer.data.layout import altered, packed, picked, separated, spread, supervised
from trainer.data.preferences import DemonstrationFile
from trainer.data.store import TokenStore, scored, write_store
from trainer.data.tokenize import Limits, tokenize_demonstrations
from trainer.policy.load import PolicyConfig, load_frozen
from trainer.policy.logprobs import completion_logps
from trainer.schema import Demonstration, Message, StepShare, TokenizedDemonstration, UserError

WHOLE = StepShare(1.0, 1.0, True)
END_OF_TURN = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def gemma() -> PreTrainedTokenizerFast:
    """Turns end with a token that is not EOS, and a newline."""
    made = byte_tokenizer(chat=False)
    made.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    made.chat_template = END_OF_TURN
    return made


TOKENIZERS = {**KINDS, "gemma": gemma, "bytes": byte_tokenizer}


def chat(*said: str) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]  # type: ignore[misc]


CHAT = chat("one two", "three\nfour", "the coat", " the", "сорок", "one, two")


def demonstrated(
    tokenizer: Any, turns: list[Message] = CHAT, limits: Limits | None = None, **settings: Any
) -> TokenizedDemonstration:
    settings = {"scored_turns": "all", **settings}
    record = Demonstration(turns[:-1], turns[-1:], "id", "chats.jsonl, row 7", **settings)
    (made,) = tokenize_demonstrations([record], tokenizer, limits)
    return made


def scored_texts(tokenizer: Any, example: TokenizedDemonstration) -> list[str]:
    """The runs of scored tokens, as text with its special tokens."""
    runs: list[list[int]] = []
    marks = [*(example.marks or [0] * len(example.prompt)), *[1] * len(example.completion)]
    for before, token, mark in zip([0, *marks], [*example.prompt, *example.completion], marks, strict=False):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
    return [str(tokenizer.decode(run, skip_special_tokens=False)) for run in runs]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_every_answer_is_scored_up_to_the_end_of_its_turn_and_nothing_else(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    found = [text.strip() for text in scored_texts(tokenizer, demonstrated(tokenizer))]
    end = tokenizer.eos_token
    expected = {
        "gpt2": ["three\nfour", "the", f"one, two\n{end}"],  # its template ends a turn with a newline
        "llama3": ["three\nfour", "the", f"one, two\n{end}"],
        "qwen": [f"three\nfour{end}", f"the{end}", f"one, two{end}"],
        "llama2": [f"three\nfour {end}", f"the {end}", f"one, two {end}"],
        "gemma": ["three\nfour<end_of_turn>", "the<end_of_turn>", f"one, two<end_of_turn>\n{end}"],
        "bytes": [f"three\nfour{end}", f"the{end}", f"one, two{end}"],
    }[kind]
    assert found == expected


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_each_answer_has_the_tokens_that_it_has_as_the_last_one(kind: str) -> None:
    """A plain reference: every answer alone, behind its own history, as `last` scores it."""
    tokenizer = TOKENIZERS[kind]()
    whole = demonstrated(tokenizer)
    marked = [token for token, mark in zip(whole.prompt, whole.marks, strict=True) if mark]
    alone: list[int] = []
    for end in (2, 4):
        answer = demonstrated(tokenizer, CHAT[:end], scored_turns="last").completion
        own = answer if kind in ("qwen", "llama2", "bytes") else answer[:-1]  # no EOS in the midst of a chat
        alone += own[:-1] if kind == "gemma" else own  # nor the newline behind the end of a turn
    assert marked == alone
    assert whole.completion == demonstrated(tokenizer, scored_turns="last").completion
    assert "".join(render_turns(tokenizer, CHAT[:-1])) == render_prompt(tokenizer, CHAT[:-1])
    assert not demonstrated(tokenizer, scored_turns="last").marks


@pytest.mark.parametrize("bos", [True, False])
def test_the_oldest_tokens_go_first_and_an_answer_that_was_cut_is_not_scored(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos)
    if not bos:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    whole = demonstrated(tokenizer)
    size = len(whole.prompt) + len(whole.completion)
    texts = scored_texts(tokenizer, whole)
    seen = set()
    for limit in range(len(whole.completion) + 2, size + 1):
        cut = demonstrated(tokenizer, limits=Limits(limit, "truncate"))
        assert len(cut.prompt) + len(cut.completion) == limit
        assert len(cut.marks) in (0, len(cut.prompt))
        kept = limit - len(whole.completion) - bos
        assert cut.prompt[bos:] == whole.prompt[len(whole.prompt) - kept :]
        # Those answers whose first token, and one before it, is left.
        firsts = [n for n in range(1, len(whole.marks)) if whole.marks[n] and not whole.marks[n - 1]]
        left = sum(first > len(whole.prompt) - kept for first in firsts) if limit < size else len(firsts)
        assert scored_texts(tokenizer, cut) == texts[len(firsts) - left :]
        seen.add(left)
    assert seen == {0, 1, 2}


def model_of(folder: Path, attention: str | None = None) -> Any:
    return load_frozen(PolicyConfig(str(folder), None, attention=attention)).eval()


def plain_sums(model: Any, examples: list[TokenizedDemonstration]) -> torch.Tensor:
    """Each chat alone, through the model as it is: log-probs of all tokens, times a mask."""
    sums = []
    for example in examples:
        ids = torch.tensor([*example.prompt, *example.completion])
        mask = torch.tensor([*(example.marks or [0] * len(example.prompt)), *[1] * len(example.completion)])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].float()
        each = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        sums.append((each * mask[1:]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_and_padded_rows_sum_what_a_mask_says(models, family: str) -> None:
    folder = models(family)
    model, tokenizer = model_of(folder), byte_tokenizer()
    examples = [
        demonstrated(tokenizer),
        demonstrated(tokenizer, chat("a", "b"), scored_turns="all"),
        demonstrated(tokenizer, limits=Limits(60, "truncate")),
        demonstrated(tokenizer, scored_turns="last"),
        demonstrated(tokenizer, chat("x", "yes", "z", "no"), finished=False),
    ]
    expected = plain_sums(model, examples)
    padded, row = (lay(examples, tokenizer.pad_token_id, WHOLE).rows for lay in (supervised, packed))
    again = [separated(row, tokenizer.pad_token_id), picked(row, range(len(examples)))]
    masked = model_of(folder, "eager")  # which spreads packed rows
    for rows, own in ((padded, model), (row, model), *((each, model) for each in again), (row, masked)):
        sums, counts = completion_logps(own, rows)
        torch.testing.assert_close(sums.detach(), expected, atol=2e-4, rtol=1e-5)
        assert counts.tolist() == [example.scored for example in examples]
    # What the last chat sees is not altered, and so neither is what it sums.
    torch.testing.assert_close(
        completion_logps(model, altered(row))[0][-1].detach(), expected[-1], atol=2e-4, rtol=0
    )
    assert (
        separated(spread(row, 100), 0).scored_positions.tolist()
        == separated(row, 0).scored_positions.tolist()
    )


def test_a_step_s_mean_is_over_all_that_is_scored(tmp_path: Path, models) -> None:
    """From the file to the weights of a step, through the store: denominators are tokens scored."""
    rows = [{"messages": CHAT}, {"messages": chat("a", "b", "c", "d")}, {"messages": chat("a", "b")}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = {}
    for layout in ("prefix_shared", "concatenated"):
        source = DemonstrationFile(str(path), validation_fraction=0.0, scored_turns="all")
        data = SupervisedData(source, batch_size=3, layout=layout, cache=str(tmp_path / "cache"))  # type: ignore[arg-type]
        data.tokenizer = byte_tokenizer()
        data.setup("fit")
        examples = list(data.examples["train"])
        (batch,) = [data.laid("train")[each] for each in data.sampler("train", 3, 1, shuffle=False)]
        total = sum(example.scored for example in examples)
        assert total > sum(len(example.completion) for example in examples)
        assert batch.share.token_weight == pytest.approx(1 / total)
        sums, _ = completion_logps(model_of(models("llama")), batch.rows)
        losses[layout] = -batch.share.token_weight * sums.sum().item()
        assert losses[layout] == pytest.approx(
            -plain_sums(model_of(models("llama")), examples).sum().item() / total, rel=1e-5
        )
        assert data.describe()["source"]["scored_turns"] == "all"


def test_a_store_keeps_the_marks(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    examples = [demonstrated(tokenizer), demonstrated(tokenizer, scored_turns="last")]
    write_store(tmp_path / "store", iter(examples), "demonstration", 300, dict)
    store = TokenStore(tmp_path / "store")
    assert list(store) == examples
    assert scored(store).tolist() == scored(examples).tolist() == [example.scored for example in examples]
    assert store.lengths.tolist() == [[len(e.prompt), len(e.completion)] for e in examples]


def test_a_template_that_renders_answers_otherwise_once_more_follows_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(
        UserError, match=r"chats.jsonl, row 7: .* renders the first 2 turns otherwise .* to last"
    ):
        demonstrated(tokenizer)
    assert demonstrated(tokenizer, scored_turns="last").completion
    assert demonstrated(tokenizer, chat("a", "b")).completion, "a chat of one answer has nothing to part"


def test_what_cannot_be_scored_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="scored_turns is all, and the prompt is plain text"):
        tokenize_demonstrations([Demonstration("a", "b", "id", scored_turns="all")], tokenizer)
    with pytest.raises(UserError, match="row 7: the completion holds the end token '</s>' inside its text"):
        demonstrated(tokenizer, chat("a", "b</s>c", "d", "e"))
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": chat("a", " ", "b", "c")}) + "\n")
    assert len(list(DemonstrationFile(str(path), validation_fraction=0.0).load("train").records)) == 1
    with pytest.raises(UserError, match="row 1: turn 2 is an empty answer, and scored_turns is all"):
        DemonstrationFile(str(path), validation_fraction=0.0, scored_turns="all").load("train")


def test_a_completion_of_several_turns_is_its_last_answer(tmp_path: Path) -> None:
    """Nothing of a user's turn is learned, wherever the row parts prompt and completion."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": CHAT[:1], "completion": CHAT[1:]}) + "\n")
    for turns in ("last", "all"):
        source = DemonstrationFile(str(path), validation_fraction=0.0, scored_turns=turns)  # type: ignore[arg-type]
        (record,) = source.load("train").records
        assert (record.prompt, record.completion) == (CHAT[:-1], CHAT[-1:])
        assert record.scored_turns == turns
