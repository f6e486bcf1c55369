#pragma once

// What the table in turbo-cuda.cu is made of: for each operator that a file here computes, whether it takes a node, and
// the computation. A node whose operator and types are others never gets to them.

#include "turbo-cuda.h"

struct turbo_operator {
    enum ggml_op op;
    bool (*takes)(int device, const ggml_tensor * op);
    void (*compute)(ggml_backend_cuda_context & context, ggml_tensor * op); // null: llama.cpp's own code does it
};

// turbo-encode.cu: values to blocks
bool turbo_takes_set_rows(int device, const ggml_tensor * op);
void turbo_set_rows(ggml_backend_cuda_context & context, ggml_tensor * op);
void turbo_set_rows_of_two(ggml_backend_cuda_context & context, ggml_tensor * first, ggml_tensor * second);
bool turbo_takes_encoding(int device, const ggml_tensor * op);
void turbo_copy_encoded(ggml_backend_cuda_context & context, ggml_tensor * op);

// turbo-rows.cu: blocks to values, and to other places
bool turbo_takes_get_rows(int device, const ggml_tensor * op);
void turbo_get_rows(ggml_backend_cuda_context & context, ggml_tensor * op);
bool turbo_takes_decoding(int device, const ggml_tensor * op);
void turbo_copy_decoded(ggml_backend_cuda_context & context, ggml_tensor * op);
bool turbo_takes_copy(int device, const ggml_tensor * op);
void turbo_copy_blocks(ggml_backend_cuda_context & context, ggml_tensor * op);
bool turbo_takes_mul_mat(int device, const ggml_tensor * op); // llama.cpp's code, with ggml_cuda_turbo_converter

// turbo-attention.cu: FLASH_ATTN_EXT, and attention with a recent window, of any types
bool turbo_takes_attention(int device, const ggml_tensor * op);
void turbo_compute_attention(ggml_backend_cuda_context & context, ggml_tensor * op);
