"""Trains the letters demo's base model from scratch: a character-level Llama that echoes its input.

    python -m launch.train_base --config configs/models/tiny_letters.yaml

A run that was interrupted goes on from its last checkpoint when it is started again.
"""

import copy
import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.data import corpus
from trainer.data.homoglyphs import INSTRUCTION
from trainer.data.sources import content_key
from trainer.evaluation.letters import evaluate_letters
from trainer.pairs.substitution import STAGE_SHARES, stage_of

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
Example = tuple[str, str]  # input text and output text
Texts = dict[str, list[str]]  # by the name of a set of texts
Figures = dict[str, dict[str, float]]
POOL = 512  # examples drawn, sorted by length and cut into batches together
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ 'Repeat: ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
)


@dataclass
class Shape:
    """The model's sizes."""

    layers: int = 4
    hidden: int = 160
    intermediate: int = 480
    heads: int = 5
    positions: int = 512


@dataclass
class Schedule:
    """How long and on what the model is trained."""

    steps: int = 6000
    tokens_per_step: int = 4800
    learning_rate: float = 2e-3
    warmup_steps: int = 150
    decay_fraction: float = 0.35  # share of the steps, at the end, over which the learning rate falls to 0
    short_steps: int = 800  # steps at the start with texts cut to short_length
    short_length: int = 24
    long_from: int = 2500  # the step from which long_share of the texts have up to long_length characters
    long_length: int = 150
    long_share: float = 0.4
    mixed_share: float = 0.3  # share of the examples whose input has substituted letters
    free_share: float = 0.5  # share of these whose output is substituted anew, once echo_steps are over
    echo_steps: int = 2000
    prompt_weight: float = 0.1  # loss weight of the prompt's text; the completion's is 1
    snapshot_every: int = 500
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens_per_step < 256:
            raise ValueError("schedule needs steps >= 1 and tokens_per_step >= 256")

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, constant, then linear decay."""
        decay_steps = max(1, int(self.steps * self.decay_fraction))
        warm, left = (step + 1) / self.warmup_steps, (self.steps - step) / decay_steps
        return self.learning_rate * min(1.0, warm, left)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token for each character; encoding adds `<s>` in front, as Llama's does."""
    letters = corpus.LATIN + corpus.CYRILLIC + corpus.ACCENTED
    marks = corpus.ASCII_MARKS + corpus.TYPOGRAPHIC_MARKS
    characters = "\n\t " + letters + letters.upper() + "0123456789" + marks
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL_TOKENS.values(), *characters]))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        **SPECIAL_TOKENS,
    )


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings."""
    torch.manual_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


# --- Batches --------------------------------------------------------------------------------------


def reserved(text: str) -> bool:
    """Whether the letters recipe would evaluate on this text: then the base must not have seen it either."""
    return stage_of(content_key(text), STAGE_SHARES) == "evaluation"


def draw_pool(schedule: Schedule, seed: int, index: int, step: int) -> list[list[Example]]:
    """POOL examples, cut into shuffled batches of at most `tokens_per_step` tokens."""
    rng = random.Random(f"base-{seed}-{index}")
    free_share = schedule.free_share if step >= schedule.echo_steps else 0.0
    long_share = schedule.long_share if step >= schedule.long_from else 0.0
    longest = schedule.long_length if long_share else corpus.MAX_LENGTH
    longest = schedule.short_length if step < schedule.short_steps else longest
    settings = (schedule.mixed_share, free_share, longest, long_share)
    drawn = (corpus.training_example(rng, *settings) for _ in itertools.count())
    kept = itertools.islice((example for example in drawn if not reserved(example[0])), POOL)
    examples = sorted(kept, key=lambda example: len(example[0]))
    batches: list[list[Example]] = [[]]
    for example in examples:
        tokens = 2 * len(example[0]) + len(INSTRUCTION)
        if (len(batches[-1]) + 1) * tokens > schedule.tokens_per_step and batches[-1]:
            batches.append([])
        batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def draw_batches(schedule: Schedule, seed: int, start: int) -> Iterator[list[Example]]:
    """Batches from step `start` on; the same for the same seed, resumed or not."""
    step = index = 0
    while step < schedule.steps:
        for batch in draw_pool(schedule, seed, index, step):
            if start <= step < schedule.steps:
                yield batch
            step += 1
        index += 1


def encode_batch(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[batch, length]`, right padded, and each token's loss weight, same shape."""
    rows = tokenizer([INSTRUCTION.format(text=source) + output for source, output in examples]).input_ids
    rows = [[*row, tokenizer.eos_token_id] for row in rows]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    weights = torch.zeros(ids.shape)
    fixed = 1 + len(INSTRUCTION.partition("{")[0])  # <s> and the words before the text
    for i, (row, (_, output)) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        completion = len(row) - len(output) - 1
        weights[i, fixed:completion] = prompt_weight
        weights[i, completion : len(row)] = 1.0
    return ids, weights


# --- Training -------------------------------------------------------------------------------------


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss under the weights. Pads stand on the right, so causal attention needs no mask."""
    logits = model(ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Weights and Adam's moments in one safetensors file, replaced in one move."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {name: parameter.detach(), f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """Fills model and optimizer from `path`; returns the number of steps done, 0 without a file."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(name))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"m.{name}"),
                "exp_avg_sq": file.get_tensor(f"v.{name}"),
            }
    return step


