"""SPIN's own format: `real` and `generated`, the same turns of a chat but for the last answer; and pairs made of it.

Chen et al. 2024, "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models"
(https://arxiv.org/abs/2401.01335): the real answer is what the main player should prefer to its opponent's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from operator import length_hint
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from trainer.data.cells import BrokenRow, check_answer, digest, messages
from trainer.data.chat import template_identity
from trainer.data.files import Table, read_rows
from trainer.data.preferences import DemonstrationFile, Dropped, PreferenceFile
from trainer.data.sources import Loaded, Source, Streamed, described
from trainer.provenance import read_json, sha256_file, sha256_text
from trainer.schema import Demonstration, Message, Preference, Split, Text, UserError

SPLITS = ("train", "test")
MANIFEST = "manifest.json"
_SUFFIXES = (".jsonl", ".json", ".parquet")
GENERATED, CONVERTED = "spin_generated", "spin_pairs"
"""Kinds of manifests: of a shard that `tandem spin generate` wrote, and of what `convert` made of them."""
DIGITS = 16
"""Of an opponent's digest, in each pair's row."""
PLAIN = "plain"
"""Instead of a chat template's hash: prompt and answer are plain text, one behind the other."""
_ANSWERS = ("completion", "response", "answer", "output")


class SpinRow(NamedTuple):
    """A chat up to its last answer, and that answer. `key` is its own among those of a split.

    `finished` is false where the real answer was cut.
    """

    key: str
    history: list[Message]
    real: str
    finished: bool = True


def spin_line(row: SpinRow, generated: str = "", **more: Any) -> str:
    """A row as a line of JSON: the published format, and whatever is said beside it."""
    turns = [[*row.history, {"role": "assistant", "content": text}] for text in (row.real, generated)]
    cut = {} if row.finished else {"real_finished": False}
    line = {"real": turns[0], "generated": turns[1], **cut, **more}
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def spin_row(row: Mapping[str, Any], origin: str) -> SpinRow:
    """A row of SPIN's format; a `UserError` names the row that is none."""
    turns = messages(row["real"], origin, "real")
    check_answer(turns, origin, "real")
    if len(turns) < 2:
        raise BrokenRow(f"{origin}: column 'real' has one turn; it should hold a prompt, then the answer")
    finished = row.get("real_finished") is not False
    return _made(turns[:-1], turns[-1]["content"], finished)


def _made(history: list[Message], real: str, finished: bool) -> SpinRow:
    answer: Message = {"role": "assistant", "content": real}
    return SpinRow(digest([*history, answer], *([] if finished else ["cut"]))[:24], history, real, finished)


def chat_source(path: str, split: str | None = None, **settings: Any) -> Source:
    """The source that reads a file (or hub dataset) of chats, by its columns.

    SPIN's own (`real`), pairs (`chosen`), demonstrations (`prompt` with `completion`, `response`, `answer` or
    `output`), whole chats (`messages`).

    Args:
        settings: other fields of `DemonstrationFile`.
    """
    offline, revision = settings.get("offline", False), settings.get("revision")
    tolerant = settings.get("broken") == "drop"
    names = read_rows(path, split=split, offline=offline, revision=revision, tolerant=tolerant).available
    settings = {"path": path, "split": split, **settings}
    if "real" in names:
        return SpinChats(**settings)
    if {"chosen", "rejected"} <= {*names}:
        return PreferenceFile(**settings)
    answer = next((name for name in _ANSWERS if name in names), None)
    if "messages" in names and answer != "completion":
        return DemonstrationFile(**settings)
    if "prompt" in names and answer is not None:
        return DemonstrationFile(columns={"completion": answer}, **settings)
    raise UserError(
        f"{path}: its columns are {', '.join(names)}; a chat needs messages, real, chosen and rejected, or prompt with"
        f" one of {', '.join(_ANSWERS)}"
    )


@dataclasses.dataclass
class SpinChats(DemonstrationFile):
    """Chats in SPIN's format: `real` is the chat, and `real_finished`, where it is there, says whether it ended.

    Arguments as for `DemonstrationFile`.
    """

    _theirs: ClassVar[dict[str, str]] = {"messages": "real", "finished": "real_finished"}

    @override
    def _parser(self, table: Table) -> Any:
        self._require(table, "messages")
        return self._parse_messages


def spin_row_of(record: Demonstration | Preference) -> SpinRow:
    """A demonstration's chat, or a pair's with its chosen answer."""
    answer: Text
    if isinstance(record, Preference):
        answer, finished = record.chosen, record.chosen_finished
    else:
        answer, finished = record.completion, record.finished
    prompt = record.prompt
    history: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if isinstance(answer, str):
        return _made(history, answer, finished)
    return _made([*history, *answer[:-1]], answer[-1]["content"], finished)


def split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder: `train.jsonl`, say, or of another kind."""
    return next((p for suffix in _SUFFIXES if (p := folder / f"{split}{suffix}").is_file()), None)


def opponent_of(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Which weights a model has, by their hashes alone: of its base (or its commit), and of its adapter, if it has one.

    Args:
        fingerprint: as `trainer.policy.load.fingerprint` gives it.
    """
    base, files = fingerprint["base"]["digest"], dict((fingerprint["start"] or {}).get("files") or {})
    if files and not any(name.startswith("adapter_model") or name.endswith(".pth") for name in files):
        # All weights: the base that they once were does not matter.
        base, files = sha256_text(*(part for item in sorted(files.items()) for part in item)), {}
    adapter = sha256_text(*sorted(files.values())) if files else None
    return {"digest": sha256_text(base, adapter or ""), "base": base, "adapter": adapter}


