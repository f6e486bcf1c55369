"""Small random checkpoints of many architectures, as transformers writes them, whose attention is far from uniform."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from turboquant_gguf.llamacpp.ggufile import rewrite
from turboquant_gguf.llamacpp.logits import Model
from turboquant_gguf.llamacpp.modelmemory import ModelMemory
from turboquant_gguf.weights import converter
from turboquant_gguf.weights.calibration import KEY, rotary_of
from turboquant_gguf.weights.convert import convert

VOCABULARY = 288
MIN_CONTEXT = 256
LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 2, 4, 2, 32
WIDTH = 96  # not heads * head size

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    tie_word_embeddings=False,
)
_EXPLICIT = dict(_COMMON, head_dim=HEAD_SIZE)
_DERIVED = dict(_COMMON, hidden_size=HEADS * HEAD_SIZE)  # head size = width / heads
_ALL_HEADS = dict(_DERIVED, num_key_value_heads=HEADS)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
_LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_WINDOW = dict(sliding_window=16)
_GPT2 = dict(vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=128, bos_token_id=0, eos_token_id=1)

# What is tested, by name: the architecture as GGUF calls it, the configuration class of transformers, its arguments.
ROTATABLE: dict[str, tuple[str, str, dict]] = {
    "apertus": ("apertus", "ApertusConfig", _EXPLICIT),
    "arcee": ("arcee", "ArceeConfig", _EXPLICIT),
    "bloom": ("bloom", "BloomConfig", _GPT2 | dict(hidden_size=128)),
    "cohere": ("command-r", "CohereConfig", _DERIVED | dict(logit_scale=0.5, tie_word_embeddings=True)),
    "cohere2": ("cohere2", "Cohere2Config", _DERIVED | _WINDOW | dict(logit_scale=0.5, tie_word_embeddings=True)),
    "ernie4_5": ("ernie4_5", "Ernie4_5Config", _EXPLICIT),
    "falcon, groups": ("falcon", "FalconConfig", _DERIVED | dict(new_decoder_architecture=True, num_kv_heads=KV_HEADS)),
    "falcon, one KV head": ("falcon", "FalconConfig", _DERIVED | dict(multi_query=True, num_kv_heads=1)),
    "gemma": ("gemma", "GemmaConfig", _EXPLICIT | dict(tie_word_embeddings=True)),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        _EXPLICIT | _WINDOW | dict(query_pre_attn_scalar=32, tie_word_embeddings=True),
    ),
    "gemma3": (
        "gemma3",
        "Gemma3TextConfig",
        _EXPLICIT | _WINDOW | dict(num_hidden_layers=7, query_pre_attn_scalar=32, tie_word_embeddings=True),
    ),
    "glm": ("chatglm", "GlmConfig", _DERIVED | dict(head_dim=HEAD_SIZE, rms_norm_eps=1e-5)),
    "glm4": ("glm4", "Glm4Config", _EXPLICIT | dict(attention_bias=True)),
    "glm4moe": (
        "glm4moe",
        "Glm4MoeConfig",
        _EXPLICIT | _EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1),
    ),
    "gpt2": ("gpt2", "GPT2Config", _GPT2 | dict(n_positions=512, n_ctx=512)),
    "gptneox": ("gptneox", "GPTNeoXConfig", _DERIVED | dict(rotary_pct=0.25)),
    "gpt-oss": (
        "gpt-oss",
        "GptOssConfig",
        _EXPLICIT | _LOCAL_EXPERTS | _WINDOW | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    ),
    "granite": (
        "granite",
        "GraniteConfig",
        _DERIVED | dict(attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    "granitemoe": ("granitemoe", "GraniteMoeConfig", _DERIVED | _LOCAL_EXPERTS),
    "hunyuan": ("hunyuan-dense", "HunYuanDenseV1Config", _EXPLICIT),
    "lfm2": (
        "lfm2",
        "Lfm2Config",
        _DERIVED
        | dict(num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
    ),
    "llama": ("llama", "LlamaConfig", _EXPLICIT),
    "llama, biases": ("llama", "LlamaConfig", _EXPLICIT | dict(attention_bias=True)),
    "llama, head size 48": ("llama", "LlamaConfig", _EXPLICIT | dict(head_dim=48)),
    "llama, head size 80": ("llama", "LlamaConfig", _EXPLICIT | dict(head_dim=80, num_key_value_heads=1)),
    "llama, head size 96": ("llama", "LlamaConfig", _EXPLICIT | dict(head_dim=96)),
    "ministral3": ("mistral3", "Ministral3Config", _EXPLICIT | dict(max_position_embeddings=262144)),
    "mistral": ("llama", "MistralConfig", _EXPLICIT | dict(sliding_window=None)),
    "mixtral": ("llama", "MixtralConfig", _EXPLICIT | _LOCAL_EXPERTS),
    "nemotron": ("nemotron", "NemotronConfig", _DERIVED),
    "olmo": ("olmo", "OlmoConfig", _DERIVED),
    "olmo2": ("olmo2", "Olmo2Config", _DERIVED),
    "olmo3": ("olmo2", "Olmo3Config", _DERIVED | _WINDOW | dict(num_hidden_layers=4)),
    "olmoe": ("olmoe", "OlmoeConfig", _ALL_HEADS | dict(num_experts=4, num_experts_per_tok=2)),
    "phi2": ("phi2", "PhiConfig", _ALL_HEADS | dict(partial_rotary_factor=0.5, intermediate_size=512)),
    "phi3": ("phi3", "Phi3Config", _DERIVED | dict(sliding_window=None)),
    "qwen2": ("qwen2", "Qwen2Config", _DERIVED),
    "qwen2moe": ("qwen2moe", "Qwen2MoeConfig", _DERIVED | _EXPERTS | dict(shared_expert_intermediate_size=64)),
    "qwen3": ("qwen3", "Qwen3Config", _EXPLICIT),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", _EXPLICIT | _EXPERTS | dict(norm_topk_prob=True)),
    "seed_oss": ("seed_oss", "SeedOssConfig", _EXPLICIT),
    "smollm3": ("smollm3", "SmolLM3Config", _DERIVED | dict(num_hidden_layers=5)),
    "stablelm": ("stablelm", "StableLmConfig", _DERIVED | dict(use_qkv_bias=True, partial_rotary_factor=0.25)),
    "stablelm, head size 64": (
        "stablelm",
        "StableLmConfig",
        _DERIVED | dict(hidden_size=256, use_qkv_bias=True, partial_rotary_factor=0.25),
    ),
    "starcoder2": ("starcoder2", "Starcoder2Config", _DERIVED | dict(use_bias=True)),
}
NOT_ROTATABLE: dict[str, tuple[str, str, dict]] = {
    "exaone4": ("exaone4", "Exaone4Config", _DERIVED | _WINDOW),
    "deepseek2": (
        "deepseek2",
        "DeepseekV2Config",
        _ALL_HEADS
        | dict(q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)
        | dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1),
    ),
    "qwen3next": (
        "qwen3next",
        "Qwen3NextConfig",
        _EXPLICIT
        | _EXPERTS
        | dict(num_hidden_layers=4, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=32)
        | dict(linear_value_head_dim=32, shared_expert_intermediate_size=64),
    ),
}

# Families with recurrent layers or experts that are not above, as transformers 5 writes them.
_FOUR_LAYERS = _DERIVED | dict(num_hidden_layers=4)
_LAYERS = dict(layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"])
_MAMBA = dict(mamba_n_heads=8, mamba_d_head=32, mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2)
_NEMOTRON = _FOUR_LAYERS | dict(
    head_dim=32, mamba_num_heads=8, mamba_head_dim=32, n_groups=1, ssm_state_size=16, conv_kernel=4, expand=2
)
_ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1)
_GROUPS = dict(n_group=1, topk_group=1)
_MLA = _ALL_HEADS | dict(q_lora_rank=64, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)
_RECURRENT = dict(_DERIVED, state_size=16)
del _RECURRENT["intermediate_size"]  # which they derive
_DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=32, linear_value_head_dim=32)
HYBRIDS_AND_EXPERTS: dict[str, tuple[str, str, dict]] = {
    "cohere2moe": ("cohere2moe", "Cohere2MoeConfig", _FOUR_LAYERS | _EXPERTS | dict(num_shared_experts=1)),
    "deepseek3": ("deepseek2", "DeepseekV3Config", _MLA | _ROUTED | _GROUPS | dict(first_k_dense_replace=1)),
    "dots1": ("dots1", "Dots1Config", _ALL_HEADS | _ROUTED | _GROUPS | dict(first_k_dense_replace=1)),
    "exaone-moe": (
        "exaone-moe",
        "ExaoneMoeConfig",
        _FOUR_LAYERS | _EXPERTS | _GROUPS | dict(num_shared_experts=1, first_k_dense_replace=1, head_dim=HEAD_SIZE),
    ),
    "falcon-h1": (
        "falcon-h1",
        "FalconH1Config",
        _DERIVED | _MAMBA | dict(mamba_d_ssm=256, head_dim=HEAD_SIZE),
    ),
    "falcon-mamba": ("mamba", "FalconMambaConfig", _RECURRENT | dict(time_step_rank=8)),
    "glm4moe-lite": ("deepseek2", "Glm4MoeLiteConfig", _MLA | _ROUTED | _GROUPS),
    "granitehybrid, experts": (
        "granitehybrid",
        "GraniteMoeHybridConfig",
        _FOUR_LAYERS
        | _LAYERS
        | _MAMBA
        | _LOCAL_EXPERTS
        | dict(shared_intermediate_size=64, position_embedding_type=None),
    ),
    "granitehybrid, dense": (
        "granitehybrid",
        "GraniteMoeHybridConfig",
        _FOUR_LAYERS
        | _LAYERS
        | _MAMBA
        | dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=128, position_embedding_type=None),
    ),
    "granitemoe, shared": (
        "granitemoe",
        "GraniteMoeSharedConfig",
        _DERIVED | _LOCAL_EXPERTS | dict(shared_intermediate_size=64),
    ),
    "granitemoe, windows": (
        "granite_swa",
        "GraniteMoeSWAConfig",
        _FOUR_LAYERS | _LOCAL_EXPERTS | dict(head_dim=HEAD_SIZE),
    ),
    "hy3": (
        "hy_v3",
        "HYV3Config",
        _DERIVED | _EXPERTS | dict(num_shared_experts=1, head_dim=HEAD_SIZE, first_k_dense_replace=1),
    ),
    "jamba": (
        "jamba",
        "JambaConfig",
        _FOUR_LAYERS
        | _MAMBA
        | dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=8)
        | dict(num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1),
    ),
    "lfm2moe": (
        "lfm2moe",
        "Lfm2MoeConfig",
        _FOUR_LAYERS
        | _EXPERTS
        | dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1, tie_word_embeddings=True),
    ),
    "llama4": (
        "llama4",
        "Llama4TextConfig",
        _FOUR_LAYERS | _LOCAL_EXPERTS | dict(intermediate_size_mlp=192, head_dim=HEAD_SIZE, num_experts_per_tok=1),
    ),
    "mamba": ("mamba", "MambaConfig", _RECURRENT | dict(time_step_rank=8)),
    "mamba2": ("mamba2", "Mamba2Config", _RECURRENT | dict(num_heads=8, head_dim=32, n_groups=1)),
    "nemotron-h, dense": ("nemotron_h", "NemotronHConfig", _NEMOTRON | dict(hybrid_override_pattern="M-*M")),
    "nemotron-h, experts": (
        "nemotron_h_moe",
        "NemotronHConfig",
        _NEMOTRON | _ROUTED | _GROUPS | dict(hybrid_override_pattern="ME*M", moe_shared_expert_intermediate_size=64),
    ),
    "qwen3.5": ("qwen35", "Qwen3_5TextConfig", _FOUR_LAYERS | _DELTA | dict(head_dim=HEAD_SIZE)),
    "qwen3.5, experts": (
        "qwen35moe",
        "Qwen3_5MoeTextConfig",
        _FOUR_LAYERS | _DELTA | _EXPERTS | dict(head_dim=HEAD_SIZE, shared_expert_intermediate_size=64),
    ),
    "sarvam": ("deepseek2", "SarvamMLAConfig", _MLA | _ROUTED | _GROUPS | dict(first_k_dense_replace=1)),
}
HUB_SPELLINGS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "granitehybrid, experts": (dict(layer_types=["mamba", "mamba", "attention", "mamba"]), ()),
    "granitehybrid, dense": (dict(layer_types=["mamba", "mamba", "attention", "mamba"]), ()),
    "nemotron-h, dense": (
        dict(hybrid_override_pattern="M-*M"),
        ("layers_block_type", "mtp_layers_block_type", *_GROUPS, *_ROUTED, "moe_shared_expert_intermediate_size"),
    ),
    "nemotron-h, experts": (dict(hybrid_override_pattern="ME*M"), ("layers_block_type", "mtp_layers_block_type")),
    "glm4moe-lite": (dict(first_k_dense_replace=1, scoring_func="sigmoid"), ("mlp_layer_types",)),
    "deepseek3": (dict(scoring_func="sigmoid"), ()),
}
"""What config.json says on the Hub, where transformers 5 writes something else, and what it does not say."""

# Those whose conversion wants a tokenizer.model.
_SENTENCEPIECE = ("jamba", "ernie4_5", "gemma", "gemma2", "gemma3", "nemotron", "phi3")

# ggml computes GELU from a table of 16-bit floats, 2e-4 off; with small layers behind it, that does not hide the rest.
_AFTER_GELU = ("mlp.down_proj", "mlp.c_proj", "dense_4h_to_h", "mlp.fc2")
_GELU = ("bloom", "falcon", "gemma", "gpt2", "gptneox", "phi2", "starcoder2")


def write(
    folder: Path, name: str, *, dtype: torch.dtype = torch.float32, changes: dict | None = None, **save: object
) -> Path:
    """Write the checkpoint called `name` above, with a tokenizer of bytes.

    changes: of its arguments. save: arguments of save_pretrained.
    """
    _, config_class, arguments = (ROTATABLE | NOT_ROTATABLE | HYBRIDS_AND_EXPERTS)[name]
    config = getattr(transformers, config_class)(**arguments | (changes or {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, after_gelu=0.1 if name.startswith(_GELU) else 1.0)
    model.to(dtype).save_pretrained(folder, **save)
    if name in _SENTENCEPIECE:
        write_sentencepiece(folder)
    else:
        byte_tokenizer().save_pretrained(folder)
    return folder


def gguf(folder: Path, name: str, *, rotate: str = "none", **changes: object) -> Path:
    """The same as a GGUF in float32."""
    called = name.replace("phi3", "phi")  # llama.cpp looks for more in the vocabulary of models that are called phi3
    checkpoint, path = write(folder / called, name, changes=changes), folder / f"{name}.gguf"
    with any_pre_tokenizer():
        return convert(checkpoint, path, outtype="f32", rotate=rotate, console=Console(quiet=True)).path


def with_image_positions(folder: Path) -> Path:
    """A model with M-RoPE, as those that see images have: three quarters of the pairs turn with time, row and column."""
    plain = gguf(folder, "glm4", head_dim=64)
    key = "glm4.rope.dimension_sections"
    rewrite(plain, folder / "mrope.gguf", key, {key: np.array([6, 5, 5, 0], np.int32)})
    return folder / "mrope.gguf"


@torch.no_grad()
def randomize(model: torch.nn.Module, after_gelu: float) -> None:
    """Weights as in trained models: norms that differ by channel, biases, and attention that picks."""
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        if "norm" in name and name.endswith("weight"):
            weight.add_(0.2 * noise)
            if "post_feedforward" in name:  # Gemma 2 and 3 normalize behind the feed-forward layer, with 1 + weight
                weight.sub_(1 - after_gelu)
        elif weight.dim() < 2:
            weight.copy_(0.2 * noise)
        else:
            weight.copy_(noise * weight.shape[-1] ** -0.5)
            if any(part in name for part in _AFTER_GELU):
                weight.mul_(after_gelu)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with one merge: llama.cpp takes none without."""
    special = [
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|user|>",
        "<|observation|>",
        "<|system|>",
        "<|assistant|>",
        "[gMASK]",
        "<sop>",
    ]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_sentencepiece(folder: Path) -> None:
    """tokenizer.model: bytes, and pieces of a few words."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog ate the food"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )


@contextlib.contextmanager
def any_pre_tokenizer():
    """llama.cpp's converter recognizes byte-level tokenizers by a hash; here it takes ours."""
    text_model = converter.load()[0].TextModel
    original = text_model.get_vocab_base_pre
    text_model.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    try:
        yield
    finally:
        text_model.get_vocab_base_pre = original


