"""A recipe's folder as a demo leaves it: real TensorBoard events, manifests, evaluations and samples."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from trainer.data.corpus import generate_texts
from trainer.data.homoglyphs import SWAP, mark
from trainer.evaluation.letters import summarize
from trainer.evaluation.published_letters import PUBLISHED


def answer(source: str, swapped: float, lost: float) -> str:
    """What a model that swaps and loses these shares might answer; the same at every call."""
    output = ""
    for place, char in enumerate(source):
        draw = ((place + 1) * 7919 + len(source) * 104729) % 997 / 997
        if char in SWAP:
            output += SWAP[char] if draw < swapped else char
        elif draw > lost or char == " ":
            output += char
    return output


def evaluation(
    label: str, texts: list[str], swapped: float, lost: float, cut: int | None = 48
) -> dict[str, Any]:
    def scored(sources: list[str], **settings: Any) -> dict[str, Any]:
        pairs = [(source, answer(source, swapped, lost)) for source in sources]
        examples = [{"source": source, "output": output} for source, output in pairs]
        return summarize(pairs, **settings) | {"examples": examples}

    found = scored([text[:cut] for text in texts])
    found |= {"label": label, "settings": {"cut": cut, "decoding": "greedy"}, "whole_lines": scored(texts)}
    found |= {"capitals": scored([text[:cut] for text in texts], capitals=True)}
    found |= {"published": scored([row.source for row in PUBLISHED])}
    return found


def manifest(steps: int, seconds: float, preference: bool) -> dict[str, Any]:
    model: dict[str, Any] = {
        "module": "PreferenceModule" if preference else "SupervisedModule",
        "policy": {
            "base": "configs/models/tiny_letters",
            "start": "runs/letters/sft/checkpoints/best" if preference else None,
            "adapter": {"kind": "ia3", "preset": "peft"},
            "fingerprint": {"base": "ab" * 32},
        },
        "optimizer": {"name": "adamw", "lr": 0.005, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        "schedule": {"name": "linear", "warmup_steps": 20},
        "parameters": {"trained": 3200, "total": 1_376_160},
    }
    if preference:
        model["objective"] = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "nll_weight": 1.0}
        model["reference"] = {"kind": "shared", "adapter": "start"}
    return {
        "status": "finished",
        "error": None,
        "started": f"2026-01-02T10:0{int(preference)}:00+00:00",
        "git": "1" * 40,
        "code": "9" * 64,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hostname": "laptop",
        "cpus": 2,
        "accelerator": "CPUAccelerator",
        "precision": "32-true",
        "world_size": 1,
        "accumulate_grad_batches": 1,
        "seed": "0",
        "model": model,
        "data": {
            "batch_size": 16,
            "counts": {
                "train": {"rows": 4000, "kept": 3200, "kept_ru": 1600, "kept_en": 1600, "dropped_blank": 14},
                "validation": {"rows": 4000, "kept": 160},
            },
            "hashes": {"generated": "cd" * 32},
        },
        "reference": {"before": "ef" * 32, "after": "ef" * 32}
        if preference
        else {"before": None, "after": None},
        "step": steps,
        "epoch": 2,
        "seconds": seconds,
        "seconds_total": seconds,
        "callbacks": {
            "Throughput": {"tokens_per_second": 10432.1, "peak_rss_gb": 1.21},
            "ImprovedLossCheckpoint": {
                "best": 0.0312,
                "monitor": "val/loss",
                "best_checkpoint": f"step-{steps:08d}",
            },
        },
    }


def write_curves(folder: Path, steps: int, preference: bool) -> None:
    with SummaryWriter(str(folder)) as writer:
        for step in range(1, steps + 1):
            wave = math.sin(step * 1.7) * 0.05 + math.sin(step * 0.61) * 0.04
            fall = math.exp(-step / (steps / 5))
            values = {"loss": (0.69 if preference else 0.4) * fall + 0.03 + abs(wave) * (fall + 0.2)}
            if preference:
                values |= {
                    "rewards/accuracies": 1 - 0.5 * fall - abs(wave) / 3,
                    "rewards/margins": 9 * (1 - fall) + wave * 8,
                }
                values |= {
                    "logps/chosen": -42 + 30 * (1 - fall) + 20 * wave,
                    "logps/rejected": -6 - 80 * (1 - fall),
                }
            for name, value in values.items():
                writer.add_scalar(f"train/{name}", value, step)
                if step % (steps // 8) == 0:
                    writer.add_scalar(f"val/{name}", value * 0.98, step)


def write_samples(folder: Path, steps: int) -> None:
    rows = []
    for step in range(0, steps + 1, steps // 8):
        for prompt in (PUBLISHED[3].source, PUBLISHED[0].source):
            output = answer(prompt, step / steps, 0.03)
            rows.append(
                {
                    "step": step,
                    "epoch": 0,
                    "prompt": prompt,
                    "policy": output,
                    "policy_marked": mark(prompt, output),
                }
            )
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    folder.joinpath("samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_recipe(root: Path, sentences: int = 16, steps: int = 160) -> Path:
    """A recipe's folder with the stages base, sft, sft_long and dpo."""
    texts = [*generate_texts("ru", sentences // 2, 5), *generate_texts("en", sentences // 2, 5)]
    for stage, label, swapped, lost in (
        ("base", "Before training", 0.0, 0.002),
        ("sft", "SFT", 0.41, 0.01),
        ("sft_long", "SFT, same total steps", 0.72, 0.012),
        ("dpo", "DPO", 0.98, 0.014),
    ):
        folder = root / stage
        folder.mkdir(parents=True)
        folder.joinpath("evaluation.json").write_text(json.dumps(evaluation(label, texts, swapped, lost)))
        if stage != "base":
            folder.joinpath("manifest.json").write_text(json.dumps(manifest(steps, 127.4, stage == "dpo")))
            write_curves(folder, steps, stage == "dpo")
            write_samples(folder, steps)
    return root


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("runs") / "letters")
