"""`tandem evaluate reward`: what a model's continuations are worth, and how varied they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt

from launch.commands.parsing import add_model, check_output, command_parser, instantiated, parsed
from trainer.schema import UserError


def parser() -> ArgumentParser:
    """The arguments of `tandem evaluate reward`."""
    from trainer.generation import Sampling
    from trainer.pairs.prompts import PromptSource
    from trainer.rewards import Reward

    made = command_parser(
        "evaluate reward",
        "Continue held-out prompts with a model and score the texts: mean rewards with intervals, and beside them token"
        " entropy, KL divergence, distinct n-grams, self-similarity and length, so that a reward that was bought with"
        " variety is seen.",
    )
    made.add_argument("--config", action="config", help="YAML file with the settings below.")
    add_model(made)
    made.add_subclass_arguments(PromptSource, "prompts", required=True, help="Held-out prompts.")
    made.add_argument(
        "--rewards", type=dict[str, Reward], required=True, help="By name: class_path and init_args of each."
    )
    made.add_class_arguments(Sampling, "sampling")
    made.set_defaults({"sampling.do_sample": True, "sampling.max_new_tokens": 48})
    made.add_argument(
        "--chat",
        type=bool,
        default=False,
        help="Each prompt is a user's turn, put through the chat template.",
    )
    made.add_argument("--system", type=str | None, help="What stands before it; needs --chat true.")
    made.add_argument("--samples", type=PositiveInt, default=1, help="Continuations of each prompt.")
    made.add_argument("--batch_size", type=PositiveInt, default=64, help="Continuations sampled at once.")
    made.add_argument(
        "--reference",
        type=str | None,
        help="What the KL divergence is from: an adapter of the same base, or a model's folder. Default: the base of"
        " --adapter; a model without one has none.",
    )
    made.add_argument(
        "--examples", type=NonNegativeInt, default=20, help="How many prompts' texts the result holds."
    )
    made.add_argument("--label", type=str, default="", help="Name in the report.")
    made.add_argument("--output", type=str, required=True, metavar="FILE", help="JSON file for the result.")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run `tandem evaluate reward`; returns the exit status."""
    made = parser()
    given = instantiated(made, parsed(made, arguments))
    check_output(given.output, file=True)
    return _evaluate(given)


def _evaluate(given: Any) -> int:
    from launch.ending import leave_together
    from launch.models import answering, is_first
    from trainer.evaluation.reward import evaluate_reward
    from trainer.provenance import git_revision, versions, write_json

    ready = answering(given)
    found = given.prompts.load(ready.tokenizer)
    result = evaluate_reward(
        ready.model,
        ready.tokenizer,
        found.prompts,
        given.rewards,
        sampling=given.sampling,
        samples=given.samples,
        reference=_reference(given, ready),
        batch_size=given.batch_size,
        examples=given.examples,
        progress=is_first(),
        chat=given.chat,
        system=given.system,
    )
    speaks = is_first()
    leave_together()
    if not speaks:
        return 0
    source = {"prompt_source": given.prompts.describe(), "texts": found.hashes}
    whole = {"kind": "reward", "label": given.label, "model": ready.description, **result, **source}
    write_json(given.output, whole | {"versions": versions(), "git": git_revision()})
    for line in lines(result):
        print(line)
    print(f"written to {given.output}", file=sys.stderr)
    return 0


def _reference(given: Any, ready: Any) -> Any:
    """What gives the reference for a while; None where there is none."""
    from peft import PeftModel

    from trainer.policy.load import PolicyConfig, load_frozen, load_tokenizer, saved_policy
    from trainer.policy.logprobs import unwrap

    if given.reference is None:
        if not isinstance(ready.model, PeftModel):
            return None

        @contextlib.contextmanager
        def base() -> Any:
            with ready.model.disable_adapter():
                yield ready.model

        return base
    if given.sharded:
        raise UserError("--reference: does not go with --sharded; leave one of them out")
    settings = {name: getattr(given, name) for name in ("dtype", "offline", "trust_remote_code")}
    path = Path(given.reference)
    if (path / "config.json").is_file() or not path.exists():
        config = PolicyConfig(given.reference, adapter=None, **settings)
    else:
        config = saved_policy(given.reference, given.base, **settings)
    tokenizer = load_tokenizer(config.base, config.revision, config.offline, config.trust_remote_code)
    other = load_frozen(config).to(ready.model.device)  # type: ignore[arg-type]
    own, its = (unwrap(each).get_output_embeddings().weight.shape[0] for each in (ready.model, other))
    if tokenizer.get_vocab() != ready.tokenizer.get_vocab() or own != its:
        raise UserError(
            f"--reference: {given.reference} has another vocabulary than the model ({its:,} and {own:,} outputs), so"
            " there is no divergence from it; give one with the same, or leave it out"
        )
    return lambda: contextlib.nullcontext(other)


def lines(result: dict[str, Any]) -> list[str]:
    """The figures as people read them."""
    told = [f"left out for want of room: {left:,} prompts"] if (left := result.get("too_long")) else []
    for name, each in result["rewards"].items():
        low, high = each["interval"]
        told.append(f"reward {name}: {each['mean']:.3f} ({low:.3f} to {high:.3f}), sd {each['sd']:.3f}")
        if parts := each.get("parts"):
            told.append("  " + ", ".join(f"{part} {one['mean']:.3f}" for part, one in parts.items()))
        if unscored := each.get("unscored"):
            told.append("  no score: " + ", ".join(f"{why} {count:,}" for why, count in unscored.items()))
    for name, unit in (("entropy", "nats a token"), ("kl", "nats a text"), ("length", "tokens")):
        if (each := result[name]) is not None:
            told.append(
                f"{name}: {each['mean']:.3f} ({each['interval'][0]:.3f} to {each['interval'][1]:.3f}) {unit}"
            )
    for name in ("distinct_1", "distinct_2", "distinct_3", "self_similarity"):
        if result[name] is not None:
            told.append(f"{name}: {result[name]:.3f}")
    return [*told, f"finished: {result['finished']:.1%}"]
