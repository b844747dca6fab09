"""The answers that win rates compare: test questions, and what a model says to each, kept as it comes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.data.cells import digest
from trainer.data.tokenize import tokenize_prompt
from trainer.generation import Sampling, answer_batches
from trainer.ledger import Ledger
from trainer.provenance import sha256_text
from trainer.schema import Demonstration, Preference, Text, UserError


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A test question: a prompt that the data answers, too. `key` follows from the prompt."""

    key: str
    prompt: Text
    answer: str

    @property
    def question(self) -> str:
        """The prompt in plain words, as a judge reads it."""
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        names = {"user": "Human", "assistant": "Assistant", "system": "System"}
        said = [f"{names[turn['role']]}: {turn['content'].strip()}" for turn in self.prompt]
        return "\n\n".join([*said, "Assistant:"])


def select_dialogues(
    records: Iterable[Preference] | Iterable[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    room: int | None = None,
) -> tuple[list[Dialogue], int]:
    """The first `count` prompts, each once, with the data's (chosen) answer; and how many were too long.

    `room`: tokens that a prompt may have, so that the model's positions leave place for a whole answer.

    Raises:
        UserError: a count below 1, or no prompt that fits.
    """
    if count < 1:
        raise UserError(f"questions: {count} is not possible; give 1 or more")
    found: dict[str, Dialogue] = {}
    overlong: set[str] = set()
    for record in records:
        key = digest(record.prompt)[:24]
        if key in found or key in overlong:
            continue
        ids = tokenize_prompt(record.prompt, tokenizer, record.origin or record.id)
        if room is not None and len(ids) > room:
            overlong.add(key)
            continue
        answer = record.chosen if isinstance(record, Preference) else record.completion
        found[key] = Dialogue(key, record.prompt, _words(answer))
        if len(found) == count:
            break
    if not found:
        told = (
            f"all {len(overlong)} are longer than the {max(room or 0, 0)} tokens that the model has room for beside an"
            " answer"
            if overlong
            else ""
        )
        raise UserError(f"data: no test question ({told or 'there are no rows'}); give others")
    return list(found.values()), len(overlong)


def model_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    sampling: Sampling,
    folder: str | Path,
    identity: Mapping[str, Any],
    *,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, str]:
    """Question's key -> the model's answer. What `folder` holds already is not generated again.

    Args:
        identity: what says which weights the model has, as plain JSON; answers of others lie in folders of their own.
        stop: an answer ends before the first of these that it holds, such as the next turn of a dialogue.

    Where a process group is up, every rank calls this and gets all answers.
    """
    settings = {"model": identity, "sampling": dataclasses.asdict(sampling), "stop": list(stop)}
    place = Path(folder) / name_of(settings)
    with Ledger(place, settings, writer=str(_rank())) as ledger:
        # Nobody writes before all have read what is there.
        _barrier()
        missing = [each for each in dialogues if each.key not in ledger.rows]
        prompts = [tokenize_prompt(each.prompt, tokenizer, f"question {each.key}") for each in missing]
        keys = [each.key for each in missing]
        for batch in answer_batches(model, tokenizer, prompts, sampling, keys, batch_size, progress):
            ledger.add(
                {
                    "key": keys[number],
                    "question": missing[number].question,
                    "answer": _cut(answer.text, stop),
                    "finished": answer.finished or _cut(answer.text, stop) != answer.text,
                }
                for number, answer in batch
            )
    _barrier()
    rows = Ledger(place, settings, writer=str(_rank())).rows if missing else ledger.rows
    return {each.key: rows[each.key]["answer"].strip() for each in dialogues}


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel | PeftModel) -> Iterator[PreTrainedModel | PeftModel]:
    """The base of an adapted model, for a while.

    Raises:
        UserError: there is no adapter to leave out.
    """
    if not isinstance(model, PeftModel):
        raise UserError(
            "base: all weights of this model were trained, so its base is another model; give it, too"
        )
    with model.disable_adapter():
        yield model


def weights_hash(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 over all weights, adapters among them."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def name_of(settings: Mapping[str, Any]) -> str:
    """A folder's name that follows from settings: what is made with others lies elsewhere."""
    return sha256_text(json.dumps(settings, sort_keys=True, ensure_ascii=False))[:16]


def _cut(text: str, stop: Sequence[str]) -> str:
    ends = [place for mark in stop if mark and (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text


def _words(text: Text) -> str:
    return (text if isinstance(text, str) else text[-1]["content"]).strip()


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
