"""How a step's examples fall into rows and forwards changes nothing: losses, gradients, weights, steps."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig

from tests.conftest import FAMILIES
from tests.module.records import History, Records, demonstrations, fit, preferences
from tests.module.test_resume import SaveAt, _Cut
from tests.tiny_models import byte_tokenizer
from trainer.checkpoint import PortableCheckpointIO
from trainer.data.datamodule import PreferenceData, SupervisedData
from trainer.module import PreferenceModule, SupervisedModule
from trainer.objectives import ObjectiveConfig
from trainer.optimization import OptimizerConfig
from trainer.policy.load import AdapterConfig, PolicyConfig
from trainer.schema import Preference, UserError

SGD = OptimizerConfig(name="sgd", lr=0.5)
PAIRS = [*preferences(40), *preferences(6, seed=3, longest=120)]


def run(base: Path, folder: Path, task: str = "dpo", adapter: AdapterConfig | None = None, **data) -> History:
    """30 steps of 8 examples; SGD hides no scale."""
    policy = PolicyConfig(str(base), adapter or AdapterConfig())
    settings = {"batch_size": 8, **data}
    if task == "sft":
        module = SupervisedModule(policy, SGD)
        loaded = SupervisedData(Records([*demonstrations(40), *demonstrations(6, 3, 120)]), **settings)
    else:
        module = PreferenceModule(policy, ObjectiveConfig(nll_weight=0.5), optimizer=SGD)
        loaded = PreferenceData(Records(PAIRS), **settings)
    return fit(module, loaded, folder, max_steps=30, max_epochs=-1)


def assert_same(one: History, other: History) -> None:
    assert len(one.steps) == len(other.steps) == 30
    for a, b in zip(one.steps, other.steps, strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    for a, b in zip(one.gradients, other.gradients, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)
    for name, values in one.trained.items():
        assert values == pytest.approx(other.trained[name], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_thirty_steps_are_those_of_padded_rows(models, tmp_path, family: str) -> None:
    padded = run(models(family), tmp_path, layout="concatenated", token_budget=None)
    assert_same(run(models(family), tmp_path, token_budget=None), padded)
    assert_same(run(models(family), tmp_path, token_budget=300), padded)


def test_demonstrations_too(tiny_llama, tmp_path) -> None:
    padded = run(tiny_llama, tmp_path, "sft", layout="concatenated", token_budget=None)
    assert_same(run(tiny_llama, tmp_path, "sft", token_budget=200), padded)


class Forwards:
    """Tokens of each forward that a run made."""

    def __init__(self, monkeypatch) -> None:
        self.tokens: list[int] = []
        before = PreferenceModule.losses

        def losses(module, batch):
            self.tokens.append(batch.rows.input_ids.numel())
            return before(module, batch)

        monkeypatch.setattr(PreferenceModule, "losses", losses)


@pytest.mark.parametrize("layout", ["prefix_shared", "concatenated"])
@pytest.mark.parametrize("budget", [200, 400])
def test_forwards_keep_within_the_budget(tiny_llama, tmp_path, monkeypatch, layout, budget) -> None:
    records = preferences(64)
    longest = max(2 * (4 + len(r.prompt) + len(r.chosen) + len(r.rejected)) for r in records)
    assert longest < 200
    seen = Forwards(monkeypatch)
    module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
    data = PreferenceData(Records(records), batch_size=16, token_budget=budget, layout=layout)
    history = fit(module, data, tmp_path, max_steps=-1, max_epochs=2)
    assert max(seen.tokens) <= budget
    assert len(history.steps) == 8
    assert len(seen.tokens) % 8 == 0


def test_what_the_trainer_counts_in_forwards_keeps_its_meaning_in_steps(tiny_llama, tmp_path) -> None:
    """Validation every 2 steps and 6 steps an epoch, whatever the budget."""
    found = []
    for budget in (None, 150):
        validated = []

        class Watch(History):
            def on_validation_end(self, trainer, pl_module, seen=validated) -> None:
                seen.append((trainer.global_step, trainer.callback_metrics["val/loss"].item()))

        watch = Watch()
        data = PreferenceData(Records(preferences(64), preferences(20, 1)), batch_size=8, token_budget=budget)
        module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
        history = fit(
            module, data, tmp_path, max_steps=-1, max_epochs=2, accumulate_grad_batches=2, callbacks=[watch],
            val_check_interval=4, limit_train_batches=12, limit_val_batches=2,
        )  # fmt: skip
        found.append(([step["loss"] for step in history.steps], validated))
    (losses, validated), (others, again) = found
    assert len(losses) == 12
    assert others == pytest.approx(losses, abs=1e-5)
    assert [step for step, _ in validated] == [step for step, _ in again] == [2, 4, 6, 8, 10, 12]
    assert [loss for _, loss in again] == pytest.approx([loss for _, loss in validated], abs=1e-5)


@pytest.mark.parametrize("cut", [3, 8, 11])
def test_resumes_in_the_same_place_with_another_budget(tiny_llama, tmp_path, cut: int) -> None:
    """Cut within the first epoch of 8 steps, at its end, and within the second; the parts of a step change."""

    def part(budget: int | None, callbacks: list, resume: str | None = None) -> History:
        module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
        data = PreferenceData(Records(preferences(62)), batch_size=8, token_budget=budget)
        history = History()
        with contextlib.suppress(_Cut):
            fit(
                module, data, tmp_path, resume, max_steps=-1, max_epochs=2, callbacks=[history, *callbacks],
                plugins=[PortableCheckpointIO()],
            )  # fmt: skip
        return history

    whole = part(None, [])
    first = part(250, [SaveAt(tmp_path, {cut}, stop=True)])
    rest = part(120, [], str(tmp_path / f"step-{cut:08d}"))
    assert first.losses + rest.losses == pytest.approx(whole.losses, abs=1e-5)
    assert len(whole.losses) == 16


@pytest.mark.parametrize("fraction", [0.25, 0.4])
def test_a_fraction_of_an_epoch_never_ends_within_a_step(tiny_llama, tmp_path, fraction: float) -> None:
    """Saved in a validation at a fraction of an epoch, and resumed: the steps are those of the whole run."""

    class Save(L.Callback):
        def __init__(self, at: int) -> None:
            self.at, self.seen = at, []

        def on_validation_end(self, trainer, pl_module) -> None:
            self.seen.append(trainer.global_step)
            if len(self.seen) == self.at:
                trainer.save_checkpoint(tmp_path / "middle")
                raise _Cut

    def part(at: int, resume: str | None = None) -> tuple[History, list[int]]:
        module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
        data = PreferenceData(Records(preferences(50), preferences(4, 1)), batch_size=8, token_budget=120)
        history, save = History(), Save(at)
        with contextlib.suppress(_Cut):
            fit(
                module, data, tmp_path, resume, max_steps=-1, max_epochs=2, callbacks=[history, save],
                plugins=[PortableCheckpointIO()], val_check_interval=fraction,
            )  # fmt: skip
        return history, save.seen

    whole, seen = part(-1)
    assert len(whole.losses) == 14
    every = int(7 * fraction)
    assert seen == [*range(every, 8, every), *range(7 + every, 15, every)]
    first, _ = part(2)
    rest, _ = part(-1, str(tmp_path / "middle"))
    assert len(first.losses) in (2 * every, 2 * every - 1)  # the hook of the step that was cut may come after
    assert whole.losses[-len(rest.losses) :] == pytest.approx(rest.losses, abs=1e-5)
    assert len(rest.losses) in (14 - 2 * every, 14 - 2 * every + 1)


@pytest.mark.parametrize("budget", [None, 150])
def test_limits_mean_steps_and_hold_for_every_trainer(tiny_llama, tmp_path, budget) -> None:
    data = PreferenceData(Records(preferences(40), preferences(20, 1)), batch_size=8, token_budget=budget)
    seen = []
    for _ in range(3):

        class Validated(L.Callback):
            examples = 0

            def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *rest) -> None:
                self.examples += len(batch.ids) if batch.share.example_weight else 0

        count = Validated()
        module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
        history = fit(
            module, data, tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=0.5, limit_val_batches=2,
            callbacks=[count],
        )  # fmt: skip
        seen.append((len(history.losses), count.examples))
    assert seen == [(2, 16)] * 3


def test_a_dry_run_takes_one_whole_step(tiny_llama, tmp_path) -> None:
    module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
    data = PreferenceData(Records(preferences(40)), batch_size=8, token_budget=120)
    assert len(fit(module, data, tmp_path, fast_dev_run=True).losses) == 1


def unsuitable(kind: str, folder: Path) -> Path:
    """A model whose layers cannot keep examples of one row apart."""
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = {
        "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **ids),
        "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ids),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "targets"),
    [pytest.param("mamba", ["x_proj"], marks=pytest.mark.slow), ("bloom", ["query_key_value"])],
)
def test_a_model_that_cannot_take_packed_rows_gets_padded_ones(tmp_path, caplog, kind, targets) -> None:
    base = unsuitable(kind, tmp_path / kind)
    adapter = AdapterConfig(kind="lora", r=2, targets=targets)
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        fallen = run(base, tmp_path, adapter=adapter)
    lines = [
        record.getMessage()
        for record in caplog.records
        if "several examples in one row" in record.getMessage()
    ]
    assert len(lines) == 1
    assert str(base) in lines[0]
    torch.manual_seed(0)
    padded = run(base, tmp_path, adapter=adapter, layout="concatenated", token_budget=None)
    assert fallen.losses == pytest.approx(padded.losses, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass_the_trial(models, tmp_path, family: str, caplog) -> None:
    module = PreferenceModule(PolicyConfig(str(models(family))))
    fit(module, PreferenceData(Records(preferences(4)), batch_size=2), tmp_path, max_steps=1)
    assert module.packed_rows.taken is True
    assert module.describe()["forward"] == {
        "packed_rows": True, "attention": "segments",
    }  # fmt: skip


EXTREMES = {
    "one token each": Preference("a", "b", "c", "1"),
    "18 turns": Preference(
        [{"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}"} for turn in range(17)],
        "yes", "no", "2",
    ),
    "longer than the budget": Preference("p" * 150, "c" * 60, "r" * 20, "3"),
    "no prompt, but a BOS": Preference("", "chosen", "rejected", "4"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(tiny_llama, tmp_path, name: str, caplog) -> None:
    records = [EXTREMES[name], *preferences(7)]
    found = []
    for settings in ({"token_budget": 64}, {"layout": "concatenated", "token_budget": None}):
        module = PreferenceModule(PolicyConfig(str(tiny_llama)), optimizer=SGD)
        data = PreferenceData(Records(records), batch_size=4, **settings)
        found.append(fit(module, data, tmp_path, max_steps=4, max_epochs=-1).losses)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    said = [record for record in caplog.records if "data.token_budget" in record.getMessage()]
    assert len(said) == (1 if name in ("longer than the budget", "18 turns") else 0)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.layout: 'packed' is not known; give prefix_shared or concatenated"
    ):
        PreferenceData(Records([]), layout="packed")
    with pytest.raises(UserError, match=r"data\.token_budget: -1 is below 1"):
        PreferenceData(Records([]), token_budget=-1)
