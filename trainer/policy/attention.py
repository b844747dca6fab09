"""Attention over packed rows, in which examples stand side by side and completions share their prompt.

One implementation, registered with transformers under `NAME`, for models that take theirs from its table. Rows without
segments go to PyTorch's `scaled_dot_product_attention`. Packed rows are computed segment by segment on a CPU, so that
no mask of a whole row is ever made, and by compiled FlexAttention on a GPU. Logit soft-capping and sliding windows are
applied where the model asks for them. Models that know nothing of the table get masks of short rows (`dense_masks`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer.data.layout import places
from trainer.policy.kernels import accelerated
from trainer.schema import Rows, Segment

NAME = "tandem"
"""The name of this implementation in transformers' tables."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "gemma3_text", "phi3", "cohere2")
"""Models whose layers tell their attention all that it has to know: windows, soft-capping (transformers 5.23)."""

# Up to so many tokens a segment's scores are one small matrix; longer ones are cut into blocks of queries that see
# only what stands before them. Measured on 2 cores: twice as fast as the fused kernel at 200 tokens, alike at 1,000.
_WHOLE = 256
_BLOCK = 256
_LONGEST_KEPT = 1024


class Packing:
    """Where the segments of packed rows stand; made once for each forward, and handed to every layer."""

    def __init__(self, rows: Rows) -> None:
        assert rows.segments is not None
        self.segments, self.rows = rows.segments, rows
        self._blocks: dict[int | None, Any] = {}
        self._made: dict[Hashable, Tensor] = {}

    def once(self, key: Hashable, made: Callable[[], Tensor]) -> Tensor:
        """What the layers share."""
        if key not in self._made:
            self._made[key] = made()
        return self._made[key]

    @torch.compiler.disable
    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """FlexAttention's mask, for a sliding window or none."""
        if window not in self._blocks:
            example, branch, position = (part.to(device, torch.int32) for part in places(self.rows))

            def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                own = (example[batch, query] == example[batch, key]) & (query >= key)
                open_to = (branch[batch, key] == 0) | (branch[batch, key] == branch[batch, query])
                if window is None:
                    return own & open_to
                return own & open_to & (position[batch, query] - position[batch, key] < window)

            rows, time = self.rows.input_ids.shape
            self._blocks[window] = create_block_mask(seen, rows, None, time, time, device=str(device))
        return self._blocks[window]


