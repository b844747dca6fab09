"""A callback that makes steps take their time, each rank its own."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import lightning as L


class Jitter(L.Callback):
    """Sleeps 0 to 2 x JITTER seconds (environment; 0 without it) at each batch; training's own draws are untouched."""

    def __init__(self) -> None:
        self.mean, self.random = float(os.environ.get("JITTER", "0")), random.Random(os.getpid())

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(self.random.uniform(0, 2 * self.mean))
