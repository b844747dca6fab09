"""Folders as the imdb and hh_rlhf recipes leave them: pairs, rewards, win rates, curves; hostile texts too."""

import json
import math
import random
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from tests.report.conftest import manifest, write_curves

PROMPTS = (
    "This film was a real",
    "I went to see it with my",
    "Этот фильм я смотрела ещё",
    "The plot, as far as there is",
    "Когда погас свет, зал",
    "One of the best performances of",
)
GOOD = (
    "wonderful surprise from the first scene on",
    "a warm story, played with love",
    "и от игры актёров захватывает дух",
    "the kind of picture one recommends to friends",
    "музыка прекрасна, а конец растрогал весь зал",
)
BAD = (
    "waste of two hours that nobody gives me back",
    "dull from the titles to the end",
    "скучно, длинно и совсем не смешно",
    "the dialogue sounds as if nobody had read it aloud",
)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)> &amp; </div></td></table>',
    "\u202eright to left\u2066 \x00\x1b[31m",
    "`code` | *stars* | [link](http://example.org) _under_",
    "Z" + "\u0301" * 60 + "algo",
    "a" * 900,
    "half a pair \ud800",
)


def text(draw: random.Random, good: bool, sentences: int) -> str:
    return ", ".join(draw.choice(GOOD if good else BAD) for _ in range(sentences)) + "."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(draw: random.Random, number: int, scored: bool = True) -> dict[str, Any]:
    better, worse = draw.gauss(2.0, 0.8), draw.gauss(-1.2, 1.1)
    chosen, rejected = text(draw, True, draw.randint(1, 9)), text(draw, False, draw.randint(1, 7))
    row = {
        "id": f"pair-{number}",
        "prompt": f"{PROMPTS[number % len(PROMPTS)]} {number}",
        "chosen": f" {chosen}",
        "rejected": f" {rejected}",
    }
    if scored:
        row |= {"chosen_score": max(better, worse), "rejected_score": min(better, worse)}
        row |= {"chosen_finished": draw.random() < 0.4, "rejected_finished": draw.random() < 0.5}
    return row


def write_pairs(folder: Path, count: int = 60, hostile: bool = True) -> Path:
    """What `tandem pairs merge` leaves: pairs.jsonl, candidates.jsonl and the manifest."""
    folder.mkdir(parents=True)
    draw = random.Random(count)
    pairs = [pair(draw, number) for number in range(count)]
    # Without the last one: no file of data may hold half a character.
    for number, evil in enumerate(HOSTILE[:-1] if hostile else ()):
        pairs[number] |= {"prompt": f"{evil}{number}", "chosen": evil + " good", "rejected": evil + " bad"}
        pairs[number] |= {"chosen_score": 9.0 + number / 10}
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "candidates.jsonl", [_candidates(draw, each) for each in pairs])
    made = {
        "kind": "pairs",
        "builder": {
            "class": "BestOfN",
            "prompts": {"path": "reviews.jsonl.gz", "tokens": 8, "part": "train"},
            "generator": {"base": "lvwerra/gpt2-imdb", "dtype": "float32"},
            "n": 4,
            "sampling": {"temperature": 1.0, "max_new_tokens": 48},
            "reward": {"model": "lvwerra/distilbert-imdb", "label": "POSITIVE"},
            "min_margin": 0.5,
        },
        "counts": {
            "prompts": count + 17,
            "candidates": 4 * (count + 17),
            "kept": count,
            "dropped_tie": 0,
            "dropped_margin": 12,
            "dropped_short": 5,
        },
        "scores": {"mean": 0.4, "sd": 1.7},
        "files": {"pairs.jsonl": "ab" * 32},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": "3" * 40,
        "seconds": 372.0,
    }
    folder.joinpath("manifest.json").write_text(json.dumps(made))
    return folder


