"""The turbo types from Python: blocks of an array, a chat with a small cache, and what the cache costs.

    python examples/python_api.py              # SmolLM2-135M-Instruct, fetched once (93 MB)
    python examples/python_api.py my.gguf

It needs the Python bindings: CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install '.[python]'
"""

import sys
from pathlib import Path

import numpy as np

import turboquant_gguf
from turboquant_gguf.core import texts
from turboquant_gguf.llamacpp import models
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model

TOKENS = 192


def show_blocks() -> None:
    """Store an array in each type, and read it back."""
    x = np.random.default_rng(0).standard_normal((16, 128), dtype=np.float32)
    for kind in turboquant_gguf.types():
        blocks = turboquant_gguf.quantize(x, kind.name)
        error = np.mean((turboquant_gguf.dequantize(blocks, kind.name) - x) ** 2)
        print(f"{kind.name}: {x.nbytes} bytes in {blocks.nbytes}, mean squared error {error:.4f}")


def chat(path: Path) -> None:
    """Ask a question through llama-cpp-python's own class."""
    from llama_cpp import Llama  # after turboquant_gguf, which makes it use the llama.cpp of this package

    number = {kind.name: kind.ggml_type for kind in turboquant_gguf.types()}["turbo4"]
    model = Llama(str(path), n_ctx=1024, type_k=number, type_v=number, flash_attn=True, verbose=False)
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    answer = model.create_chat_completion(question, max_tokens=16, temperature=0)
    print(f"turbo4 says: {answer['choices'][0]['message']['content']}")
    model.close()


def compare(path: Path) -> None:
    """Read a text with several caches, and count where they predict the token that f16 does."""
    with Model(path) as model:
        tokens = model.tokenize(texts.bundled("demo.txt"))[:TOKENS]
        best = {}
        for name in ("f16", "turbo4", "turbo2"):
            with model.open(TOKENS, CacheTypes.parse(name)) as context:
                best[name] = context.logits(tokens).argmax(axis=1)
                same = np.mean(best[name] == best["f16"])
                print(f"{name}: {context.facts.size / 2**20:.1f} MiB for {TOKENS} tokens, {same:.0%} as f16")


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else models.fetch("smollm2-135m")
    show_blocks()
    chat(file)
    compare(file)
