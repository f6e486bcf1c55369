"""A random Llama of two layers, small enough for a test and complete enough for every tool of llama.cpp."""

from pathlib import Path

import gguf
import numpy as np

HEADS, LAYERS, FEED_FORWARD = 2, 2, 256
VOCABULARY = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), "▁".encode()]


def write(path: Path, *, head_size: int = 64, seed: int = 0) -> Path:
    """Write the model, float32, with a tokenizer of bytes."""
    width = HEADS * head_size
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_size)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    rng = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int) -> None:
        # standard deviations near those of trained models, so that attention and logits are not flat
        writer.add_tensor(f"{name}.weight", (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    matrix("token_embd", len(VOCABULARY), width)
    matrix("output", len(VOCABULARY), width)
    norm("output_norm")
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}", width, width)
        matrix(f"blk.{layer}.ffn_gate", FEED_FORWARD, width)
        matrix(f"blk.{layer}.ffn_up", FEED_FORWARD, width)
        matrix(f"blk.{layer}.ffn_down", width, FEED_FORWARD)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