def random_calibration(model: Path, output: Path, version: int = 2, **changes) -> Path:
    """The model with a calibration that fits it and means nothing.

    version: of what the file says; from 2 on centres turn with the position wherever the model's keys do. changes: of
    its keys; None for none of this name.
    """
    rng = np.random.default_rng(0)
    with ModelMemory(model) as memory:
        shapes = [(0 if layer.shares else layer.kv_heads, layer.head_size_k) for layer in memory.layers]
    sizes = [heads * size for heads, size in shapes]
    logarithms = [rng.standard_normal(shape) for shape in shapes if shape[0]]
    scales = [np.exp(head - head.mean(-1, keepdims=True)).ravel() for head in logarithms]
    metadata = {
        f"{KEY}version": version,
        f"{KEY}sizes": np.array(sizes, np.int32),
        f"{KEY}scale": np.concatenate(scales).astype(np.float32),
        f"{KEY}center": rng.standard_normal(sum(sizes)).astype(np.float32),
    }
    if version == 1:
        metadata[f"{KEY}context"] = 1 << 20
    else:
        with Model(model) as opened, opened.open(MIN_CONTEXT) as context:
            rotary = [rotary_of(context, layer) if size else None for layer, size in enumerate(sizes)]
        metadata[f"{KEY}turned"] = np.array([2 * len(one.angles) if one else 0 for one in rotary], np.int32)
    metadata |= {KEY + name: value for name, value in changes.items()}
    rewrite(model, output, KEY, {key: value for key, value in metadata.items() if value is not None})
    return output
