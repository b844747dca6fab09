"""The command `lightning`, which Lightning no longer brings: `lightning run ...` is handed on to `fabric run ...`.

(This file is not called lightning.py: started as scripts, its neighbours would import it in Lightning's place.)
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Sequence
from importlib import metadata

from launch.launchers import ZERO3


def words_for_fabric(arguments: Sequence[str], port: int) -> list[str]:
    """The arguments in the words of `fabric`: `zero3` by its name there, and the old `run model` as `run`.

    `port`: where the ranks meet, if all are on this node and the arguments do not say it.
    """
    words = list(arguments)
    if words[:2] == ["run", "model"]:
        del words[1]
    for place, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag == "--strategy" and value == "zero3":
            words[place] = f"--strategy={ZERO3}"
        elif word == "zero3" and place and words[place - 1] == "--strategy":
            words[place] = ZERO3
        elif flag == "--run":
            # Python 3.11 has torchrun's parser take --run, after the script too, for a part of its own --run-path.
            words[place] = word.replace("--run", "--trainer.default_root_dir", 1)
    if (
        words[:1] == ["run"]
        and _value(words, "--main-port") is None
        and _value(words, "--num-nodes") in (None, "1")
    ):
        # fabric's own default is one port for all, and a second run on the node would fail.
        words.insert(1, f"--main-port={port}")
    return words


def _value(words: Sequence[str], flag: str) -> str | None:
    """What `--flag VALUE` or `--flag=VALUE` says; fabric takes --num_nodes for --num-nodes."""
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            return value if equals else following
    return None


def free_port() -> int:
    """A port on this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `fabric` in this process; ends with its exit status."""
    # torchrun, which fabric starts the ranks by, would die of SLURM's warning and leave them behind; so it hands it on.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    words = words_for_fabric(sys.argv[1:] if arguments is None else arguments, free_port())
    scripts = metadata.distribution("lightning").entry_points.select(group="console_scripts", name="fabric")
    (fabric,) = scripts
    fabric.load()(args=words, prog_name="lightning")


if __name__ == "__main__":
    main()
