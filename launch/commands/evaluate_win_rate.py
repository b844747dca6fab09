"""`tandem evaluate win-rate`: a judge compares a trained model with its base and with the data's answers."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from launch.commands.parsing import add_model, check_output, command_parser, instantiated, parsed, with_judge
from trainer.data.sources import Source
from trainer.generation import Sampling
from trainer.judges import Judge
from trainer.schema import UserError


def parser() -> ArgumentParser:
    """The arguments of `tandem evaluate win-rate`."""
    made = command_parser(
        "evaluate win-rate",
        "Let a trained model and its base answer test questions, and have a judge compare: the model against its base,"
        " and against the data's answers, each pair in both orders. A rerun generates and asks what is missing.",
    )
    made.add_argument("--config", action="config", help="YAML file with any of these settings.")
    add_model(made)
    made.add_subclass_arguments(
        Judge,
        "judge",
        required=True,
        help="Who judges: a .gguf file, a transformers model's folder, the .yaml of a judge, or a class"
        " such as trainer.judges.served.ServerJudge with its settings.",
    )
    made.add_subclass_arguments(
        Source,
        "data",
        required=True,
        help="Where the questions come from, such as trainer.data.preferences.PreferenceFile; or the .yaml of one.",
    )
    made.add_argument(
        "--split",
        type=Literal["test", "validation"],
        default="test",
        help="Part of the data that is asked about.",
    )
    made.add_argument("--questions", type=PositiveInt, default=5, help="How many test questions.")
    made.add_argument(
        "--prompt",
        type=str | None,
        help="Text file with what the judge is asked, holding {question}, {first} and {second}. Default:"
        " configs/judges/better_answer.txt.",
    )
    made.add_class_arguments(Sampling, "sampling")
    made.set_defaults({"sampling.max_new_tokens": 128})
    made.add_argument(
        "--stop", type=list[str], default=[], help="An answer ends before the first of these that it holds."
    )
    made.add_argument("--batch_size", type=PositiveInt, default=32, help="Questions answered at once.")
    made.add_argument("--label", type=str, default="DPO", help="Name in the report.")
    made.add_argument("--output", type=str, required=True, metavar="FILE", help="JSON file for the result.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem evaluate win-rate`; returns the exit status."""
    made = parser()
    given = parsed(made, with_judge(arguments))
    for part in (given.judge, given.data) if given.offline else ():
        if "offline" in (part.get("init_args") or {}):
            part.init_args.offline = True
    return win_rate(given, instantiated(made, given))


def win_rate(given: Namespace, ready: Namespace) -> int:
    """Answer, judge and write the result; what people read goes to stdout. `ready`: the settings, their objects built.

    Raises:
        UserError: a setting that cannot work, and a judge that answered nothing, or not to the end.
    """
    from launch.ending import leave_together
    from launch.models import is_first
    from trainer.evaluation.win_rate import compare, lines
    from trainer.provenance import git_revision, versions, write_json

    output = Path(given.output)
    if output.is_dir() or not output.suffix:
        raise UserError(f"--output {output}: give a file such as {output}/win_rate.json")
    check_output(output, file=True)
    prompt, folder = _prompt(given.prompt), output.with_suffix("")
    dialogues, answers, told = _answers(given, ready, folder / "answers")
    speaks = is_first()
    leave_together()
    if not speaks:
        return 0
    result = compare(dialogues, *answers, ready.judge, folder, prompt=prompt, progress=True)
    result |= {"label": given.label, **told, "versions": versions(), "git": git_revision()}
    write_json(output, result)
    for line in lines(result):
        print(line)
    print(f"written to {output}", file=sys.stderr)
    _refuse_silence(result)
    return 0


def _prompt(path: str | None) -> str:
    """The judge's prompt, looked at before anything is computed."""
    from trainer.evaluation.verdicts import check_prompt
    from trainer.evaluation.win_rate import PROMPT

    try:
        text = Path(path or PROMPT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt {path or PROMPT}: cannot be read as UTF-8 text ({error})") from error
    check_prompt(text, f"--prompt {path or PROMPT}")
    return text


def _answers(
    given: Namespace, ready: Namespace, folder: Path
) -> tuple[list[Any], tuple[dict[str, str], dict[str, str]], dict[str, Any]]:
    """Questions, the answers of the model and of its base, and what the result says of them.

    The models are let go of with it: the judge may need their memory.
    """
    from launch.models import answering, is_first
    from trainer.evaluation.win_rate import own_and_base
    from trainer.evaluation.win_rate_answers import select_dialogues

    if given.adapter is None:
        raise UserError("--adapter: is missing; give the trained model, which is compared with its base")
    loaded = ready.data.load(given.split)
    if not loaded.records:
        counts = ", ".join(f"{name} {count}" for name, count in loaded.counts.items() if count)
        raise UserError(
            f"data: the part {given.split} has no row ({counts}); look at it with `tandem data show`"
        )
    model = answering(given)
    positions = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    room = None if positions is None else positions - given.sampling.max_new_tokens
    dialogues, overlong = select_dialogues(loaded.records, model.tokenizer, given.questions, room)
    answers = own_and_base(
        model.model,
        model.tokenizer,
        dialogues,
        folder.parent,
        identity={"dtype": given.dtype, **model.description["fingerprint"]},
        base=_whole_base(given, model),
        sampling=ready.sampling,
        stop=given.stop,
        batch_size=given.batch_size,
        progress=is_first(),
    )
    told = {
        "model": model.description,
        "data": {
            "source": ready.data.describe(),
            "split": given.split,
            "counts": dict(loaded.counts) | {"dropped_overlong": overlong},
            "hashes": loaded.hashes,
        },
        "sampling": vars(ready.sampling) | {"stop": list(given.stop)},
    }
    return dialogues, answers, told


def _whole_base(given: Namespace, model: Any) -> Any:
    """The base of a model whose weights were all trained; None where the base is the model without its adapter."""
    from peft import PeftModel

    from trainer.policy.folders import read_manifest, resolve
    from trainer.policy.load import PolicyConfig, load_frozen

    if isinstance(model.model, PeftModel):
        return None
    name = given.base or ((read_manifest(resolve(given.adapter)) or {}).get("base") or {}).get("name")
    if name is None:
        raise UserError(f"--adapter {given.adapter}: does not say what it was trained from; give --base, too")
    config = PolicyConfig(
        name,
        adapter=None,
        dtype=given.dtype,
        revision=given.revision,
        offline=given.offline,
        trust_remote_code=given.trust_remote_code,
    )
    return load_frozen(config).to(model.model.device)  # type: ignore[arg-type]


def _refuse_silence(result: dict[str, Any]) -> None:
    """A judge that is gone leaves questions that the same command asks again: that is no finished evaluation."""
    found = result["against"].values()
    silent, compared = sum(each["unanswered"] for each in found), len(found) * result["questions"]
    if result["stopped"] or silent == compared:
        raise UserError(
            f"the judge gave no answer to {silent} of {compared} comparisons, which are counted as invalid"
            f" ({result['stopped'] or 'it answered nothing'}); the same command asks again"
        )
