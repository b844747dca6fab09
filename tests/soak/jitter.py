"""Steps of uneven length on each rank, as a shared machine has them."""

from __future__ import annotations

import os
import random
import time

import lightning as L


class Jitter(L.Callback):
    """Sleeps up to `seconds` around every micro-batch; draws from no generator that training uses."""

    def __init__(self, seconds: float = 0.06) -> None:
        self.seconds, self.random = seconds, random.Random(os.urandom(8))

    def on_train_batch_start(self, *args) -> None:
        time.sleep(self.random.uniform(0, self.seconds))

    def on_train_batch_end(self, *args) -> None:
        time.sleep(self.random.uniform(0, self.seconds / 2))

    def on_validation_batch_start(self, *args) -> None:
        time.sleep(self.random.uniform(0, self.seconds))
