"""jsonargparse's errors, which are trees of many lines, as one line: file, key, value, and what is right."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.schema import UserError

EMPTY_CONFIG = "holds no settings; it should have lines such as `name: value`"
_LONGEST = 600
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "- Expected a <class 'NoneType'>",
)


def check_yaml(path: str | Path) -> Any:
    """The content of a YAML file; missing, not UTF-8 or not YAML: a `UserError` that names file and place."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, where a YAML file is needed") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML{place}: {getattr(error, 'problem', error)}") from error


def config_files(arguments: Sequence[str]) -> list[str]:
    """The files that `--config FILE`, `--config=FILE` and `-c FILE` name, in their order."""
    files = [value for flag, value in itertools.pairwise(arguments) if flag in ("--config", "-c")]
    return files + [word.partition("=")[2] for word in arguments if word.startswith("--config=")]


def user_error_in(error: BaseException) -> UserError | None:
    """The `UserError` that a library wrapped into its own error, if that is what happened."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, UserError):
        link = link.__cause__ or link.__context__
    return link


def root_of(error: BaseException) -> BaseException:
    """What a library's error was raised for, in the end."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def describe(error: BaseException, files: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """One line for a jsonargparse `ArgumentError`; names the last of `files` that holds the key.

    None of them is named where one of the `arguments` sets it.
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if text.startswith("Unexpected config") and (
        odd := next((file for file in files if not isinstance(check_yaml(file), dict)), None)
    ):
        return f"{odd}: {EMPTY_CONFIG}"
    if text.startswith("the following arguments are required: data, model"):
        return "no config: give --config FILE (it says what model and data are)"
    if unknown := re.fullmatch(r"unrecognized arguments: (.*)", text):
        group, _, name = unknown[1].split()[0].removeprefix("--").partition("=")[0].rpartition(".")
        return f"no such setting: {unknown[1]}" + (_near(name, [], group) if group == "trainer" else "")
    path = [
        part for key in re.findall(r'^\s*Parser key "([^"]*)":', text, flags=re.M) for part in key.split(".")
    ]
    classes = re.findall(r"given class_path '([^']*)'", text)
    if option := re.search(r"(?:Option|Group '([\w.]+)' does not accept option) '([^']+)'", text):
        path += [*(option[1] or "").split("."), *option[2].split(".")]
        problem = "no such setting" + _near(option[2].split(".")[-1], classes, option[1])
    else:
        problem = "; ".join(dict.fromkeys(_leaves(lines))) or _not_imported(lines) or lines[0]
    path = [part for part in path if part and part != "init_args"]
    if path and any(re.match(rf"--{re.escape(path[0])}(?![\w-])", word) for word in arguments):
        files = ()
    place = (
        next((f"{file}: " for file in reversed(files) if holds(check_yaml(file), path)), "") if path else ""
    )
    line = f"{place}{'.'.join(path)}{': ' if path else ''}{problem}"
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _leaves(lines: list[str]) -> Iterator[str]:
    """The lines that say what is wrong, without the tree around them."""
    given = next(
        (line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), None
    )
    if given is not None and (nested := re.match(r"NestedArg\(key='.*', val=(.*)\)$", given)):
        given = str(_literal(nested[1]))
    for line in lines:
        if line.startswith("Given value:") or any(
            line.startswith(noise) or line.startswith(f"- {noise}") for noise in _NOISE
        ):
            continue
        if line.startswith("Parser key") and (
            line.endswith(":") or re.fullmatch(r'Parser key "[^"]*":', line)
        ):
            continue
        leaf = re.sub(r'^Parser key "[^"]*": ?', "", line.removeprefix("- "))
        if leaf.startswith("Problem with given class_path"):
            continue
        if absent := re.match(r"Expected a path but (.*) either not accessible or invalid", leaf):
            # A class that is given in JSON is tried as the name of a config, too.
            if not absent[1].startswith(("{", "[")):
                yield f"no such file: {absent[1]}"
            continue
        if named := re.match(r"Expected a dot import path string: ?(.*)", leaf):
            yield f"{named[1]!r} where a class such as my_file.MyClass is needed"
            continue
        if least := re.match(r"Not of type (PositiveInt|NonNegativeInt): ?(.*?) ?does not conform", leaf):
            number = f"a whole number of {1 if least[1] == 'PositiveInt' else 0} or more"
            yield f"{least[2] or given} where {number} is needed"
            continue
        if least := re.match(r"Not of type (?:PositiveInt|NonNegativeInt): invalid literal .*: (.*)", leaf):
            yield f"{least[1]} where a whole number is needed"
            continue
        if named := re.fullmatch(r"Import path (\S+) does not correspond to a subclass of (\w+)", leaf):
            yield f"{named[1]} is no subclass of {named[2]}"
            continue
        if bare := re.match(r"Expected an instantiatable class, but (\S+) is abstract", leaf):
            yield f"{bare[1]} lacks a method that it has to have"
            continue
        if leaf.startswith("No module named"):
            continue
        leaf = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", leaf).replace("typing.", "")
        expected = re.fullmatch(r"Expected an? (.*?)\.?(?: Got value: (.*))?", leaf)
        if expected is None:
            yield leaf
        elif (value := expected[2] or given) is not None:
            yield f"{value!r} where {_wanted(expected[1])} is needed"
        else:
            yield f"{_wanted(expected[1])} is needed"


def _not_imported(lines: list[str]) -> str | None:
    """What a class_path could not be imported for, where that is all that is wrong."""
    found = next((line.removeprefix("- ") for line in lines if "No module named" in line), None)
    return None if found is None else re.sub(r'^Parser key "[^"]*": ?', "", found)


def _wanted(kind: str) -> str:
    literal = re.fullmatch(r"Literal\[(.*)\]", kind)
    return "one of " + literal[1].replace("'", "") if literal else kind


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _near(name: str, classes: list[str], group: str | None) -> str:
    """What the class (or the group of it) does take: the nearest name, or all of them."""
    owner: Any = None
    if classes:
        owner = _imported(classes[-1])
        if owner is not None and group:
            owner = _annotated(owner, group)
    elif group == "trainer":
        owner = _imported("lightning.pytorch.Trainer")
    if owner is None:
        return ""
    known = [each for each in inspect.signature(owner).parameters if each not in ("args", "kwargs")]
    near = difflib.get_close_matches(name, known, n=1)
    return (
        f"; did you mean `{near[0]}`?" if near else f"; {owner.__name__} takes {', '.join(known) or 'none'}"
    )


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _annotated(owner: Any, parameter: str) -> Any:
    """The class that annotates a parameter (`policy: PolicyConfig | None`), if it is one."""
    import typing

    found = typing.get_type_hints(owner.__init__).get(parameter.split(".")[0])
    options = [found, *typing.get_args(found)]
    return next((option for option in options if inspect.isclass(option) and option is not type(None)), None)


def holds(tree: Any, path: Sequence[str]) -> bool:
    """Whether a YAML tree has this key, `init_args` levels aside."""
    for part in path:
        while isinstance(tree, dict) and part not in tree and "init_args" in tree:
            tree = tree["init_args"]
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
