"""Small random models of every kind of memory that llama.cpp has (llama_model::create_memory), and of attention.

The metadata is ours; which tensors a model has, and of what shape, llama.cpp says itself.
"""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np

from tiny_model import VOCABULARY
from turboquant_gguf.llamacpp import ggml, native
from turboquant_gguf.llamacpp.logits import Model

HEAD_SIZE = 64
WINDOW = 40
"""Tokens of the architectures with sliding windows: shorter than the sequences of the tests."""


@dataclass(frozen=True)
class Kind:
    """A model.

    architecture: as GGUF calls it. keys: metadata of its own, beside _COMMON. factors: of weights, by the part of their
    name that says what they are. latent_outliers: the same model as without, whose latent vectors have a few large
    channels. swa_full: contexts keep all tokens of sliding windows. alone: turbo caches of it have one sequence. reads:
    "tokens"; "texts": an encoder reads a text that the decoder looks at; "whole": there is no cache, each batch is a
    text of its own.
    """

    architecture: str
    keys: dict[str, object] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    latent_outliers: bool = False
    swa_full: bool = False
    alone: bool = False
    reads: str = "tokens"

    @property
    def is_mla(self) -> bool:
        """Whether values are a part of the keys, so that both have one type."""
        return "attention.key_length_mla" in self.keys or self.architecture == "deepseek4"

    @property
    def picks(self) -> bool:
        """Whether attention sees only keys that an indexer picks."""
        return any(key.startswith("attention.indexer") for key in self.keys)


_COMMON = {
    "context_length": 16384,
    "embedding_length": 128,
    "block_count": 2,
    "feed_forward_length": 192,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": HEAD_SIZE,
    "attention.value_length": HEAD_SIZE,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": HEAD_SIZE,
    "vocab_size": len(VOCABULARY),
}
_EXPERTS = {
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64,
    "expert_count": 2,
    "expert_used_count": 2,
    "expert_shared_count": 1,
    "expert_gating_func": 2,  # sigmoid
    "expert_weights_scale": 1.0,
    "expert_weights_norm": True,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 2,
}
_SLIDING = {
    "attention.sliding_window": WINDOW,
    "attention.sliding_window_pattern": 2,
    "attention.key_length_swa": HEAD_SIZE,
    "attention.value_length_swa": HEAD_SIZE,
    "rope.freq_base_swa": 10000.0,
    "block_count": 4,
}
_ALTERNATING = _SLIDING | {"attention.sliding_window_pattern": [True, False, True, False]}
_STATE_SPACE = {
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 256,
    "ssm.state_size": 32,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 2,
}
_LINEAR_ATTENTION = {  # of Qwen3-Next and later: two key heads and four value heads of 32 values
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 32,
    "ssm.time_step_rank": 4,
    "ssm.group_count": 2,
    "full_attention_interval": 2,
    "rope.dimension_sections": [8, 12, 12, 0],
    "block_count": 4,
}
_LATENT = _EXPERTS | {  # 512 latent values and 64 with RoPE, which are kept as one key of 576
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.q_lora_rank": 64,
    "attention.kv_lora_rank": 512,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 128,
    "attention.value_length_mla": 64,
}
_INDEXER = {
    "attention.indexer.head_count": 4,
    "attention.indexer.key_length": 64,
    "attention.indexer.top_k": 64,
    "attention.indexer.types": [1, 1],
    "attention.indexer.block_size": 4,
    "attention.indexer.local_blocks": 1,
    "attention.indexer.kpool": 4,
    "attention.indexer.kpool_select_tail": True,
}
_HYPER = {
    "hyper_connection.count": 4,
    "hyper_connection.sinkhorn_iterations": 2,
    "hyper_connection.epsilon": 1e-6,
}
_KDA = {"kda.head_dim": 32, "kda.gate_lower_bound": -5.0, "ssm.conv_kernel": 4}

