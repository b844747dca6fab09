"""The same run on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.module.records import Records, fit, preferences
from trainer.data.datamodule import PreferenceData
from trainer.module import PreferenceModule
from trainer.objectives import ObjectiveConfig
from trainer.optimization import OptimizerConfig
from trainer.policy.load import PolicyConfig
from trainer.policy.reference import ReferenceConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("reference", ["shared", "sharded"])
def test_losses_equal_the_cpus(tiny_llama, tmp_path, reference) -> None:
    losses = []
    for accelerator in ("cpu", "gpu"):
        module = PreferenceModule(
            PolicyConfig(str(tiny_llama)),
            ObjectiveConfig(nll_weight=1.0),
            ReferenceConfig(kind=reference),
            OptimizerConfig(name="sgd", lr=0.1),
        )
        data = PreferenceData(Records(preferences(20)), batch_size=4)
        losses.append(fit(module, data, tmp_path, accelerator=accelerator, devices=1).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
