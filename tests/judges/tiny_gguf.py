"""A tiny Llama in a GGUF file that the real llama.cpp loads: a byte-complete vocabulary and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

LETTERS = [chr(code) for code in range(33, 127)]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = ["<unk>", "<s>", "</s>", *_BYTES, "▁", *LETTERS]
# llama.cpp's token types.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
WIDTH, HEADS, INNER = 32, 4, 64


def make(
    path: Path, seed: int = 0, always: str | None = None, layers: int = 1, positions: int = 4096
) -> Path:
    """Write the model. `always`: the letter that it prefers to any other, whatever it is asked."""
    import gguf

    random = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(0, 2 / np.sqrt(shape[-1]), shape).astype(np.float32)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(positions)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    kinds = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    writer.add_token_types(kinds + [_NORMAL] * (len(TOKENS) - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    embedding, output = weights(len(TOKENS), WIDTH) * 4, weights(len(TOKENS), WIDTH)
    if always is not None:
        # One feature is large in every token, so that it is large wherever an answer begins.
        embedding[:, 0], output[:, 0] = 50.0, 0.0
        output[TOKENS.index(always), 0] = 5.0
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output.weight", output)
    for number in range(layers):
        block = f"blk.{number}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}.{name}.weight", weights(WIDTH, WIDTH))
        for name, shape in (
            ("ffn_gate", (INNER, WIDTH)),
            ("ffn_up", (INNER, WIDTH)),
            ("ffn_down", (WIDTH, INNER)),
        ):
            writer.add_tensor(f"{block}.{name}.weight", weights(*shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
