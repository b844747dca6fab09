"""Two gloo ranks under DDP see the numbers of one device: losses, gradients, validation."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import run

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("task", "reference"), [("dpo", "sharded"), ("dpo+nll", "shared"), ("sft", None)])
def test_ddp_and_accumulation_equal_one_device(tiny_llama, tmp_path, task, reference) -> None:
    """20 examples in steps of 8, so that the last step leaves ranks uneven, with rows of unequal length."""
    common = {"base": str(tiny_llama), "task": task, "reference": reference}
    one = run(tmp_path, **common, devices=1, strategy="auto", accumulate=1)
    two = run(tmp_path, **common, devices=2, strategy="ddp", accumulate=2)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["validation"] == pytest.approx(one["validation"], abs=1e-5)
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(torch.tensor(a[name]), torch.tensor(b[name]), atol=1e-5, rtol=1e-4)
