"""Win rates: a trained model against its base and against the data's answers, before a judge.

Every comparison is judged in both orders; a win (or a loss) is what both orders agree on, so that a judge with a taste
for the first place gives ties. Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", section
3.4, https://arxiv.org/abs/2306.05685.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation.letters import interval
from trainer.evaluation.verdicts import Comparison, Verdict, judged
from trainer.evaluation.win_rate_answers import Dialogue, model_answers, weights_hash, without_adapter
from trainer.generation import Sampling
from trainer.judges import Judge
from trainer.provenance import write_text

PROMPT = Path(__file__).resolve().parents[2] / "configs" / "judges" / "better_answer.txt"
_Z = stats.norm.ppf(0.975)
_EXAMPLES = 100
_TEST = "exact sign test, two-sided, over wins and losses"


def evaluate_win_rate(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    judge: Judge,
    folder: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    base: PreTrainedModel | None = None,
    prompt: str | None = None,
    sampling: Sampling = Sampling(max_new_tokens=128),
    stop: Sequence[str] = (),
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Any]:
    """Let a trained model and its base answer, and a judge compare: the model against both, and the data's answers.

    Args:
        folder: where answers and verdicts are kept; a second call generates and asks only what is missing.
        identity: what says which weights the policy has, as plain JSON (`trainer.policy.load.fingerprint`); by default
            their hash.
        base: what the policy was before its training; by default the policy without its adapter.
        prompt: what the judge is asked, with {question}, {first} and {second}. Default: `PROMPT`'s text.
        stop: an answer ends before the first of these that it holds.
    """
    answers = own_and_base(
        policy, tokenizer, dialogues, folder, identity=identity, base=base, sampling=sampling, stop=stop,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    return compare(dialogues, *answers, judge, folder, prompt=prompt, progress=progress)


def own_and_base(
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Dialogue],
    folder: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    base: PreTrainedModel | None = None,
    **settings: Any,
) -> tuple[dict[str, str], dict[str, str]]:
    """The answers of the policy and of its base, by question; on every rank of a process group."""
    place = Path(folder) / "answers"
    identity = {"weights": weights_hash(policy)} if identity is None else identity
    plain = dict(identity) | {"start": None} if base is None else {"weights": weights_hash(base)}
    common: dict[str, Any] = {"folder": place, **settings}
    own = model_answers(policy, tokenizer, dialogues, identity=identity, **common)
    if base is not None:
        return own, model_answers(base, tokenizer, dialogues, identity=plain, **common)
    with without_adapter(policy) as bare:
        return own, model_answers(bare, tokenizer, dialogues, identity=plain, **common)


def compare(
    dialogues: Sequence[Dialogue],
    own: Mapping[str, str],
    base: Mapping[str, str],
    judge: Judge,
    folder: str | Path,
    *,
    prompt: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Have the own answers judged against the base's and the data's: counts, rates and biases for each, and examples.

    `stopped` says why the judge gave no more answers, if it did: the questions that are left count as invalid.
    """
    others = {"base": base, "answers": {each.key: each.answer for each in dialogues}}
    comparisons = [
        Comparison(each.key, each.question, own[each.key], answers[each.key], against)
        for against, answers in others.items()
        for each in dialogues
    ]
    prompt = PROMPT.read_text(encoding="utf-8") if prompt is None else prompt
    verdicts, place, stopped = judged(
        comparisons, judge, prompt, Path(folder) / "verdicts", progress=progress
    )
    written = place / "verdicts.jsonl"
    rows = ({"key": each.comparison.key, **_example(each)} for each in verdicts)
    write_text(written, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {
        "kind": "win_rate",
        "judge": judge.describe(),
        "prompt": prompt,
        "questions": len(dialogues),
        "against": {
            name: summarize([each for each in verdicts if each.comparison.against == name]) for name in others
        },
        "examples": [_example(each) for each in _first(verdicts, _EXAMPLES)],
        "verdicts": str(written),
        "stopped": stopped,
    }


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts and rates of comparisons with one opponent.

    `win_rate` is (wins + ties / 2) / (wins + losses + ties); invalid ones are counted apart. Its interval (95 %) is
    Wilson's, which a share of ties makes wider than needed. A bias is a share of picks less 1/2: of the first place
    among all that picked a place, and of the longer answer among those that chose between different lengths; their
    intervals are by bootstrap over questions, Wilson's where all questions look alike; both count questions with two
    valid answers. `order_agreement` is the share of questions where both orders say the
    same. None stands where there is nothing to count.
    """
    counts = Counter(each.outcome for each in verdicts)
    wins, losses, ties = counts["win"], counts["loss"], counts["tie"]
    asked = [each for each in verdicts if not each.identical]
    both = [each for each in asked if each.outcome != "invalid"]
    valid = wins + losses + ties
    position = _bias([_first_picks(each) for each in both])
    return {
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "invalid": counts["invalid"],
        "unanswered": sum(not each.answered for each in verdicts),
        "identical": len(verdicts) - len(asked),
        "win_rate": (wins + ties / 2) / valid if valid else None,
        "interval": wilson(wins + ties / 2, valid),
        "p_value": stats.binomtest(wins, wins + losses).pvalue if wins + losses else None,
        "test": _TEST,
        "first_rate": position["rate"],
        "position_bias": position,
        "length_bias": _bias([_longer_picks(each) for each in both]),
        "order_agreement": sum(each.orders[0] == each.orders[1] for each in both) / len(both)
        if both
        else None,
        "winner": "DPO" if wins > losses else "Base" if losses > wins else "Both",
    }


def wilson(hits: float, total: int) -> list[float] | None:
    """95 % score interval of a share (Wilson 1927, "Probable inference", J. Am. Stat. Assoc. 22); halves may count."""
    if not total:
        return None
    share, spread = hits / total, _Z**2 / total
    middle = share + spread / 2
    reach = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return [max(0.0, (middle - reach) / (1 + spread)), min(1.0, (middle + reach) / (1 + spread))]


def lines(result: Mapping[str, Any]) -> list[str]:
    """The result as people read it; the first three lines of each comparison are as the published system has them."""
    told = []
    titles = {"base": "DPO against base", "answers": "DPO against the data's answers (called base here)"}
    for name, found in result["against"].items():
        told += [
            f"{titles[name]}, {result['questions']} questions:",
            f"Number of wins of the base model: {found['losses']}",
            f"Number of wins of the DPO model: {found['wins']}",
            f"Winner: {found['winner']}",
            *_details(found),
        ]
    return told


def _details(found: Mapping[str, Any]) -> list[str]:
    same = f" ({found['identical']} with the same text twice)" if found["identical"] else ""
    silent = f" ({found['unanswered']} without an answer)" if found["unanswered"] else ""
    told = [f"  ties: {found['ties']}{same}, invalid: {found['invalid']}{silent}"]
    if found["win_rate"] is not None:
        p = "" if found["p_value"] is None else f", p = {found['p_value']:.3g} ({found['test']})"
        told.append(f"  win rate, a tie as one half: {_percent(found['win_rate'], found['interval'])}{p}")
    for name, words in (
        ("position_bias", "picks of the first place"),
        ("length_bias", "picks of the longer answer"),
    ):
        bias = found[name]
        if bias["rate"] is not None:
            low, high = bias["interval"]
            told.append(f"  {words}: {_percent(bias['rate'], [low + 0.5, high + 0.5])} of {bias['picks']}")
    if found["order_agreement"] is not None:
        told.append(f"  both orders agree: {found['order_agreement']:.1%}")
    return told


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _bias(picks: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Of (hits, picks) for each question: their share, how far it is from 1/2, and that one's interval."""
    hits, totals = ([each[i] for each in picks] for i in (0, 1))
    bounds = interval(hits, totals)
    if bounds is None:
        return {"value": None, "interval": None, "rate": None, "picks": 0}
    rate = sum(hits) / sum(totals)
    shares = {hit / total for hit, total in picks if total}
    if len(shares) == 1:
        # Resampling shows no spread; the two orders of a question are no two questions.
        questions = sum(total > 0 for total in totals)
        bounds = wilson(rate * questions, questions)
        assert bounds is not None
    return {
        "value": rate - 0.5,
        "interval": [bound - 0.5 for bound in bounds],
        "rate": rate,
        "picks": sum(totals),
    }


def _first_picks(verdict: Verdict) -> tuple[int, int]:
    return sum(pick == "A" for pick in verdict.picks), sum(pick in ("A", "B") for pick in verdict.picks)


def _longer_picks(verdict: Verdict) -> tuple[int, int]:
    own, other = len(verdict.comparison.own), len(verdict.comparison.other)
    if own == other:
        return 0, 0
    longer = "win" if own > other else "loss"
    return sum(each == longer for each in verdict.orders), sum(
        each in ("win", "loss") for each in verdict.orders
    )


def _first(verdicts: Sequence[Verdict], most: int) -> list[Verdict]:
    """The first ones, as many of each comparison."""
    seen: Counter[str] = Counter()
    kept = []
    for each in verdicts:
        seen[each.comparison.against] += 1
        if seen[each.comparison.against] <= most:
            kept.append(each)
    return kept


def _example(verdict: Verdict) -> dict[str, Any]:
    comparison = verdict.comparison
    return {
        "question": comparison.question,
        "dpo": comparison.own,
        "other": comparison.other,
        "against": comparison.against,
        "verdict": verdict.outcome,
        "orders": list(verdict.orders),
        "picks": list(verdict.picks),
    }