KINDS = {
    "plain": Kind("llama"),
    "ALiBi": Kind("bloom", {"attention.head_count_kv": 4, "embedding_length": 256}),
    "values narrower than keys": Kind(
        "mimo2", _ALTERNATING | _EXPERTS | {"attention.key_length": 128, "attention.key_length_swa": 128}
    ),
    "sliding window": Kind("gemma3", _SLIDING),
    "sliding window in full": Kind("gemma3", _SLIDING, swa_full=True),
    "sliding window, soft cap": Kind(
        "gemma2", _SLIDING | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
    ),
    "sliding window, sinks": Kind("gpt-oss", _SLIDING | _EXPERTS),
    "chunks": Kind("llama4", _SLIDING | _EXPERTS),
    "layers that share": Kind(
        "gemma4",
        _SLIDING
        | {"block_count": 6, "attention.sliding_window_pattern": [True, True, True, False, True, False]}
        | {
            "attention.shared_kv_layers": 2,
            "embedding_length_per_layer_input": 0,
            "rope.dimension_count_swa": HEAD_SIZE,
        },
        factors={"attn_q_norm": HEAD_SIZE**-0.5},  # as in T5, scores have no factor of their own
    ),
    "hybrid, linear attention": Kind("qwen35", _LINEAR_ATTENTION),
    "hybrid, both in each layer": Kind("falcon-h1", _STATE_SPACE),
    "hybrid, convolutions": Kind(
        "lfm2",
        {"embedding_length": 256, "attention.head_count_kv": [0, 2, 0, 2], "block_count": 4, "shortconv.l_cache": 3},
    ),
    "hybrid, sliding window": Kind(
        "lfm2",
        {"embedding_length": 256, "attention.head_count_kv": [0, 2, 0, 2], "block_count": 4, "shortconv.l_cache": 3}
        | {"attention.sliding_window": WINDOW},
    ),
    "hybrid, Mamba": Kind(
        "nemotron_h",
        _STATE_SPACE | {"block_count": 3, "attention.head_count_kv": [0, 2, 0], "feed_forward_length": [0, 0, 192]},
    ),
    "hybrid, MLA": Kind("kimi-linear", _LATENT | _KDA | {"attention.head_count_kv": [0, 1, 0, 1], "block_count": 4}),
    "hybrid, indexed": Kind(
        "qwen4exp",
        _LINEAR_ATTENTION
        | _EXPERTS
        | _INDEXER
        | _HYPER
        | {"hyper_connection.low_rank": 8, "attention.compress_ratios": [4, 4, 4, 4]}
        | {"attention.indexer.top_k": 4096},  # all blocks: which of them were picked would be chance
    ),
    "hybrid, indexed MLA": Kind(
        "glm5-next",
        _LATENT
        | _KDA
        | _INDEXER
        | _HYPER
        | {"attention.head_count_kv": [0, 1], "rope.dimension_count": 0, "attention.key_length": 512},
    ),
    "MLA": Kind("deepseek2", _LATENT, factors={"attn_q_b": 1 / 3}),
    "MLA, large channels": Kind("deepseek2", _LATENT, factors={"attn_q_b": 1 / 3}, latent_outliers=True),
    "MLA, shape of GLM-4.7-Flash": Kind(
        "deepseek2", _LATENT | {"attention.key_length_mla": 256, "attention.value_length_mla": 256}
    ),
    "MLA, shape of Kimi K2": Kind(
        "deepseek2", _LATENT | {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
    ),
    "MLA, indexed": Kind("deepseek32", _LATENT | _INDEXER),
    "MLA, indexed, sliding window": Kind(
        "dots3note",
        _LATENT
        | _INDEXER
        | {
            "attention.sliding_window": WINDOW,
            "attention.sliding_window_pattern": [False, True],
            "rope.freq_base_swa": 10000.0,
        }
        | {"attention.kv_lora_rank_swa": 512, "attention.key_length_swa": 576, "attention.value_length_swa": 512}
        | {
            "attention.key_length_mla_swa": 128,
            "attention.value_length_mla_swa": 64,
            "attention.indexer.types": [1, 0],
        },
    ),
    "compressed": Kind(
        "deepseek4",
        _EXPERTS
        | _INDEXER
        | _HYPER
        | {"block_count": 4, "attention.head_count": 4, "attention.head_count_kv": 1}
        | {"attention.q_lora_rank": 64, "rope.dimension_count": 32, "attention.sliding_window": WINDOW}
        | {
            "attention.output_group_count": 4,
            "attention.output_lora_rank": 32,
            "attention.compress_rope_freq_base": 160000.0,
        }
        | {
            "attention.compress_ratios": [0, 0, 4, 128],
            "hash_layer_count": 0,
            "swiglu_clamp_exp": 10.0,
            "expert_gating_func": 4,
        },
        alone=True,
    ),
    "blocks that are picked": Kind(
        "minimax-m3", _EXPERTS | _INDEXER | {"attention.indexer.head_count": 2, "attention.indexer.top_k": 16}
    ),
    "encoder and decoder": Kind(
        "t5",
        {"attention.head_count_kv": 4, "attention.relative_buckets_count": 8},
        factors={"attn_q": HEAD_SIZE**-0.5},
        reads="texts",
    ),
    "recurrent": Kind("mamba", _STATE_SPACE | {"attention.head_count": 0, "attention.head_count_kv": 0}),
    "recurrent, Mamba 2": Kind("mamba2", _STATE_SPACE | {"attention.head_count": 0, "attention.head_count_kv": 0}),
    "no cache, heads of 32": Kind(
        "bert",
        {
            "attention.head_count_kv": 4,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.causal": False,
        },
        reads="whole",
    ),
    "no cache, diffusion": Kind("llada", {"attention.causal": False}, reads="whole"),
}

UNFIT = {
    "heads of 80": Kind(
        "llama", {"attention.key_length": 80, "attention.value_length": 80, "rope.dimension_count": 80}
    ),
    "latent vectors of 544": Kind(
        "deepseek2",
        _LATENT | {"attention.kv_lora_rank": 480, "attention.key_length": 544, "attention.value_length": 480},
    ),
    "indexer keys of 32": Kind(
        "minimax-m3",
        _EXPERTS
        | _INDEXER
        | {"attention.indexer.head_count": 2, "attention.indexer.key_length": 32, "rope.dimension_count": 32},
    ),
    "no flash attention": Kind("grok", _EXPERTS | {"embedding_length": 256}),
}
"""Models whose keys or values cannot be of turbo types."""

# Attention picks a few tokens, and what it finds counts.
_LOUDER = dict.fromkeys(("attn_q", "attn_q_b", "attn_qkv", "attn_output", "attn_output_b"), 1.5)


def write(path: Path, kind: Kind) -> Path:
    """Write a model of this kind, float32, with a tokenizer of bytes."""
    shapes = _shapes(kind, path.with_suffix(".keys"))
    writer = _with_metadata(path, kind)
    for name, shape in shapes.items():
        writer.add_tensor(name, _weights(kind, name, shape))
    _close(writer, tensors=True)
    return path


def _with_metadata(path: Path, kind: Kind) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, kind.architecture)
    for key, value in (_COMMON | kind.keys).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](f"{kind.architecture}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * len(VOCABULARY))
    writer.add_token_types([2, 3, 3, *[6] * 256, 1])
    writer.add_token_type_count(2)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return writer


def _close(writer: gguf.GGUFWriter, *, tensors: bool) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_tensors_to_file()
    writer.close()


class _Tensor(ctypes.Structure):
    """The beginning of ggml_tensor."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]


def _shapes(kind: Kind, path: Path) -> dict[str, tuple[int, ...]]:
    """The tensors that llama.cpp makes for this metadata, by name: the innermost dimension first."""
    from llama_cpp import llama_cpp as llama

    _close(_with_metadata(path, kind), tensors=False)
    found: dict[str, tuple[int, ...]] = {}
    base = ctypes.CDLL(str(next(native.library_dir().glob("*ggml-base.*"))))
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]

    @llama.llama_model_set_tensor_data_t
    def seen(tensor: int, _: object) -> None:
        shape = list(_Tensor.from_address(tensor).ne)
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        name = base.ggml_get_name(tensor).decode()
        if not name.endswith("scale"):  # of weights that are quantized as a whole
            found[name] = tuple(shape)

    metadata = ggml.function("gguf_init_from_file")(str(path).encode(), ggml.GGUFInitParams(True, None))
    log = []
    callback = llama.llama_log_callback(lambda level, text, data: log.append(text.decode("utf-8", "replace")))
    llama.llama_log_set(callback, None)
    model = llama.llama_model_init_from_user(metadata, seen, None, llama.llama_model_default_params())
    llama.llama_log_set(llama.llama_log_callback(), None)
    assert model, "".join(log)
    llama.llama_model_free(model)
    ggml.function("gguf_free")(metadata)
    path.unlink()
    return found


def _weights(kind: Kind, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights as in trained models: norms that differ by channel, biases, and attention that picks."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.standard_normal(shape[::-1]).astype(np.float32)
    part = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    if name.endswith("norm.weight") or part in ("ssm_d", "rope_freqs", "layer_output_scale"):
        weights = 1 + 0.2 * noise
    elif part == "ssm_a":  # a decay
        weights = -np.exp(noise)
    elif len(shape) < 2:
        weights = 0.05 * noise
    else:
        weights = noise * shape[0] ** -0.5 * _LOUDER.get(part, 1)
    weights = weights * kind.factors.get(part, 1)
    if kind.latent_outliers:  # the same model: what the norm makes larger, the matrices behind it make smaller
        large, channels = 12, [3, 77, 150, 301]
        if part == "attn_kv_a_norm":
            weights[channels] *= large
        elif part == "attn_v_b":
            weights[..., channels] /= large
        elif part == "attn_k_b":
            weights[:, channels, :] /= large
    return np.ascontiguousarray(weights, np.float32)


def main() -> None:
    """Write all, to see which llama.cpp takes: memory_kinds.py FOLDER"""
    import sys

    for name, kind in (KINDS | UNFIT).items():
        path = write(Path(sys.argv[1]) / f"{name}.gguf", kind)
        with Model(path) as model:
            print(name, path.stat().st_size >> 10, "KiB", model.vocabulary_size)


if __name__ == "__main__":
    main()
