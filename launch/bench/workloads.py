"""What is measured: preference pairs of given lengths as text, and a tokenizer that gives all arms equal token ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.provenance import sha256_file, write_text
from trainer.schema import UserError

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
MAX_LENGTH = 1024
"""Prompt and completion together, in tokens: the default of TRL and of tandem; no pair here is longer."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lognormal lengths in tokens (mean and deviation of the logarithm), within limits."""

    mean: float
    deviation: float
    least: int
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        drawn = np.exp(rng.normal(self.mean, self.deviation, count))
        return np.clip(drawn, self.least, self.most).astype(int)


# Prompt, chosen, rejected. hh_like was fitted to 1,200 rows of hh-rlhf's harmless-base at four characters a token.
GENERATED = {
    "hh_like": (Lengths(4.30, 1.06, 2, 800), Lengths(3.29, 1.01, 2, 256), Lengths(3.51, 1.05, 2, 400)),
    "long_prompts": (Lengths(6.80, 0.10, 600, 980), *[Lengths(3.40, 0.25, 12, 44)] * 2),
    "long_answers": (Lengths(3.40, 0.25, 12, 60), *[Lengths(5.85, 0.25, 200, 700)] * 2),
}
ROWS = "hh_rlhf"
"""Name of the workload that is made of real rows."""


def short(name: str) -> str:
    """A workload's name without the file of real rows."""
    return name.partition("=")[0]


Ids = tuple[list[int], list[int], list[int]]
"""A pair's token ids: prompt (with BOS), chosen, rejected (with EOS)."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Pairs on disk (JSONL: prompt, chosen, rejected), their tokenizer's folder, and their token ids."""

    name: str
    file: Path
    tokenizer: Path
    ids: list[Ids]
    source: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """For the results: how many pairs of which lengths, and the digest of their token ids."""
        lengths = np.array([[len(part) for part in pair] for pair in self.ids])
        names = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
        return {
            **self.source,
            "pairs": len(self.ids),
            **{name: round(float(mean), 1) for name, mean in zip(names, lengths.mean(axis=0), strict=True)},
            "tokens": int(lengths.sum()),
            "digest": digest(self.ids),
        }


def make_workload(name: str, folder: Path, pairs: int, vocabulary: int, seed: int) -> Workload:
    """Make a workload's files: a generated one by its name, the real rows as `hh_rlhf=FILE`.

    Raises:
        UserError: there is no workload of that name, or the file has too few rows.
    """
    kind, _, file = name.partition("=")
    folder.mkdir(parents=True, exist_ok=True)
    if kind == ROWS and file:
        made = _real(file, folder, pairs, vocabulary, seed)
    elif kind in GENERATED and not file:
        made = _generated(kind, folder, pairs, vocabulary, seed)
    else:
        known = ", ".join(GENERATED)
        raise UserError(f"--workloads {name}: not known; give one of {known}, or {ROWS}=FILE for real rows")
    return made


def digest(pairs: Iterable[Sequence[Sequence[int]]]) -> str:
    """SHA-256 over the token ids of all pairs, whatever their order: equal where every arm trains on the same."""
    each = sorted(
        hashlib.sha256(b"".join(_bytes(part) for part in (pair[0], pair[1], pair[2]))).digest()
        for pair in pairs
    )
    return hashlib.sha256(b"".join(each)).hexdigest()


def _bytes(ids: Sequence[int]) -> bytes:
    whole = np.asarray([len(ids), *ids], dtype=np.int64)
    return whole.tobytes()


# --- generated pairs ----------------------------------------------------------------------------------------


def _generated(name: str, folder: Path, pairs: int, vocabulary: int, seed: int) -> Workload:
    rng = np.random.default_rng([seed, sum(name.encode())])
    prompts, chosen, rejected = (lengths.draw(rng, pairs) for lengths in GENERATED[name])
    prompts = np.minimum(prompts, MAX_LENGTH - np.maximum(chosen, rejected))
    rows, ids = [], []
    for prompt, *completions in zip(prompts, chosen, rejected, strict=True):
        parts = [rng.integers(len(SPECIAL), vocabulary, n - 1).tolist() for n in (prompt, *completions)]
        ids.append(([1, *parts[0]], [*parts[1], 2], [*parts[2], 2]))
        rows.append(tuple("".join(f" t{token}" for token in part) for part in parts))
    _write_words(folder / "tokenizer", vocabulary)
    source = {"workload": name, "generated": True, "seed": seed, "dropped": 0}
    return Workload(name, _write_rows(folder, rows), folder / "tokenizer", ids, source)


def _write_words(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose words are `t4`, `t5`, ...: one token each, wherever a text is cut."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(SPECIAL)}
    words |= {f"t{i}": i for i in range(len(SPECIAL), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _save(tokenizer, folder)


def _save(tokenizer: Any, folder: Path) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _write_rows(folder: Path, rows: Iterable[Sequence[str]]) -> Path:
    path = folder / "pairs.jsonl"
    names = ("prompt", "chosen", "rejected")
    write_text(path, "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


# --- real rows ----------------------------------------------------------------------------------------------


def _real(file: str, folder: Path, pairs: int, vocabulary: int, seed: int) -> Workload:
    """Rows of hh-rlhf, with a byte-level BPE trained on them; rows that a limit or a seam excludes are counted."""
    from trainer.data.preferences import PreferenceFile

    source = PreferenceFile(file, prompt_ends="\n\nAssistant:", validation_fraction=0.0, empty="drop")
    records: list[Any] = list(source.load("train").records)
    texts = [(str(each.prompt), str(each.chosen), str(each.rejected)) for each in records]
    tokenizer = _train_bpe(texts, vocabulary)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    rows: list[tuple[str, str, str]] = []
    ids: list[Ids] = []
    dropped = 0
    for index in order:
        if len(rows) == pairs:
            break
        encoded = _encode(tokenizer, texts[index])
        if encoded is None:
            dropped += 1
            continue
        rows.append(texts[index])
        ids.append(encoded)
    if len(rows) < pairs:
        raise UserError(f"--workloads {ROWS}={file}: has {len(rows)} rows that fit, --pairs asks for {pairs}")
    _save(tokenizer, folder / "tokenizer")
    found = {"workload": ROWS, "generated": False, "seed": seed, "dropped": dropped}
    found |= {"file": Path(file).name, "sha256": sha256_file(file)}
    return Workload(ROWS, _write_rows(folder, rows), folder / "tokenizer", ids, found)


def _train_bpe(texts: Sequence[tuple[str, str, str]], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(("".join(row) for row in texts), trainer)
    return tokenizer


def _encode(tokenizer: Any, row: tuple[str, str, str]) -> Ids | None:
    """The pair's ids, None where it is too long, or where prompt and answer make other tokens together than apart."""
    prompt, chosen, rejected = (tokenizer.encode(text).ids for text in row)
    for answer, text in ((chosen, row[1]), (rejected, row[2])):
        if tokenizer.encode(row[0] + text).ids != [*prompt, *answer]:
            return None
    ids = ([1, *prompt], [*chosen, 2], [*rejected, 2])
    # TRL takes for the prompt what both sequences share with it.
    longest = len(ids[0]) + max(len(ids[1]), len(ids[2]))
    return ids if longest <= MAX_LENGTH and chosen != rejected else None
