"""What the command line's help says of the settings of a class."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def help_of(kind: type) -> dict[str, str | None]:
    """Setting -> its help text, None where there is none."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "made")
    # The actions' list is argparse's own; it has no public way to ask for an argument's help alone.
    actions = [action for action in parser._actions if action.dest.startswith("made.")]
    return {action.dest.removeprefix("made."): action.help for action in actions}
