"""Token ids to text: an answer by itself, or what continues a prompt, with the space that it begins with."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_NEAR = 8
"""Tokens of a prompt that a continuation is decoded behind at most; a character has four bytes."""


class Decoder:
    """Decodes what a model has drawn.

    `continuing`: it goes on where the prompt's text ends. Decoders such as Llama-2's take one space off the front of
    all they are given, so that what follows a prompt loses its own; it is decoded behind the prompt's last tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, continuing: bool = False) -> None:
        self._tokenizer, self._continuing = tokenizer, continuing
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}

    def __call__(self, ids: Sequence[int], prompt: Sequence[int]) -> str:
        """The text of `ids`, which were drawn behind `prompt`; special tokens are left out."""
        if self._continuing and prompt and prompt[-1] not in self._special:
            kept = [token for token in ids if token not in self._special]
            for near in range(1, min(_NEAR, len(prompt)) + 1):
                context = list(prompt[-near:])
                head, whole = self._decode(context), self._decode(context + kept)
                # A context may begin or end inside a character.
                if not head.endswith("\ufffd") and whole.startswith(head):
                    return whole[len(head) :]
        return self._decode(ids, skip_special_tokens=True)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )
