"""What ZeRO-3 refuses before any rank starts."""

from __future__ import annotations

import lightning as L
import pytest

from trainer.schema import UserError
from trainer.strategy import Zero3, refuse_adafactor, refuse_hpz


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"zero3.hpz_partition_size: 0 is below 1"):
        Zero3(hpz_partition_size=0)
    with pytest.raises(UserError, match=r"zero3.timeout: -1 is below 0"):
        Zero3(timeout=-1)
    with pytest.raises(UserError, match=r"zero3.config: stage is 3 here"):
        Zero3(config={"stage": 2})
    with pytest.raises(UserError, match=r"trainer.precision: bf16-mixed is not possible with zero3"):
        L.Trainer(strategy=Zero3(), precision="bf16-mixed", accelerator="cpu", devices=1, logger=False)


@pytest.mark.parametrize(("size", "ranks"), [(8, 4), (3, 4), (2, 1)])
def test_second_copies_are_spread_over_a_node(size, ranks):
    with pytest.raises(
        UserError, match=f"hpz_partition_size: {size} does not divide the {ranks} ranks of a node"
    ):
        refuse_hpz(size, ranks)
    refuse_hpz(1, ranks)
    refuse_hpz(ranks, ranks)


def test_adafactor_needs_whole_tensors():
    with pytest.raises(UserError, match=r"optimizer.name: adafactor needs whole tensors"):
        refuse_adafactor(True)
    refuse_adafactor(False)
