"""Models of several architectures with weights of zero: enough for llama.cpp to load them and to count their memory."""

from pathlib import Path

import gguf
import numpy as np

WIDTH, FEED_FORWARD, VOCABULARY = 128, 256, 64
WINDOW = 1024
"""Of the architectures with sliding windows."""

Shapes = dict[str, tuple[int, ...]]  # of tensors, the innermost dimension first


def _attention(
    heads: int, kv_heads: int, size: int, *, norms: tuple[str, ...] = ("attn_q_norm", "attn_k_norm")
) -> Shapes:
    return {
        "attn_norm.weight": (WIDTH,),
        "attn_q.weight": (WIDTH, heads * size),
        "attn_k.weight": (WIDTH, kv_heads * size),
        "attn_v.weight": (WIDTH, kv_heads * size),
        "attn_output.weight": (heads * size, WIDTH),
        **{f"{norm}.weight": (size,) for norm in norms},
    }


def _feed(inner: int) -> Shapes:
    return {
        "ffn_norm.weight": (WIDTH,),
        "ffn_gate.weight": (WIDTH, inner),
        "ffn_up.weight": (WIDTH, inner),
        "ffn_down.weight": (inner, WIDTH),
    }


FEED = _feed(FEED_FORWARD)
OUTPUT_NORM: Shapes = {"output_norm.weight": (WIDTH,)}
POST_NORMS: Shapes = {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}


