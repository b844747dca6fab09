"""`tandem evaluate KIND`: finds the evaluation that the next word names."""

from __future__ import annotations

from collections.abc import Sequence

from launch.commands.parsing import Kind, dispatch

KINDS = {
    "letters": Kind("launch.commands.evaluate_letters:main", "how well a model exchanges look-alike letters"),
    "reward": Kind(
        "launch.commands.evaluate_reward:main", "mean reward, diversity and KL of sampled continuations"
    ),
    "win-rate": Kind(
        "launch.commands.evaluate_win_rate:main", "a judge compares a model with its base and with the data"
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Run `tandem evaluate KIND`; returns the exit status."""
    return dispatch("evaluate", KINDS, arguments)
