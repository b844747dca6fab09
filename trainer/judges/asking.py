"""What judges share: a question as turns of a chat, texts that cannot pose as a chat's marks, and reading an answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from trainer.judges import Question
from trainer.schema import Message, Text

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_PREFACE = r"(?:(?:(?:my |the |final )*(?:answer|verdict|choice|winner|decision)(?: is)?|i (?:choose|pick|prefer))\W+)?"


COMMON_MARKS = (
    *(
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "<</SYS>>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|endoftext|>",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
"""Marks of well-known chat templates: of some models they are plain text, and a server's are not known here."""


def turns(text: Text) -> list[Message]:
    """A question as the turns of a chat: plain text is one turn of the user's."""
    if isinstance(text, str):
        return [{"role": "user", "content": text}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in text]


def defused(question: Question, marks: Iterable[str]) -> Question:
    """The question with a space in each of the judge's special tokens that stands in its judged texts.

    A text that is judged could otherwise close the question and open an answer of its own making.
    """
    # The longest first: what is left of one may hold another.
    pattern = re.compile(
        "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark) or "(?!)"
    )

    def without(text: str) -> str:
        return pattern.sub(lambda found: found[0][0] + " " + found[0][1:], text)

    def clean(text: str) -> str:
        if not question.judged:
            return without(text)
        for piece in sorted(question.judged, key=len, reverse=True):
            text = text.replace(piece, without(piece)) if piece else text
        return text

    if isinstance(question.text, str):
        return dataclasses.replace(question, text=clean(question.text))
    cleaned: list[Message] = [
        {"role": turn["role"], "content": clean(turn["content"])} for turn in question.text
    ]
    return dataclasses.replace(question, text=cleaned)


def read_choice(said: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer in words begins with, such as `B`, `**B**`, `B: it is ...` or `The answer is B.`

    None where it names none in so many words, or another one beside it: "A better answer is B" is no A, "A or B" is
    neither, and "A is worse than B" and "A? No, B" are not guessed at.
    """
    text = _THOUGHTS.sub("", said).strip()
    names = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    better = r"\s+(?:is (?:the |clearly |much |slightly )*(?:better|best|preferable)|wins)\b"
    rest = rf"(?P<rest>[^\w?']*$|[^\w\s?'].*|\s*\n.*|(?P<better>{better}).*)"
    found = re.match(rf"\W*{_PREFACE}({names}){rest}", text, re.DOTALL | re.IGNORECASE)
    if found is None:
        return None
    # Case counts: "a: ..." may be the article.
    pick = next((choice for choice in choices if choice == found[1]), None)
    if pick is None:
        return None
    line = found["rest"].partition("\n")[0]
    if found["better"]:
        line = re.sub(rf"^{better}\s+than\s+(?:(?:the|answer|response)\s+)*(?:{names})\b", "", line)
    return None if re.search(rf"(?<![\w'])(?:or|and|{names})\b", line) else pick
