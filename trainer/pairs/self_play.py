"""Self-play (SPIN): chats in SPIN's own format, and the opponent's answers to them, shard by shard.

Chen et al. 2024 (https://arxiv.org/abs/2401.01335), algorithm 1: the opponent, which is the last iteration's model,
answers the prompts whose real answers are known.

A shard's folder holds the ledger (`settings.json`, `parts/`) and, when none of its rows is missing, `train.jsonl`,
`test.jsonl` and `manifest.json`. `trainer.pairs.self_play_merge` makes pairs of all shards.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from trainer.data.chat import bare_answer, template_identity
from trainer.data.files import read_rows
from trainer.data.self_play import (
    GENERATED,
    MANIFEST,
    PLAIN,
    SPLITS,
    SpinRow,
    opponent_of,
    spin_line,
    spin_row,
    spin_row_of,
    split_file,
)
from trainer.data.sources import Source, streamed
from trainer.data.tokenize import tokenize_demonstrations, tokenize_prompts
from trainer.generation import Generation, Sampling, answer_batches
from trainer.ledger import Ledger, Row
from trainer.pairs.ranks import agreed, gathered, rank
from trainer.policy.base import read_config
from trainer.policy.load import PolicyConfig, fingerprint
from trainer.provenance import (
    git_revision,
    read_json,
    sha256_file,
    sha256_text,
    versions,
    write_json,
    write_text,
)
from trainer.schema import Demonstration, Preference, Text, TokenizedDemonstration, UserError

_TRAINED_ON = {"train": "train", "test": "validation"}
DROPPED = ("overlong", "empty", "unlearnable")
"""Why a row has no answer to learn from: its prompt leaves no position, nothing was said, or what was said, or the
real answer, cannot be tokenised again (it spells a special token)."""


# --- chats into SPIN's format -------------------------------------------------------------------------------


def reformat(
    source: Source, output: Path, tests: bool = True, testing: Source | None = None
) -> dict[str, Any]:
    """Write a source's chats as `train.jsonl` and `test.jsonl` (its validation split), `generated` empty.

    A split without a chat has no file.

    Args:
        testing: the source of the test chats, where it has other settings (`limit`).

    Returns the manifest: counts of each split (rows, kept, dropped_<why>) and hashes of what was read and written.

    Raises:
        UserError: what the source raises, or no chat is left.
    """
    counts: dict[str, dict[str, int]] = {}
    read: dict[str, str] = {}
    for split in SPLITS if tests else SPLITS[:1]:
        own = testing if split == "test" and testing is not None else source
        loaded = streamed(own, cast(Any, _TRAINED_ON[split]))
        records = cast(Iterable[Demonstration | Preference], loaded.records)
        kept: Counter[str] = Counter()
        write_text(output / f"{split}.jsonl", _lines(records, kept))
        twice = loaded.counts.get("dropped_duplicate", 0) + kept["dropped_duplicate"]
        counts[split] = {**loaded.counts, **kept, **({"dropped_duplicate": twice} if twice else {})}
        read |= loaded.hashes
    if not counts["train"]["kept"]:
        raise UserError(f"{output}: no chat is left to train on ({counts['train']})")
    kept_splits = [split for split in SPLITS if counts.get(split, {}).get("kept")]
    for split in SPLITS:
        if split not in kept_splits:  # of another time: its chats may be among those to train on now
            (output / f"{split}.jsonl").unlink(missing_ok=True)
    described = {"source": source.describe(), **({"testing": testing.describe()} if testing else {})}
    manifest = {"kind": "spin_chats", "counts": counts, **described, "read": read}
    return write_manifest(output, manifest, [f"{split}.jsonl" for split in kept_splits])


def _lines(records: Iterable[Demonstration | Preference], counts: Counter[str]) -> Iterator[str]:
    seen: set[str] = set()
    for record in records:
        row = spin_row_of(record)
        if row.key in seen:  # pairs with one chosen answer and several rejected ones
            counts["dropped_duplicate"] += 1
            continue
        seen.add(row.key)
        yield spin_line(row)
    counts["kept"] = len(seen)


@dataclasses.dataclass(frozen=True)
class Chats:
    """The rows of each split, each once, and the SHA-256 of their files."""

    rows: dict[str, list[SpinRow]]
    hashes: dict[str, str]


def read_chats(folder: str | Path, limit: int | None = None) -> Chats:
    """The chats of a folder with `train.jsonl` (.json, .parquet) and, where there is one, `test.jsonl`.

    Args:
        limit: at most so many rows of each split, the first ones.

    Raises:
        UserError: no such folder or file, a row that is not in SPIN's format, or files that `reformat` did not write
            together: a test of another time may hold what is trained on.
    """
    folder = Path(folder).expanduser()
    files = {split: split_file(folder, split) for split in SPLITS}
    if files["train"] is None:
        raise UserError(f"{folder}: holds no train.jsonl in SPIN's format; `tandem spin reformat` writes one")
    rows: dict[str, list[SpinRow]] = {}
    for split, file in files.items():
        if file is not None and file.stat().st_size:
            table = read_rows(str(file), columns=["real"], optional=["real_finished"])
            found = {row.key: row for row in (spin_row(each, origin) for origin, each in table)}
            rows[split] = list(found.values())[:limit]
    hashes = {split: sha256_file(file) for split, file in files.items() if file}
    said = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    there = {file.name: hashes[split] for split, file in files.items() if file}
    if said.get("kind") == "spin_chats" and said["files"] != there:
        again = f"run `tandem spin reformat` again, or remove {MANIFEST} if they are meant to be so"
        raise UserError(f"{folder}: its files are not those of its {MANIFEST}; {again}")
    return Chats(rows, hashes)


# --- the opponent's answers ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """Which rows of each split: every `of`-th from the `number`-th, or the `number`-th slice of `size` rows.

    `number` counts from 1 with `of`, from 0 with `size` (as SPIN was published). Raises `UserError`.
    """

    number: int = 1
    of: int | None = 1
    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and (self.size < 1 or self.number < 0):
            raise UserError(
                f"data_frac {self.number} of frac_len {self.size}: the slices count from 0, and have 1 row or more"
            )

    @property
    def name(self) -> str:
        """Its folder."""
        if self.size is None:
            return f"shard-{self.number}-of-{self.of}"
        return f"frac-{self.number}-of-{self.size}"

    @property
    def shown(self) -> str:
        """As the command line has it."""
        if self.size is None:
            return f"--shard {self.number}/{self.of}"
        return f"--data_frac {self.number} --frac_len {self.size}"

    def deal(self, rows: list[SpinRow]) -> list[SpinRow]:
        if self.size is not None:
            return rows[self.number * self.size : (self.number + 1) * self.size]
        assert self.of is not None
        return rows[self.number - 1 :: self.of]


@dataclasses.dataclass(frozen=True)
class Opponent:
    """The model that answers, ready to be loaded, and how it is asked.

    `plain`: prompts are one user's turn each, given as plain text without a chat template.
    """

    config: PolicyConfig
    tokenizer: PreTrainedTokenizerBase
    plain: bool = False

    def describe(self) -> dict[str, Any]:
        """Its weights by their hashes, their dtype, and the template, as plain JSON."""
        return {
            "opponent": {**opponent_of(fingerprint(self.config)), "dtype": self.config.dtype},
            "template": PLAIN if self.plain else template_identity(self.tokenizer),
        }

    def prompt(self, row: SpinRow) -> Text:
        """What it is asked."""
        if not self.plain:
            return row.history
        if len(row.history) != 1 or row.history[0]["role"] != "user":
            raise UserError(
                f"--plain: a chat begins with {len(row.history)} turns; plain text has one, the user's"
            )
        return row.history[0]["content"]

    def room(self) -> int | None:
        """Tokens that a prompt may have, so that one is left for an answer; None where the model sets no limit."""
        settings = read_config(self.config.base, self.config).get_text_config()
        positions = getattr(settings, "max_position_embeddings", None)
        return None if positions is None else int(positions) - 1


def generate(
    opponent: Opponent,
    load: Callable[[], Any],
    chats: Chats,
    output: Path,
    sampling: Sampling,
    part: Part = Part(),
    batch_size: int = 32,
    max_prompt: int | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Have the opponent answer the rows of a part that have no answer yet; returns the shard's manifest.

    An answer follows from (opponent, sampling, row) alone, so that batches, shards and ranks do not matter. Where a
    process group is up every rank calls this, and the first returns the manifest. A kill costs each at most one batch.

    Args:
        load: gives the model; called only when an answer is missing.
        max_prompt: longest prompt in tokens; longer ones get no answer and are counted. At most what the model has
            positions for.

    Raises:
        UserError: answers of another opponent, other settings or other data lie in the part's folder.
    """
    folder, speaks = output / part.name, rank() == 0
    rows = {f"{split}/{row.key}": row for split, own in chats.rows.items() for row in part.deal(own)}
    if not rows:
        raise UserError(
            f"{part.name}: has no row, the data has {sum(map(len, chats.rows.values()))}; give a smaller number"
        )
    room = min((limit for limit in (max_prompt, opponent.room()) if limit is not None), default=None)
    follows = {
        **opponent.describe(),
        "sampling": dataclasses.asdict(sampling),
        "max_prompt": room,
        "data": chats.hashes,
        "totals": {split: len(own) for split, own in chats.rows.items()},
        "rows": sha256_text(*rows),
        "part": dataclasses.asdict(part),
    }
    with Ledger(folder, follows, str(rank())) as ledger:
        missing = agreed(ledger.missing(rows))
        if missing:
            asked = {key: rows[key] for key in missing}
            _answer(opponent, load, asked, ledger, sampling, batch_size, room, progress and speaks)
        gathered(0)  # all ranks have written
    if not speaks:
        return None
    return _close(folder, follows, rows, Ledger(folder, follows))


