"""Prints the nodes of a model's graph as libllama in LLAMA_CPP_LIB_PATH builds it: python graph_nodes.py MODEL TYPES"""

import ctypes
import os
import sys
from pathlib import Path

from turboquant_gguf.llamacpp import ggml
from turboquant_gguf.llamacpp.cachetypes import CacheTypes
from turboquant_gguf.llamacpp.logits import Model

with Model(Path(sys.argv[1])) as model:
    llama = model.bindings
    library = ctypes.CDLL(str(next(Path(os.environ["LLAMA_CPP_LIB_PATH"]).glob("*ggml-base.*"))))
    name, operator = library.ggml_get_name, library.ggml_op_desc
    for function in (name, operator):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]

    @llama.ggml_backend_sched_eval_callback
    def seen(tensor: int, ask: bool, _: object) -> bool:
        if ask:
            print(operator(tensor).decode(), name(tensor).decode())
        return True  # one by one

    types = CacheTypes.parse(sys.argv[2])
    params = llama.llama_context_default_params()
    params.n_ctx, params.cb_eval = 256, seen
    params.type_k, params.type_v = ggml.type_number(types.k), ggml.type_number(types.v)
    params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama.llama_init_from_model(model.handle, params)
    tokens = (llama.llama_token * 8)(*range(1000, 1008))
    assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, 8)) == 0
    llama.llama_free(context)