@dataclasses.dataclass
class SpinPairs(Source):
    """The pairs that `tandem spin convert` made: the real answer is chosen, the opponent's rejected.

    Training is refused where the tokenizer's chat template is not the one that the opponent answered with, and where
    the reference is not the opponent. The folder's `test.jsonl` validates, where there is one; without it, the part of
    the prompts that `PreferenceFile` keeps, the same in every iteration, with the newest opponent's answers alone.

    Args:
        path: the folder.
        limit: at most so many pairs of each split, the first ones.
    """

    path: str
    limit: int | None = None

    prompt_template = None

    def load(self, split: Split) -> Loaded:
        """Read one split."""
        loaded = self.stream(split)
        records = cast(list[Preference], list(loaded.records))
        return Loaded(records, dict(loaded.counts), loaded.hashes)

    def stream(self, split: Split) -> Loaded:
        """As `load`, records read as they are asked for."""
        self._check_files()
        loaded = self._file(split).stream(split)
        if self.manifest["template"] != PLAIN:
            return loaded
        records = cast(Iterable[Preference], loaded.records)
        return dataclasses.replace(loaded, records=Streamed(map(_plain, records), length_hint(records)))

    def fingerprint(self, split: Split) -> dict[str, str]:
        """SHA-256 of what `load` reads, and the template."""
        return {**self._file(split).fingerprint(split), "template": str(self.manifest["template"])}

    def describe(self) -> dict[str, Any]:
        """Settings and opponent, as plain JSON."""
        return {
            **described(self),
            "opponent": self.manifest["opponent"],
            "template": self.manifest["template"],
        }

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer whose chat template is not the one that the answers were generated with."""
        used = str(self.manifest["template"])
        if used != PLAIN and (now := template_identity(tokenizer)) != used:
            raise UserError(
                f"{self.path}: was generated with the chat template {used[:12]}, and"
                f" {tokenizer.name_or_path or 'the tokenizer'} has {now[:12]}; train with the tokenizer that generated,"
                " or generate anew"
            )

    def check_reference(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a reference that is not the opponent whose answers these are."""
        used, now = self.manifest["opponent"], opponent_of(fingerprint)
        if used["digest"] == now["digest"]:
            return
        part = "base" if used["base"] != now["base"] else "adapter"
        shown = [str(each[part] or "none")[:12] for each in (used, now)]
        raise UserError(
            f"model.reference: is not the opponent that {self.path} was generated by: its {part} is {shown[1]}, the"
            f" opponent's {shown[0]}; set policy.base and policy.start to the model that generated, with"
            " reference.adapter: start"
        )

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """What `tandem spin convert` wrote down."""
        path = Path(self.path).expanduser() / MANIFEST
        found: dict[str, Any] = read_json(path) if path.is_file() else {}
        if found.get("kind") != CONVERTED:
            raise UserError(
                f"{self.path}: no pairs of `tandem spin convert` (a {MANIFEST} of kind {CONVERTED}); run it first, or"
                " take trainer.data.preferences.PreferenceFile with columns: {chosen: real, rejected: generated}"
            )
        return found

    def _check_files(self) -> None:
        for name, known in self.manifest["files"].items():
            path = Path(self.path).expanduser() / name
            if not path.is_file() or sha256_file(path) != known:
                raise UserError(f"{path}: is not what its {MANIFEST} says; run `tandem spin convert` again")

    def _file(self, split: Split) -> PreferenceFile:
        files = [split_file(Path(self.path).expanduser(), split) for split in SPLITS]
        if files[0] is None:
            raise UserError(f"{self.path}: has no train.jsonl; run `tandem spin convert` again")
        finished = {f"{ours}_finished": f"{theirs}_finished" for ours, theirs in _COLUMNS.items()}
        newest = split == "validation" and files[1] is None
        return _Pairs(
            path=str(files[0]),
            validation_path=None if files[1] is None else str(files[1]),
            columns={**_COLUMNS, **finished},
            limit=self.limit,
            opponent=str(self.manifest["opponent"]["digest"])[:DIGITS] if newest else None,
        )


_COLUMNS = {"chosen": "real", "rejected": "generated"}


@dataclasses.dataclass
class _Pairs(PreferenceFile):
    """Rows of one `opponent`, or of all that are mixed where it is None."""

    opponent: str | None = None

    _known = (*PreferenceFile._known, "opponent")  # type: ignore[assignment]

    def _parse(self, row: dict[str, Any], origin: str) -> Any:
        if self.opponent is not None and row["opponent"] != self.opponent:
            return Dropped("earlier_iterations")
        return super()._parse(row, origin)


def _plain(record: Preference) -> Preference:
    """The pair as plain text, one behind the other."""
    prompt, chosen, rejected = (
        part if isinstance(part, str) else "".join(turn["content"] for turn in part)
        for part in (record.prompt, record.chosen, record.rejected)
    )
    return dataclasses.replace(record, prompt=prompt, chosen=chosen, rejected=rejected)