def _answer(
    opponent: Opponent,
    load: Callable[[], Any],
    rows: Mapping[str, SpinRow],
    ledger: Ledger,
    sampling: Sampling,
    batch_size: int,
    room: int | None,
    progress: bool,
) -> None:
    names = list(rows)
    prompts = tokenize_prompts([opponent.prompt(row) for row in rows.values()], opponent.tokenizer)
    # Before anything is generated: training would stop at a real answer that it cannot learn from.
    whys = [
        "overlong"
        if room is not None and len(prompt) > room
        else None
        if _learnable(opponent, rows[name], rows[name].real, rows[name].finished)
        else "unlearnable"
        for name, prompt in zip(names, prompts, strict=True)
    ]
    if rank() == 0:
        ledger.add(_dropped(name, why) for name, why in zip(names, whys, strict=True) if why)
    names = [name for name, why in zip(names, whys, strict=True) if not why]
    prompts = [prompt for prompt, why in zip(prompts, whys, strict=True) if not why]
    if not names:
        return
    batches = answer_batches(
        load(), opponent.tokenizer, prompts, sampling, names, batch_size, continuing=opponent.plain
    )
    with tqdm(
        total=len(names),
        desc="opponent",
        unit="answer",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    ) as bar:
        for batch in batches:
            ledger.add(_answered(opponent, names[i], rows[names[i]], answer) for i, answer in batch)
            bar.update(len(batch))


