"""A recipe's stages: read from YAML, names replaced, and a hash over all that a result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from launch.errors import check_yaml, describe
from trainer.provenance import read_json, sha256_file, write_json
from trainer.schema import UserError

_NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)\}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BUILT_IN = ("runs", "folder", "iteration", "previous")
# Beyond this, size and time of change stand for the content: hashing 13 GB at each start would take a minute.
_HASHED_BYTES = 64 * 2**20
_CODE = ("trainer", "callbacks", "launch")
# What `tandem report` reads of each run in a folder.
_REPORTED = (
    *("manifest.json", "evaluation.json", "reward.json", "win_rate.json", "scratch.json", "samples.jsonl"),
    *("reward_evaluations.jsonl", "metrics.csv", "events.out.tfevents*"),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, as the recipe's YAML writes it.

    Args:
        name: its folder is `<runs>/<name>`, which other stages call `{name}`.
        command: a tandem command and its words, such as `fit` or `evaluate letters`.
        config: config files, relative to the recipe's.
        arguments: settings; without a value: a flag.
        inputs: files, folders or hub ids that must be there; their content counts.
        outputs: what must be there afterwards.
        repeat: how often it runs.
        previous: what `{previous}` is in the first of several.
    """

    name: str
    command: str
    config: list[str] = dataclasses.field(default_factory=list)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: list[str] = dataclasses.field(default_factory=list)
    outputs: list[str] = dataclasses.field(default_factory=list)
    repeat: int = 1
    previous: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe, as its YAML writes it.

    Args:
        name: its runs lie in `runs/<name>`.
        stages: what to do, in order.
        title: for the report.
        names: what `--set` can replace; values that begin with ./ or ../ are relative to the recipe's file.
        path: the recipe's file (filled in).
    """

    name: str
    stages: list[Stage]
    title: str = ""
    names: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage ready to run: names replaced, repeats unrolled. `root` is the folder of the recipe's runs.

    `values` are those of its arguments; what exists among them when it runs is input too.
    """

    stage: str
    name: str
    root: Path
    folder: Path
    command: tuple[str, ...]
    words: tuple[str, ...]
    configs: tuple[Path, ...]
    inputs: tuple[str, ...]
    values: tuple[str, ...]
    outputs: tuple[Path, ...]

    @property
    def shown(self) -> str:
        """Its command line, as one could type it."""
        return shlex.join(self.words)

    @property
    def record(self) -> Path:
        """Where it is written down that the step is done; no step's name makes it look like a run's own file."""
        return self.root / "stages" / f"{self.name}.stage.json"

    def called(self, name: str) -> bool:
        """Whether `name` means this step: its own name, or that of a repeated stage."""
        return name in (self.stage, self.name)


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe's YAML; a `UserError` names the file and what is wrong."""
    content = check_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no recipe; it should hold name and stages")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, skip={"path"}, as_group=False)
    names_given = content.get("names") or {}
    if not isinstance(names_given, dict) or not all(isinstance(name, str) for name in names_given):
        raise UserError(f"{path}: names: {names_given!r}; it should hold values by their names")
    arguments, content = _without_arguments(path, {**content, "names": {}})
    try:
        read = parser.instantiate(parser.parse_object(content))
    except ArgumentError as error:
        raise UserError(f"{path}: {describe(error)}") from error
    stages = [
        dataclasses.replace(stage, arguments=own) for stage, own in zip(read.stages, arguments, strict=True)
    ]
    recipe = Recipe(**{**vars(read), "stages": stages, "names": names_given}, path=str(path))
    names = [stage.name for stage in recipe.stages]
    if twice := next(
        (name for name in names if names.count(name) > 1 or name in {*recipe.names, *_BUILT_IN}), None
    ):
        raise UserError(
            f"{path}: the name `{twice}` is used twice (stages, names and {', '.join(_BUILT_IN)} share them)"
        )
    if not recipe.stages:
        raise UserError(f"{path}: has no stages")
    return recipe