def _llama(head_size: int = 64, layers: int = 3, feed_forward: int = FEED_FORWARD) -> tuple[dict, list[Shapes], Shapes]:
    keys = {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": feed_forward}
    keys |= {"attention.key_length": head_size, "attention.value_length": head_size, "rope.dimension_count": head_size}
    return keys, [_attention(4, 2, head_size, norms=()) | _feed(feed_forward)] * layers, OUTPUT_NORM


def _qwen3() -> tuple[dict, list[Shapes], Shapes]:
    keys = {"attention.head_count": 4, "attention.head_count_kv": 2}
    keys |= {"attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": 128}
    return keys, [_attention(4, 2, 128) | FEED] * 2, OUTPUT_NORM


def _gemma3(layers: int = 7) -> tuple[dict, list[Shapes], Shapes]:
    """Every sixth layer sees all of the context, the others a window of it."""
    keys = {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.sliding_window": WINDOW}
    keys |= {"attention.key_length": 256, "attention.value_length": 256}
    return keys, [_attention(2, 1, 256) | FEED | POST_NORMS] * layers, OUTPUT_NORM


def _gemma4() -> tuple[dict, list[Shapes], Shapes]:
    """Heads of two sizes, windows, and two last layers that read the keys and values of others."""
    windows = [True, True, True, False, True, False]
    keys = {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.sliding_window": WINDOW}
    keys |= {"attention.sliding_window_pattern": windows, "attention.shared_kv_layers": 2}
    keys |= {"attention.key_length": 512, "attention.value_length": 512}
    keys |= {"attention.key_length_swa": 256, "attention.value_length_swa": 256, "embedding_length_per_layer_input": 0}
    keys |= {"rope.dimension_count": 512, "rope.dimension_count_swa": 256}
    layers = [_attention(2, 1, 256 if window else 512) | FEED | POST_NORMS for window in windows]
    return keys, layers, OUTPUT_NORM | {"rope_freqs.weight": (256,)}


def _lfm2() -> tuple[dict, list[Shapes], Shapes]:
    """Two layers of three are convolutions, which keep a state of fixed size."""
    kv_heads = [0, 0, 1, 0, 0, 1]
    keys = {"attention.head_count": 2, "attention.head_count_kv": kv_heads, "shortconv.l_cache": 3}
    convolution = {
        "attn_norm.weight": (WIDTH,),
        "shortconv.conv.weight": (3, WIDTH),
        "shortconv.in_proj.weight": (WIDTH, 3 * WIDTH),
        "shortconv.out_proj.weight": (WIDTH, WIDTH),
    }
    layers = [FEED | (_attention(2, 1, 64) if heads else convolution) for heads in kv_heads]
    return keys, layers, {"token_embd_norm.weight": (WIDTH,)}


def _deepseek2() -> tuple[dict, list[Shapes], Shapes]:
    """Keys and values compressed into one vector of 256 + 64 values, which is kept as a key."""
    rank, rope, plain = 256, 64, 64
    keys = {"attention.head_count": 2, "attention.head_count_kv": 1, "attention.q_lora_rank": 0}
    keys |= {"attention.kv_lora_rank": rank, "attention.key_length": rank + rope, "attention.value_length": rank}
    keys |= {
        "attention.key_length_mla": plain + rope,
        "attention.value_length_mla": plain,
        "rope.dimension_count": rope,
    }
    keys |= {"leading_dense_block_count": 2, "expert_feed_forward_length": 32, "expert_shared_count": 1}
    attention = {
        "attn_norm.weight": (WIDTH,),
        "attn_kv_a_norm.weight": (rank,),
        "attn_q.weight": (WIDTH, 2 * (plain + rope)),
        "attn_kv_a_mqa.weight": (WIDTH, rank + rope),
        "attn_k_b.weight": (plain, rank, 2),
        "attn_v_b.weight": (rank, plain, 2),
        "attn_output.weight": (2 * plain, WIDTH),
    }
    return keys, [attention | FEED] * 2, OUTPUT_NORM


def _mamba() -> tuple[dict, list[Shapes], Shapes]:
    """No attention at all."""
    inner, state, rank = 2 * WIDTH, 16, 8
    keys = {"ssm.conv_kernel": 4, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": rank}
    keys |= {"attention.head_count": 0}
    layer = {
        "attn_norm.weight": (WIDTH,),
        "ssm_in.weight": (WIDTH, 2 * inner),
        "ssm_conv1d.weight": (4, inner),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (inner, rank + 2 * state),
        "ssm_dt.weight": (rank, inner),
        "ssm_dt.bias": (inner,),
        "ssm_a": (state, inner),
        "ssm_d": (inner,),
        "ssm_out.weight": (inner, WIDTH),
    }
    return keys, [layer] * 2, OUTPUT_NORM


def _bert() -> tuple[dict, list[Shapes], Shapes]:
    """An embedding model: it reads a text at once and keeps nothing."""
    keys = {"attention.head_count": 2, "attention.causal": False, "attention.layer_norm_epsilon": 1e-12}
    layer = {
        **{f"attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        **{f"{norm}_norm.{part}": (WIDTH,) for norm in ("attn_output", "layer_output") for part in ("weight", "bias")},
        "ffn_up.weight": (WIDTH, FEED_FORWARD),
        "ffn_down.weight": (FEED_FORWARD, WIDTH),
    }
    embeddings = {"position_embd.weight": (WIDTH, 4096), "token_types.weight": (WIDTH, 2)}
    return keys, [layer] * 2, embeddings | {f"token_embd_norm.{part}": (WIDTH,) for part in ("weight", "bias")}


ARCHITECTURES = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "lfm2": _lfm2,
    "deepseek2": _deepseek2,
    "mamba": _mamba,
    "bert": _bert,
}


def write(
    path: Path, architecture: str, *, add: dict | None = None, leave_out: str = "", parts: int = 0, **options: int
) -> Path:
    """Write a model without a tokenizer.

    add: further metadata. leave_out: a tensor that is not written. parts: split it after that many tensors, in which
    case the first part's path is returned. options: of the architecture's function above.
    """
    keys, layers, shared = ARCHITECTURES[architecture](**options)
    keys = {"context_length": 4096, "embedding_length": WIDTH, "feed_forward_length": FEED_FORWARD, **keys}
    keys |= {"block_count": len(layers), "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": VOCABULARY}
    shapes = {"token_embd.weight": (WIDTH, VOCABULARY), **shared}
    shapes |= {f"blk.{number}.{name}": shape for number, layer in enumerate(layers) for name, shape in layer.items()}
    shapes.pop(leave_out, None)

    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    writer.add_name(f"tiny {architecture}")
    writer.add_tokenizer_model("no_vocab")
    writer.add_token_type_count(2)
    for key, value in keys.items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in (add or {}).items():
        _add(writer, key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape[::-1], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def _add(writer: gguf.GGUFWriter, key: str, value: bool | float | str | list) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