def attention(
    module: nn.Module,
    query: Float[Tensor, "row head time dim"],
    key: Float[Tensor, "row kv_head time dim"],
    value: Float[Tensor, "row kv_head time dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "row time head dim"], None]:
    """What transformers' models call in each layer.

    Raises:
        NotImplementedError: the model asks for more than this knows: biases, sinks, dropout in packed rows.
    """
    unknown = [name for name in ("position_bias", "s_aux", "cache") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if packing is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing is None:
        out = _masked(query, key, value, attention_mask, scaling, softcap)
        return out.transpose(1, 2).contiguous(), None
    if dropout:
        raise NotImplementedError("packed rows with dropout in the attention")
    packed = PackedAttention(packing, scaling, sliding_window, softcap)
    run = packed.by_segment if query.device.type == "cpu" else packed.flex
    out = run(query, key, value)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def is_plain(config: PretrainedConfig) -> bool:
    """Whether a model attends to everything before each token, without windows, chunks or soft-capping.

    Some families apply a window through the mask alone, which packed rows do not have.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    others = ("sliding_window", "attention_chunk_size", "attn_logit_softcapping")
    return kinds == {"full_attention"} and not any(getattr(config, name, None) for name in others)


def backend(implementation: str | None, device: torch.device) -> str:
    """What computes the attention of packed rows, for the manifest."""
    if implementation != NAME:
        return f"masks ({implementation or 'the model'}'s own attention)"
    return "segments" if device.type == "cpu" else "FlexAttention"


def inputs(config: PretrainedConfig, rows: Rows) -> dict[str, Any]:
    """What a model of this config is given so that it attends as the rows mean it: `attention_mask` and its like."""
    if rows.segments is None:
        return {"attention_mask": rows.attention_mask}
    if config._attn_implementation == NAME:
        # A mask of four dimensions is passed on as it is; without one transformers would guess from the positions.
        nothing = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=rows.input_ids.device)
        return {"attention_mask": nothing, "packing": Packing(rows)}
    return {"attention_mask": dense_masks(config, rows)}


def dense_masks(config: PretrainedConfig, rows: Rows) -> Tensor | dict[str, Tensor]:
    """Masks for models with their own attention: true where sdpa may look, or 0 and the least number for eager.

    One (row, 1, time, time), or one for each kind of layer where some have sliding windows.

    Raises:
        NotImplementedError: layers of a kind that is not known.
    """
    device = rows.input_ids.device
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    if {*kinds} - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of kinds {', '.join(sorted({*kinds}))}")
    if "sliding_attention" in kinds:
        return {
            "full_attention": _as_asked(config, seen(rows, None).to(device)),
            "sliding_attention": _as_asked(config, seen(rows, window).to(device)),
        }
    window = window if not kinds and getattr(config, "use_sliding_window", True) else None
    return _as_asked(config, seen(rows, window).to(device))


def seen(rows: Rows, window: int | None) -> Bool[Tensor, "row 1 time time"]:
    """Which columns (last) each column's token sees: its own example before it, and no other completion."""
    example, branch, position = (part.cpu() for part in places(rows))
    own = (example[:, :, None] == example[:, None, :]) & (position[:, :, None] >= position[:, None, :])
    mask = own & ((branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :]))
    if window is not None:
        mask &= position[:, :, None] - position[:, None, :] < window
    return mask[:, None]


def _as_asked(config: PretrainedConfig, mask: Tensor) -> Tensor:
    if config._attn_implementation != "eager":
        return mask
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


# --- attention of packed rows -------------------------------------------------------------------------------


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


class PackedAttention:
    """One layer's attention over packed rows; `flex` for a GPU, `by_segment` for a CPU.

    Both take (row, head, time, dim) and give the same; what is within a segment has no row: (head, tokens, dim).
    """

    def __init__(self, packing: Packing, scaling: float, window: int | None, softcap: float | None) -> None:
        self.packing, self.scaling, self.window, self.softcap = packing, scaling, window, softcap

    def flex(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """FlexAttention, compiled where it runs on an accelerator."""

        def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            assert self.softcap is not None
            return self.softcap * torch.tanh(score / self.softcap)

        run = flex_attention if query.device.type == "cpu" else _compiled_flex()
        return run(
            query,
            key,
            value,
            score_mod=None if self.softcap is None else capped,
            block_mask=self.packing.block_mask(self.window, query.device),
            scale=self.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    @torch.compiler.disable
    def by_segment(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each segment by itself: no scores of two examples are ever computed."""
        assert query.shape[0] == 1, "packed rows are one row here"
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        # Split, not sliced: the gradient of splits is one concatenation, that of each slice a whole row of zeros.
        lengths = [segment.tokens for segment in self.packing.segments]
        parts = [part[0].split(lengths, 1) for part in (query, key, value)]
        each = zip(self.packing.segments, *parts, strict=True)
        return torch.cat([self._segment(segment, q, k, v) for segment, q, k, v in each], 1)[None]

    def _segment(self, segment: Segment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if accelerated(q.device):  # a plan, which asks for shapes: what a GPU's kernel keeps
            return self._fused(q, k, v, None)
        if segment.tokens <= _WHOLE:
            return self._weights(q, k, self._segment_bias(segment, q)) @ v
        sizes = [segment.prompt, *segment.completions]
        qs, ks, vs = (part.split(sizes, 1) for part in (q, k, v))
        out = [self._causal(qs[0], ks[0], vs[0], 0)]
        for own_q, own_k, own_v in zip(qs[1:], ks[1:], vs[1:], strict=True):
            keys, values = torch.cat((ks[0], own_k), 1), torch.cat((vs[0], own_v), 1)
            out.append(self._causal(own_q, keys, values, segment.prompt))
        return torch.cat(out, 1)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
        """Causal attention of queries that stand behind `before` keys of their own sequence."""
        window = None if self.window is None or self.window >= k.shape[1] else self.window
        if k.shape[1] > _LONGEST_KEPT and self.softcap is None and window is None:
            return self._fused(q, k, v, self._tail(q.shape[1], k.shape[1], None, q) if before else None)
        out = []
        for start in range(0, q.shape[1], _BLOCK):
            end = min(start + _BLOCK, q.shape[1])
            first = 0 if window is None else max(0, before + start - window + 1)
            keys = slice(first, before + end)
            bias = self._tail(end - start, before + end - first, window, q)
            out.append(self._weights(q[:, start:end], k[:, keys], bias) @ v[:, keys])
        return out[0] if len(out) == 1 else torch.cat(out, 1)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=bias, is_causal=bias is None, scale=self.scaling
        )[0]

    def _weights(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        """(head, query, key): softmax of the scaled, capped products plus `bias`."""
        if self.softcap is None:
            wide = bias.expand(q.shape[0], *bias.shape)
            return torch.baddbmm(wide, q, k.transpose(1, 2), alpha=self.scaling).softmax(-1)
        products = torch.bmm(q, k.transpose(1, 2)) * self.scaling
        return (self.softcap * torch.tanh(products / self.softcap) + bias).softmax(-1)

    def _tail(self, queries: int, keys: int, window: int | None, like: Tensor) -> Float[Tensor, "query key"]:
        """The bias of the last queries of a sequence of `keys`: 0 where they see, -inf where not."""

        def made() -> Tensor:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
            return _bias(distance < 0 if window is None else (distance < 0) | (distance >= window), like)

        return self.packing.once((queries, keys, window), made)

    def _segment_bias(self, segment: Segment, like: Tensor) -> Float[Tensor, "query key"]:
        """The bias of a whole segment, whose completions do not see each other."""
        prompt, completions, window = segment.prompt, segment.completions, self.window

        def made() -> Tensor:
            branch = torch.cat([torch.full((n,), i) for i, n in enumerate((prompt, *completions))])
            position = torch.cat([torch.arange(prompt), *(prompt + torch.arange(n) for n in completions)])
            distance = position[:, None] - position[None, :]
            hidden = (distance < 0) | ((branch[None, :] != 0) & (branch[:, None] != branch[None, :]))
            return _bias(hidden if window is None else hidden | (distance >= window), like)

        return self.packing.once((prompt, completions, window), made)


def _bias(hidden: Tensor, like: Tensor) -> Tensor:
    zeros = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(hidden.to(like.device), float("-inf"))


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention with soft-capping and a mask (true: look), as sdpa would take it; none means causal."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    if mask is None and length > 1:
        key, value = key[:, :, :length], value[:, :, :length]
        mask = torch.ones((length, length), dtype=torch.bool, device=query.device).tril()
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    products = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    if mask is not None:
        products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    return products.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
