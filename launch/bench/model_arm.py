"""Makes the model that all arms train, in a process of its own: the one that measures holds no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launch.bench.arm import Job
from launch.bench.flops import layer_weights
from launch.bench.models import Shape, make_model
from launch.quiet import quiet


def run(job: Job) -> dict[str, Any]:
    """Write the model of `settings` (a `Shape`) into `model`; returns the weights of its layers' matrices."""
    quiet()
    make_model(Shape(**job.settings), job.dtype, Path(job.model))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    return {"layer_weights": layer_weights(model)}