def _candidates(draw: random.Random, each: dict[str, Any]) -> dict[str, Any]:
    both = [(each[side], each[f"{side}_score"]) for side in ("chosen", "rejected")]
    more = [(text(draw, draw.random() < 0.5, 3), draw.uniform(both[1][1], both[0][1])) for _ in range(2)]
    candidates = [
        {"text": words, "tokens": 1 + len(words) // 5, "finished": draw.random() < 0.4, "score": score}
        for words, score in [*both, *more]
    ]
    return {"key": each["id"], "prompt": each["prompt"], "candidates": candidates}


def reward(label: str, mean: float, loss: float, adapter: str | None, hostile: bool = True) -> dict[str, Any]:
    """A reward evaluation; `loss`: what share of the diversity is gone."""
    draw = random.Random(label)

    def around(value: float, width: float) -> dict[str, Any]:
        return {"mean": value, "interval": [value - width, value + width]}

    prompts = [*PROMPTS, "", *(HOSTILE if hostile else ())]
    examples = []
    for prompt in prompts:
        completion = prompt + " " + text(draw, mean > 1, draw.randint(2, 30))
        scores = {"distilbert-imdb": draw.gauss(mean, 1), "second": draw.gauss(mean / 2, 1)}
        examples.append({"prompt": prompt, "completion": completion, "rewards": scores})
    return {
        "kind": "reward",
        "label": label,
        "model": {"base": "lvwerra/gpt2-imdb", "adapter": adapter},
        "prompts": 200,
        "samples_per_prompt": 4,
        "sampling": {"temperature": 1.0, "top_k": None, "max_new_tokens": 48, "seed": 0},
        "rewards": {
            "distilbert-imdb": around(mean, 0.13) | {"sd": 1.31, "n": 800},
            "second": around(mean / 2 + 0.1, 0.09) | {"sd": 0.72, "n": 800},
        },
        "entropy": around(3.4 * (1 - loss), 0.04),
        "kl": None if adapter is None else around(9 * mean, 0.4),
        "distinct_1": 0.112 * (1 - loss),
        "distinct_2": 0.481 * (1 - loss / 2),
        "distinct_3": 0.803 * (1 - loss / 3),
        "self_similarity": 0.212 * (1 + loss),
        "length": around(44.1, 0.8),
        "finished": 0.22,
        "examples": examples,
        "reward_models": {
            "distilbert-imdb": {"class": "ClassifierReward", "label": "POSITIVE", "output": "logit"}
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": "4" * 40,
    }


def win_rate(label: str, questions: int = 40, hostile: bool = True) -> dict[str, Any]:
    """A win rate against base and answers, with an example of each verdict."""
    draw = random.Random(label)

    def against(wins: float, losses: float, invalid: int, p: float) -> dict[str, Any]:
        won, lost = round(questions * wins), round(questions * losses)
        rate = (won + (questions - won - lost - invalid) / 2) / (questions - invalid)
        return {
            "wins": won,
            "losses": lost,
            "ties": questions - won - lost - invalid,
            "invalid": invalid,
            "unanswered": 1,
            "identical": 0,
            "win_rate": rate,
            "interval": [rate - 0.11, rate + 0.1],
            "p_value": p,
            "test": "exact sign test, two-sided, over wins and losses",
            "first_rate": 0.58,
            "position_bias": {"value": 0.08, "interval": [-0.01, 0.16], "rate": 0.58, "picks": 67},
            "length_bias": {"value": 0.14, "interval": [0.05, 0.22], "rate": 0.64, "picks": 64},
            "order_agreement": 0.71,
            "winner": "DPO" if won > lost else "Base" if lost > won else "Both",
        }

    dialogue = (
        "\n\nHuman: How do I plant a tree?\n\nAssistant: With a spade. {}\n\nHuman: And when?\n\nAssistant:"
    )
    examples = [
        {
            "question": dialogue.format(evil * (8 if not number else 1)),
            "dpo": f" In autumn. {evil}" + " Then water it." * number * 9,
            "other": f" {evil} Whenever you like.",
            "against": draw.choice(("base", "answers")),
            "verdict": ("win", "loss", "tie", "invalid")[number % 4],
            "orders": [["win", "win"], ["loss", "loss"], ["win", "loss"], ["tie", "invalid"]][number % 4],
        }
        for number, evil in enumerate(("Dig. ", "", "Осенью. ", *(HOSTILE if hostile else ())))
    ]
    return {
        "kind": "win_rate",
        "label": label,
        "model": {"base": "gpt2", "adapter": "runs/hh_rlhf/dpo"},
        "judge": {
            "class": "GGUFJudge",
            "model": "llama-2-7b-chat.Q4_K_M.gguf",
            "prompt": "configs/judges/helpful.txt",
        },
        "questions": questions,
        "against": {"base": against(0.55, 0.2, 2, 0.0004), "answers": against(0.1, 0.6, 3, 0.012)},
        "examples": examples,
        "verdicts": "runs/hh_rlhf/dpo/verdicts",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": "4" * 40,
    }


def write_reward_curves(folder: Path, steps: int, end: float, loss: float) -> None:
    """`reward/*` as the callback writes it: at the start, now and then, at the end."""
    with SummaryWriter(str(folder)) as writer:
        for step in range(0, steps + 1, steps // 8):
            share = 1 - math.exp(-3 * step / steps)
            mean = 0.3 + (end - 0.3) * share
            values = {
                "mean": mean,
                "low": mean - 0.2,
                "high": mean + 0.2,
                "entropy": 3.4 * (1 - loss * share),
            }
            values |= {
                "kl": 9 * end * share,
                "self_similarity": 0.21 * (1 + loss * share),
                "length": 44 + step / 50,
            }
            values |= {"second": mean / 2}
            values |= {f"distinct_{n}": (0.11, 0.48, 0.8)[n - 1] * (1 - loss * share / n) for n in (1, 2, 3)}
            for name, value in values.items():
                writer.add_scalar(f"reward/{name}", value, step)


def write_imdb(root: Path, steps: int = 80, hostile: bool = True) -> Path:
    """The stages of the imdb recipe: pairs and training with prompts, and both without."""
    for stage, label, end, loss in (
        ("dpo", "DPO", 2.1, 0.05),
        ("dpo_without", "DPO without prompts", 0.9, 0.31),
    ):
        folder = root / stage
        folder.mkdir(parents=True)
        folder.joinpath("manifest.json").write_text(json.dumps(manifest(steps, 127.4, True)))
        write_curves(folder, steps, True)
        write_reward_curves(folder, steps, end, loss)
        made = reward(label, end, loss, str(folder / "checkpoints"), hostile)
        folder.joinpath("reward.json").write_text(json.dumps(made))
        rows = [
            {"step": step, "prompt": PROMPTS[0], "policy": f" {text(random.Random(step), step > 9, 4)}"}
            for step in range(0, steps + 1, steps // 4)
        ]
        if stage == "dpo":
            write_lines(folder / "samples.jsonl", rows)
            continue
        # The other run has only the callback's evaluations.
        evaluations = [
            {"step": row["step"], "examples": [{"prompt": row["prompt"], "completion": row["policy"]}]}
            for row in rows
        ]
        write_lines(folder / "reward_evaluations.jsonl", evaluations)
    (root / "base").mkdir()
    base = reward("Before training", 0.3, 0.0, None, hostile)
    (root / "base" / "reward.json").write_text(json.dumps(base))
    write_pairs(root / "pairs", hostile=hostile)
    write_pairs(root / "pairs_without", 40, hostile=hostile)
    (root / "generator").mkdir()
    scratch = {
        "kind": "scratch",
        "architecture": "GPT2LMHeadModel",
        "parameters": 1_204_480,
        "figures": {"loss": 3.21},
    }
    (root / "generator" / "scratch.json").write_text(json.dumps(scratch))
    return root


def write_hh(root: Path, steps: int = 80, hostile: bool = True) -> Path:
    """The stages of the hh_rlhf recipe: training, and the win rate in its folder."""
    folder = root / "dpo"
    folder.mkdir(parents=True)
    folder.joinpath("manifest.json").write_text(json.dumps(manifest(steps, 127.4, True)))
    write_curves(folder, steps, True)
    folder.joinpath("win_rate.json").write_text(json.dumps(win_rate("DPO", hostile=hostile)))
    return root