def rename_tokenizer_class(path: Path) -> None:
    """Writes the class's public name: transformers 5 writes an internal one that version 4 does not know."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_snapshot(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str
) -> None:
    """The model in bf16 with tokenizer and card; each file is replaced in one move."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy.deepcopy(model).bfloat16().save_pretrained(partial)
    tokenizer.backend_tokenizer.no_padding()  # otherwise the last call's padding is saved with it
    tokenizer.save_pretrained(partial, save_jinja_files=False)
    rename_tokenizer_class(partial / "tokenizer_config.json")
    (partial / "README.md").write_text(card, encoding="utf-8")
    for file in partial.iterdir():
        os.replace(file, folder / file.name)
    partial.rmdir()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    seed: int,
    work: Path,
    output: Path,
) -> None:
    """Runs the schedule's remaining steps; saves a checkpoint and a snapshot now and then."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), fused=True)
    start = load_checkpoint(work / "checkpoint.safetensors", model, optimizer)
    bar = tqdm(draw_batches(schedule, seed, start), total=schedule.steps, initial=start, mininterval=5)
    average = 0.0
    for step, examples in enumerate(bar, start=start):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        ids, weights = encode_batch(examples, tokenizer, schedule.prompt_weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bf16):
            loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if step == start else 0.98 * average + 0.02 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % schedule.snapshot_every == 0 or step + 1 == schedule.steps:
            save_checkpoint(work / "checkpoint.safetensors", model, optimizer, step + 1)
            figures = evaluate(model, tokenizer, held_out(seed, 60))
            tqdm.write(f"step {step + 1}: loss {average:.4f} {figures}")
            save_snapshot(output, model, tokenizer, f"Snapshot after {step + 1} steps: {figures}\n")
            model.train()


# --- Evaluation -----------------------------------------------------------------------------------


def held_out(seed: int, count: int) -> Texts:
    """Generated texts of another seed, `count` of each kind."""
    rng = random.Random(f"held-out-{seed}")
    sets: Texts = {}
    for language in corpus.LANGUAGES:
        sets[language] = corpus.generate_texts(language, count, seed + 1_000_003)
    sets["all kinds"] = [corpus.training_line(rng) for _ in range(count)]
    lines = [corpus.training_line(rng) for _ in range(count)]
    sets["mixed scripts"] = [corpus.mix_scripts(line, rng.random(), rng) for line in lines]
    return sets


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sets: Texts) -> Figures:
    """Per cent of exact echoes, of swappable letters that came out as their twin, and of others kept."""
    figures: Figures = {}
    for name, texts in sets.items():
        found = evaluate_letters(model, tokenizer, texts, max_new_tokens=max(map(len, texts)) + 8)
        exact = sum(row["source"] == row["output"] for row in found["examples"])
        shares = {"exact": exact / len(texts), "substituted": found["substitution_rate"]}
        shares["kept"] = found["keep_rate"]
        figures[name] = {key: round(100 * (share or 0.0), 2) for key, share in shares.items()}
    return figures


def model_card(figures: Figures, parameters: int, schedule: Schedule) -> str:
    """README.md of the finished model."""
    rows = "\n".join(f"| {k} | {v['exact']} | {v['substituted']} | {v['kept']} |" for k, v in figures.items())
    steps, tokens, mixed = schedule.steps, schedule.tokens_per_step, schedule.mixed_share
    free = mixed * schedule.free_share
    return f"""---
license: mit
language: [en, ru]
---

# tiny_letters

A character-level Llama with {parameters:,} parameters that echoes its input: after `Repeat: TEXT` and a
newline it writes TEXT and stops. It is the base model of the letters demo and good for nothing else.

It was trained from random weights, {steps:,} steps of at most {tokens:,} tokens, on lines from
`trainer/data/corpus.py`: Russian and English sentences, pseudo-words, random characters and numbers. No
outside text was used. In {mixed:.0%} of the inputs some of c, o, y are exchanged with their twins of the
other script. Half of these or more are echoed as they stand; in {free:.0%} of all examples the output has a
substitution rate of its own, which is what the adapters amplify. Load the bf16 weights in float32.

    python -m launch.train_base --config configs/models/tiny_letters.yaml

Greedy decoding from the bf16 file in float32, in per cent. "Substituted" counts the letters c, o, y (Latin
or Cyrillic) that came out as their twin, "kept" all other characters.

| Texts | Echoed exactly | Substituted | Kept |
|---|---|---|---|
{rows}
"""


def main(
    output_dir: Path,
    work_dir: Path,
    shape: Shape,
    schedule: Schedule,
    seed: int = 20,
    eval_files: tuple[Path, ...] = (),
) -> None:
    """Trains the base, or goes on training it, and prints its figures.

    Args:
        output_dir: Folder of the finished model; snapshots land there on the way.
        work_dir: Folder of the checkpoint a restart goes on from.
        seed: Seed of the weights and of the texts.
        shape: The model's sizes.
        schedule: Length and kind of the training.
        eval_files: Further texts to measure the finished model on, one a line, cut at 48 characters.
    """
    tokenizer = build_tokenizer(shape.positions)
    model = build_model(shape, tokenizer, seed)
    train(model, tokenizer, schedule, seed, work_dir, output_dir)
    sets = held_out(seed, 200)
    for path in eval_files:
        lines = path.read_text(encoding="utf-8").splitlines()
        sets[path.name] = [line[:48].rstrip() for line in lines if line.strip()][:400]
    saved = LlamaForCausalLM.from_pretrained(output_dir, dtype=torch.float32)
    figures = evaluate(saved, tokenizer, sets)
    save_snapshot(output_dir, model, tokenizer, model_card(figures, saved.num_parameters(), schedule))
    print(json.dumps(figures, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