def _dropped(key: str, why: str) -> Row:
    return {"key": key, "text": None, "dropped": why}


def _answered(opponent: Opponent, key: str, row: SpinRow, answer: Generation) -> Row:
    """An answer as it will be learned from, and whether it has the same tokens then as it had when it was drawn."""
    text = answer.text if answer.finished else answer.text.rstrip("\ufffd")
    if not opponent.plain:
        text = bare_answer(opponent.tokenizer, row.history, text, key)
    if not text.strip():
        return _dropped(key, "empty")
    again = _learnable(opponent, row, text, answer.finished)
    if again is None:
        return _dropped(key, "unlearnable")
    same = again.completion[: len(answer.ids)] == answer.ids
    return {
        "key": key,
        "text": text,
        "tokens": len(answer.ids),
        "finished": answer.finished,
        "same_tokens": same,
    }


def _learnable(
    opponent: Opponent, row: SpinRow, answer: str, finished: bool
) -> TokenizedDemonstration | None:
    """A row's history and an answer as training will see them; None where they cannot be tokenised."""
    learned = Demonstration(opponent.prompt(row), answer, row.key, finished=finished)
    try:
        return tokenize_demonstrations([learned], opponent.tokenizer)[0]
    except UserError:
        return None


def _close(
    folder: Path, follows: Mapping[str, Any], rows: Mapping[str, SpinRow], ledger: Ledger
) -> dict[str, Any]:
    """Write a shard's files and manifest."""
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        own = {key: row for key, row in rows.items() if key.startswith(f"{split}/")}
        if not own:
            continue
        answers = {key: ledger.rows[key] for key in own}
        kept = [key for key, answer in answers.items() if answer["text"] is not None]
        if kept:
            write_text(
                folder / f"{split}.jsonl",
                (
                    spin_line(own[key], answers[key]["text"], generated_finished=answers[key]["finished"])
                    for key in kept
                ),
            )
        else:
            (folder / f"{split}.jsonl").unlink(missing_ok=True)
        counts[split] = {
            "rows": len(own),
            "kept": len(kept),
            **{
                f"dropped_{why}": sum(answer.get("dropped") == why for answer in answers.values())
                for why in DROPPED
            },
            "finished": sum(answers[key]["finished"] for key in kept),
            "same_tokens": sum(answers[key]["same_tokens"] for key in kept),
            "tokens": sum(answers[key]["tokens"] for key in kept),
        }
    manifest = {"kind": GENERATED, **follows, "counts": counts}
    return write_manifest(folder, manifest, [f"{split}.jsonl" for split in counts if counts[split]["kept"]])


def write_manifest(folder: Path, content: Mapping[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """The folder's manifest, with the SHA-256 of its files; one that says the same is left as it is."""
    said = {**content, "files": {name: sha256_file(folder / name) for name in files}}
    plain: dict[str, Any] = json.loads(json.dumps(said))
    path = folder / MANIFEST
    before = read_json(path) if path.is_file() else {}
    if all(before.get(name) == value for name, value in plain.items()):
        return dict(before)
    manifest = {**plain, "versions": versions(), "git": git_revision()}
    write_json(path, manifest)
    return manifest
