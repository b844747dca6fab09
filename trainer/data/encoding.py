"""Text -> token ids: BOS and EOS once each where they belong, and no space put before what follows other text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from trainer.schema import UserError

Tokenizer = PreTrainedTokenizerBase
_ANCHOR = "\n"


class Encoder:
    """A tokenizer, with its special tokens put where they belong."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no end token (eos_token)"
            )
        self.eos: int = tokenizer.eos_token_id
        self._ids: dict[int, int] = {}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}
        self._anchor = self._find_anchor()

    def prompts(self, texts: Sequence[str], plain: Sequence[bool], origins: Sequence[str]) -> list[list[int]]:
        """Ids that open with BOS, once, where the tokenizer has one."""
        opened = []
        for ids, origin in zip(self._encode_both(texts, plain, self._encode), origins, strict=True):
            start = 0
            while start < len(ids) and ids[start] == self.bos:
                start += 1
            whole = ids[start:] if self.bos is None else [self.bos, *ids[start:]]
            if not whole:
                raise UserError(
                    f"{origin}: the prompt is empty and the tokenizer has no BOS; give it some text"
                )
            opened.append(whole)
        return opened

    def completions(
        self, texts: Sequence[str], plain: Sequence[bool], origins: Sequence[str], finished: Sequence[bool]
    ) -> list[list[int]]:
        """Ids that close with EOS, once, where they are finished, and hold no BOS or EOS before."""
        encoded = self._encode_both(texts, plain, self._encode_continuation)
        return [self._close(*each) for each in zip(encoded, origins, finished, strict=True)]

    def turns(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of chat texts that follow other text, special tokens as the template wrote them."""
        return self._encode_continuation(list(texts), False) if texts else []

    def ended(self, ids: list[int], origin: str) -> int:
        """How many of an earlier answer's ids are its own: up to the special token that ends the turn, with it.

        What the template writes behind that, such as a newline, is not; where it ends turns in letters all is.
        """
        if self.eos in ids:
            return len(self._close(ids, origin, finished=True))
        self._close(ids, origin, finished=False)
        last = max((n for n, token in enumerate(ids) if token in self._special), default=len(ids) - 1)
        rest = str(self._tokenizer.decode(ids[last + 1 :], skip_special_tokens=True))
        return len(ids) if rest.strip() else last + 1

    def _close(self, ids: list[int], origin: str, finished: bool) -> list[int]:
        end = ids.index(self.eos) if self.eos in ids else len(ids)
        rest = ids[end:]  # templates may write EOS and a newline after it
        if rest and str(self._tokenizer.decode(rest, skip_special_tokens=True)).strip():
            raise UserError(
                f"{origin}: the completion holds the end token {self._tokenizer.eos_token!r} inside its text"
            )
        if self.bos is not None and self.bos in ids[:end]:
            raise UserError(
                f"{origin}: the completion holds the start token {self._tokenizer.bos_token!r} in its text"
            )
        if end == 0:
            raise UserError(
                f"{origin}: a completion is empty once tokenised; it should hold at least one token"
            )
        return [*ids[:end], self.eos] if finished else ids[:end]

    def _encode_both(
        self,
        texts: Sequence[str],
        plain: Sequence[bool],
        encode: Callable[[list[str], bool], list[list[int]]],
    ) -> list[list[int]]:
        """`encode` over plain and chat texts, one batch for each, in the order given."""
        done: list[list[int]] = [[]] * len(texts)
        for kind in (True, False):
            where = [i for i, flag in enumerate(plain) if flag == kind]
            if where:
                for i, ids in zip(where, encode([texts[i] for i in where], kind), strict=True):
                    done[i] = ids
        return done

    def _encode(self, texts: list[str], plain: bool) -> list[list[int]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        # One int object for each id that occurs: a big data set then takes 8 bytes a token, not 36.
        share = self._ids.setdefault
        return [[share(i, i) for i in ids] for ids in encoded]

    def _encode_continuation(self, texts: list[str], plain: bool) -> list[list[int]]:
        """As `_encode`, for text that follows other text: no space is put before it."""
        if self._anchor is None:
            return self._encode(texts, plain)
        length = len(self._anchor)
        encoded = self._encode([_ANCHOR + text for text in texts], plain)
        apart = [ids[length:] if ids[:length] == self._anchor else None for ids in encoded]
        return [
            self._encode([text], plain)[0] if ids is None else ids
            for text, ids in zip(texts, apart, strict=True)
        ]

    def _find_anchor(self) -> list[int] | None:
        """Ids of a newline, where the tokenizer puts a space before all it encodes (as Llama-2's)."""
        anchor, anchored, alone = self._encode([_ANCHOR, _ANCHOR + "x", "x"], True)
        prefixed = bool(anchor) and anchored[: len(anchor)] == anchor and anchored[len(anchor) :] != alone
        return anchor if prefixed else None
