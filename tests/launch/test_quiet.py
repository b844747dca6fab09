"""What libraries say without need is not said; what matters is."""

from __future__ import annotations

import logging

import torch
from transformers import AutoModelForCausalLM

from launch.quiet import quiet


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_padding_that_needs_no_mask_is_not_warned_of(tiny_llama) -> None:
    quiet()
    model, heard = AutoModelForCausalLM.from_pretrained(tiny_llama), _Heard()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(heard)
    try:
        type(logger).warning_once.cache_clear()
        model.warn_if_padding_and_no_attention_mask(torch.tensor([[5, 6, model.config.pad_token_id]]), None)
        logger.warning("a warning that matters")
    finally:
        logger.removeHandler(heard)
    assert heard.lines == ["a warning that matters"]
