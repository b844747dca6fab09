"""The one forward: hidden states of the rows, the head on completion positions only, sums in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn

from trainer.data.layout import spread
from trainer.policy import attention
from trainer.policy.head import head_logps
from trainer.schema import PairLogps, PreferenceBatch, Rows

# What some families do to their logits after the head; where a config sets one of these we let the model do it.
_SCALED_LOGITS = ("logit_scale", "logits_scaling", "lm_head_multiplier")

MASKED_ROW = 512
"""Tokens of a row where attention needs masks of whole rows: their cost grows with the square."""


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model (its adapter layers stay in place), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def completion_token_logps(model: nn.Module, rows: Rows) -> Float[Tensor, " scored"]:
    """log p(token | what stands before it) in float32 (nats) for each scored token of the rows.

    The body runs over the whole rows; the head, the widest matrix of a small model, in chunks and over
    `rows.scored_positions` only.
    """
    causal_lm = unwrap(model)
    if rows.segments is not None and causal_lm.config._attn_implementation != attention.NAME:
        rows = spread(rows, MASKED_ROW)
    inputs = {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "use_cache": False,
        **attention.inputs(causal_lm.config, rows),
    }
    if any(getattr(causal_lm.config, name, None) not in (None, 1, 1.0) for name in _SCALED_LOGITS):
        logits = causal_lm(**inputs).logits.flatten(0, 1)[rows.scored_positions]
        return -F.cross_entropy(logits.float(), rows.scored_tokens, reduction="none")
    hidden = causal_lm.base_model(**inputs).last_hidden_state
    scored = hidden.flatten(0, 1).index_select(0, rows.scored_positions)
    cap = getattr(causal_lm.config, "final_logit_softcapping", None)
    return head_logps(causal_lm.get_output_embeddings(), scored, rows.scored_tokens, cap)


def completion_logps(
    model: nn.Module, rows: Rows
) -> tuple[Float[Tensor, " sequence"], Int[Tensor, " sequence"]]:
    """For each completion: the *sum* of its tokens' log-probabilities (nats, float32), and their number."""
    each = completion_token_logps(model, rows)
    sums = each.new_zeros(rows.sequences).index_add(0, rows.scored_sequence, each)
    return sums, torch.bincount(rows.scored_sequence, minlength=rows.sequences)


def pair_logps(model: nn.Module, batch: PreferenceBatch) -> PairLogps:
    """Chosen and rejected completions' log-probabilities from one concatenated forward."""
    sums, tokens = completion_logps(model, batch.rows)
    chosen, rejected = sums.split(batch.pairs)
    chosen_tokens, rejected_tokens = tokens.split(batch.pairs)
    return PairLogps(chosen, rejected, chosen_tokens, rejected_tokens)