def _without_arguments(path: Path, content: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The stages' arguments, and the rest: jsonargparse would build an object of an argument that names a class."""
    stages = content.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return [], content
    arguments = [stage.get("arguments") or {} for stage in stages]
    for number, each in enumerate(arguments):
        if not isinstance(each, dict) or not all(isinstance(name, str) for name in each):
            raise UserError(
                f"{path}: stages.{number}.arguments: {each!r}; it should hold settings by their names"
            )
    bare = [{name: value for name, value in stage.items() if name != "arguments"} for stage in stages]
    return arguments, {**content, "stages": bare}


def plan(recipe: Recipe, settings: Mapping[str, str], output: Path | None = None) -> list[Step]:
    """The recipe's steps, names replaced; an unknown name in `settings` is a `UserError` that lists them."""
    for name in settings:
        if name not in recipe.names:
            raise UserError(
                f"--set {name}: no such name in {recipe.path}; its names are {', '.join(recipe.names)}"
            )
    root = output or Path("runs") / recipe.name
    home = Path(recipe.path).parent
    known = (
        {"runs": str(root)}
        | {name: _from(home, value) for name, value in recipe.names.items()}
        | dict(settings)
    )
    steps = []
    for stage in recipe.stages:
        if stage.repeat < 1:
            raise UserError(f"{recipe.path}: stages.{stage.name}.repeat: {stage.repeat} is below 1")
        previous = stage.previous
        for iteration in range(1, stage.repeat + 1):
            name = stage.name if stage.repeat == 1 else f"{stage.name}-{iteration}"
            folder = str(root / name)
            names = known | {"folder": folder, "iteration": str(iteration)}
            if previous is not None:
                names["previous"] = fill(previous, names, recipe, stage)
            steps.append(_step(recipe, stage, name, root, names))
            # Later stages mean the last of several.
            known[stage.name] = previous = folder
    return steps


def _from(home: Path, value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return str(_shortened(home / text)) if text.startswith(("./", "../")) else text


def _shortened(path: Path) -> Path:
    """The path without `..`, and relative to the current folder where it lies in it."""
    whole = path.resolve()
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def fill(text: str, names: Mapping[str, str], recipe: Recipe, stage: Stage) -> str:
    """Replace each `{name}`; an unknown one is a `UserError` that lists them."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in names:
            raise UserError(
                f"{recipe.path}: stages.{stage.name}: no name {found[0]} here; there are"
                f" {', '.join(sorted(names))}"
            )
        return names[found[1]]

    return _NAME.sub(value, text)


def _step(recipe: Recipe, stage: Stage, name: str, root: Path, names: Mapping[str, str]) -> Step:
    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return fill(value, names, recipe, stage)
        return [filled(each) for each in value] if isinstance(value, list) else value

    home = Path(recipe.path).parent
    command = tuple(filled(word) for word in shlex.split(stage.command))
    configs = [config for config in map(filled, stage.config) if config]
    paths = [
        Path(c) if stage.config[i].startswith("{") else _shortened(home / c) for i, c in enumerate(configs)
    ]
    words = [*command, *(word for path in paths for word in ("--config", str(path)))]
    if command[0] == "fit":
        words += ["--run", names["folder"]]
    values: list[str] = []
    for key, value in stage.arguments.items():
        given = _words(filled(value), several=command[0] != "fit")
        words += [f"--{key}", *given]
        values += given
    outputs = tuple(Path(filled(output)) for output in stage.outputs)
    return Step(
        stage=stage.name,
        name=name,
        root=root,
        folder=Path(names["folder"]),
        command=command,
        words=tuple(words),
        configs=tuple(paths),
        inputs=tuple(map(filled, stage.inputs)),
        values=tuple(values),
        outputs=outputs,
    )


def _words(value: Any, several: bool) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list) and several:
        return [word for each in value for word in _words(each, several)]
    return [value if isinstance(value, str) else json.dumps(value)]


# --- what a result depends on


def _inputs(step: Step) -> list[str]:
    """The stage's inputs, and the arguments that name one; of a report what it reads of each run."""
    reported: list[str] = []
    if step.command[0] == "report":
        reported = [str(path) for sign in _REPORTED for path in sorted(step.root.glob(f"*/{sign}"))]
    named = [value for value in step.values if _counts(value, step)]
    return list(dict.fromkeys([*step.inputs, *named, *reported]))


def _counts(value: str, step: Step) -> bool:
    """Whether an argument names a file or folder that the result depends on, and not one that it writes."""
    path = Path(value)
    if len(value) > 255 or not path.exists() or ("/" not in value and "." not in value):
        return False
    own = [step.folder, *step.outputs]
    return not any(path == each or path in each.parents for each in own)


def missing(step: Step) -> str | None:
    """The first input that is neither there nor a hub id."""
    return next((i for i in step.inputs if not Path(i).exists() and not _is_hub_id(i, step)), None)


def _is_hub_id(value: str, step: Step) -> bool:
    inside = Path(value).is_relative_to(step.root)
    return not inside and _HUB_ID.fullmatch(value) is not None and not Path(value).suffix.startswith(".y")


def fingerprint(step: Step) -> dict[str, str]:
    """What the step's result depends on -> hash: its command line, configs, inputs, and the code."""
    hashes = {"code": code_hash(), "settings": hashlib.sha256(step.shown.encode()).hexdigest()}
    for config in step.configs:
        for path in (config, *_named_in(config)):
            hashes[str(path)] = content_hash(path)
    for name in _inputs(step):
        path = Path(name)
        hashes[name] = content_hash(path) if path.exists() else name
        if path.suffix in (".yaml", ".yml") and path.is_file():
            hashes |= {str(each): content_hash(each) for each in _named_in(path)}
    return hashes


def code_hash() -> str:
    """SHA-256 over the packages: their Python files and what lies with them, such as a report's templates."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for package in _CODE for path in (root / package).rglob("*.*") if path.is_file()):
        if path.suffix != ".pyc" and not path.name.startswith("."):
            digest.update(f"{path.relative_to(root)}\0{_file_hash(path)}\0".encode())
    return digest.hexdigest()


def _named_in(config: Path) -> Iterator[Path]:
    """What a config's values name, relative to it or to the current folder; the same of YAML among it."""
    for value in _strings(check_yaml(config)):
        if len(value) > 255 or ("/" not in value and "." not in value):
            continue
        path = next(
            (p for p in (config.parent / value, Path(value)) if p.exists() and p != config.parent), None
        )
        if path is not None and path.resolve() != config.resolve():
            yield path
            if path.suffix in (".yaml", ".yml"):
                yield from _named_in(path)


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or over the names and contents of a folder's files."""
    if path.is_file():
        return _file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{file.relative_to(path)}\0{_file_hash(file)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    found = path.stat()
    if found.st_size <= _HASHED_BYTES:
        return sha256_file(path)
    return f"{found.st_size} bytes of {found.st_mtime_ns}"


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs between two fingerprints, in words; empty if nothing does."""
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(f"the {key}" if key in ("code", "settings") else key for key in differing)


def recorded(step: Step) -> dict[str, Any] | None:
    """What was written down when the step last ran: status, hashes, seconds."""
    return read_json(step.record) if step.record.is_file() else None


def record_recipe(recipe: Recipe, root: Path, commands: Sequence[str]) -> None:
    """Write down what the report says of the recipe: title and commands."""
    content = {
        "name": recipe.name,
        "title": recipe.title or recipe.name,
        "recipe": recipe.path,
        "commands": [*commands],
    }
    write_json(root / "recipe.json", content)


def record(
    step: Step,
    state: str,
    hashes: Mapping[str, str],
    replaces: str | None = None,
    seconds: float | None = None,
) -> None:
    """Write down how a step stands; `replaces`: the hash of the manifest that it found in its folder."""
    content = {
        "stage": step.name,
        "status": state,
        "command": step.shown,
        "seconds": seconds,
        "replaces": replaces,
        "hashes": dict(hashes),
    }
    write_json(step.record, content)
