// The operators of the CUDA back end in the emulator (tests/simt), as ggml's nodes, against the C reference.
//
//     cuda_operators vectors.bin BLOCKS
//         everything; BLOCKS of random data for each kind of data, type and schedule
//
// It prints what it has compared; the first difference ends it with status 1.

#include <memory> // before the dialect's macros

#include "tensor_cores.h"

#include "cuda/turbo-cuda.cu"
#include "cuda/turbo-encode.cu"
#include "cuda/turbo-rows.cu"

#include "check_vectors.h"

// Attention has a program of its own, simt/attention.cpp: its kernels take long to compile.
bool turbo_takes_attention(int, const ggml_tensor *) { return false; }
void turbo_compute_attention(ggml_backend_cuda_context &, ggml_tensor *) {}

#include <cstdio>
#include <random>
#include <string>
#include <utility>

static void wrong(const std::string & what) {
    printf("wrong: %s\n", what.c_str());
    exit(1);
}

// ---- ggml's tensors in memory of the emulated device ----

struct shape {
    int64_t ne[4];
    int64_t nb[4]; // 0: as after the dimension before
};

static ggml_tensor tensor(ggml_type type, const void * data, shape s) {
    ggml_tensor t{};
    t.type = type;
    t.data = (void *) data;
    for (int i = 0; i < 4; ++i) {
        t.ne[i] = s.ne[i];
        const size_t before = i < 2 ? 0 : t.nb[i - 1]*s.ne[i - 1];
        const size_t after  = i == 0 ? ggml_type_size(type) : i == 1 ? ggml_row_size(type, s.ne[0]) : before;
        t.nb[i] = s.nb[i] ? (size_t) s.nb[i] : after;
    }
    return t;
}

static ggml_backend_cuda_context context;

static void compute(ggml_tensor & op, ggml_op what) {
    op.op = what;
    if (ggml_cuda_turbo_supports(0, &op) != 1 || !ggml_cuda_turbo_compute(context, &op)) {
        wrong(std::string(ggml_op_name(what)) + " is not taken");
    }
}

// ---- data ----

static std::mt19937 random_numbers(1);

template<typename F> static std::vector<float> make(int blocks, F f) {
    std::vector<float> out((size_t) blocks*QK_TURBO);
    for (float & x : out) {
        x = f();
    }
    return out;
}

static std::vector<std::pair<const char *, std::vector<float>>> kinds_of_data(int blocks) {
    std::normal_distribution<float>         normal;
    std::cauchy_distribution<float>         cauchy;
    std::uniform_int_distribution<int>      small(-3, 3), octave(0, 9);
    std::uniform_int_distribution<uint32_t> bits;
    auto & r = random_numbers;
    return {
        { "normal", make(blocks, [&] { return normal(r); }) },
        { "Cauchy", make(blocks, [&] { return cauchy(r); }) },
        { "ties",   make(blocks, [&] { return 0.5f*(float) small(r); }) },
        { "tiny",   make(blocks, [&] { return std::ldexp(normal(r), -44 + octave(r)); }) },
        { "any bits, NaN and infinities among them", make(blocks, [&] {
            const int kind = octave(r);
            return kind < 7 ? simt_bits<float>(bits(r)) : kind == 7 ? NAN : kind == 8 ? INFINITY : -INFINITY;
        }) },
    };
}

static std::vector<uint8_t> reference(int k, const std::vector<float> & x) {
    std::vector<uint8_t> out(x.size()/QK_TURBO*TURBO_BLOCK_BYTES(k));
    for (size_t i = 0; i < x.size()/QK_TURBO; ++i) {
        turbo_quantize_block(turbo_get_codec(k), &x[i*QK_TURBO], &out[i*TURBO_BLOCK_BYTES(k)]);
    }
    return out;
}

static std::vector<float> decoded(int k, const std::vector<uint8_t> & blocks) {
    std::vector<float> out(blocks.size()/TURBO_BLOCK_BYTES(k)*QK_TURBO);
    for (size_t i = 0; i < out.size()/QK_TURBO; ++i) {
        turbo_dequantize_block(turbo_get_codec(k), &blocks[i*TURBO_BLOCK_BYTES(k)], &out[i*QK_TURBO]);
    }
    return out;
}

static ggml_type turbo_type(int k) {
    return (ggml_type) (GGML_TYPE_TURBO2 + k - 2);
}

template<typename T> static bool same(const std::vector<T> & a, const std::vector<T> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(T)) == 0;
}

// ---- encoding ----

static void encode_blocks(int k, int n, const float * x, uint8_t * blocks) {
    simt::input<float>    in(x, (size_t) n*QK_TURBO);
    simt::output<uint8_t> out((size_t) n*TURBO_BLOCK_BYTES(k), 2);
    ggml_tensor values = tensor(GGML_TYPE_F32, in.data(), { { QK_TURBO*n, 1, 1, 1 }, {} });
    ggml_tensor op     = tensor(turbo_type(k), out.data(), { { QK_TURBO*n, 1, 1, 1 }, {} });
    op.src[0] = &values;
    op.src[1] = &op;
    compute(op, GGML_OP_CPY);
    memcpy(blocks, out.data(), out.size());
}

static void decode_blocks(int k, int n, const uint8_t * blocks, float * y) {
    simt::input<uint8_t> in(blocks, (size_t) n*TURBO_BLOCK_BYTES(k), 2);
    simt::output<float>  out((size_t) n*QK_TURBO);
    ggml_tensor coded = tensor(turbo_type(k), in.data(), { { QK_TURBO*n, 1, 1, 1 }, {} });
    ggml_tensor op    = tensor(GGML_TYPE_F32, out.data(), { { QK_TURBO*n, 1, 1, 1 }, {} });
    op.src[0] = &coded;
    op.src[1] = &op;
    compute(op, GGML_OP_CPY);
    memcpy(y, out.data(), out.size()*sizeof(float));
}

static void test_bytes(int k, int blocks) {
    for (const auto & [kind, x] : kinds_of_data(blocks)) {
        std::vector<uint8_t> out(x.size()/QK_TURBO*TURBO_BLOCK_BYTES(k));
        encode_blocks(k, blocks, x.data(), out.data());
        if (!same(out, reference(k, x))) {
            wrong("turbo" + std::to_string(k) + ": bytes of data that are " + kind);
        }
    }
}

// SET_ROWS: heads of 192 values, rows in any order, several streams, a source and a destination with gaps.
template<typename Index> static void test_set_rows(int k, ggml_type index_type) {
    constexpr int64_t heads = 3, tokens = 2, cells = 5, streams = 2, row = 192*heads, gap = 64;
    const int64_t bytes = TURBO_BLOCK_BYTES(k), row_bytes = row/QK_TURBO*bytes, cell_bytes = row_bytes + bytes;
    std::normal_distribution<float> normal;
    const std::vector<float> x = make(streams*tokens*(row + gap)/QK_TURBO, [&] { return normal(random_numbers); });
    const std::vector<Index> index = { 4, 0, 2, 3 }; // the second stream has rows of its own
    simt::input<float>   in(x);
    simt::input<Index>   which(index);
    std::vector<uint8_t> expected((size_t) (streams*cells*cell_bytes), 0x55);
    simt::output<uint8_t> out(expected, 2);

    ggml_tensor values = tensor(GGML_TYPE_F32, in.data(), { { row, tokens, streams, 1 }, { 0, 4*(row + gap), 0, 0 } });
    ggml_tensor rows   = tensor(index_type, which.data(), { { tokens, streams, 1, 1 }, {} });
    ggml_tensor op     = tensor(turbo_type(k), out.data(), { { row, cells, streams, 1 }, { 0, cell_bytes, 0, 0 } });
    op.src[0] = &values;
    op.src[1] = &rows;
    compute(op, GGML_OP_SET_ROWS);
    for (int64_t s = 0; s < streams; ++s) {
        for (int64_t t = 0; t < tokens; ++t) {
            const float * from = &x[(size_t) ((s*tokens + t)*(row + gap))];
            const auto    coded = reference(k, std::vector<float>(from, from + row));
            const int64_t cell  = s*cells + index[(size_t) (s*tokens + t)];
            memcpy(&expected[(size_t) (cell*cell_bytes)], coded.data(), coded.size());
        }
    }
    if (!same(out.read(), expected)) {
        wrong("SET_ROWS to turbo" + std::to_string(k));
    }
}

// SET_ROWS of keys, then of values, with nodes between that compute nothing: together where that is right.
static void test_two(int k, int v) {
    constexpr int64_t tokens = 3, cells = 5, row_k = 192, row_v = 128;
    std::normal_distribution<float> normal;
    const std::vector<int64_t> index = { 4, 0, 2 };
    simt::input<int64_t>       which(index);
    const auto keys   = make(tokens*row_k/QK_TURBO, [&] { return normal(random_numbers); });
    const auto values = make(tokens*row_v/QK_TURBO, [&] { return normal(random_numbers); });
    simt::input<float> in_k(keys), in_v(values);
    const auto cache = [&](int bits, int64_t row) {
        return std::vector<uint8_t>((size_t) (cells*row/QK_TURBO*TURBO_BLOCK_BYTES(bits)), 0x55);
    };
    simt::output<uint8_t> out_k(cache(k, row_k), 2), out_v(cache(v, row_v), 2);
    ggml_tensor from_k = tensor(GGML_TYPE_F32, in_k.data(), { { row_k, tokens, 1, 1 }, {} });
    ggml_tensor from_v = tensor(GGML_TYPE_F32, in_v.data(), { { row_v, tokens, 1, 1 }, {} });
    ggml_tensor rows   = tensor(GGML_TYPE_I64, which.data(), { { tokens, 1, 1, 1 }, {} });
    ggml_tensor cache_k{}, cache_v{};
    const auto set_rows = [&](int bits, uint8_t * data, int64_t row, ggml_tensor & from, ggml_tensor & owner) {
        ggml_tensor op = tensor(turbo_type(bits), data, { { row, cells, 1, 1 }, {} });
        op.op       = GGML_OP_SET_ROWS;
        op.flags    = GGML_TENSOR_FLAG_COMPUTE;
        op.view_src = &owner;
        op.src[0]   = &from;
        op.src[1]   = &rows;
        return op;
    };
    ggml_tensor first = set_rows(k, out_k.data(), row_k, from_k, cache_k), view = from_v;
    ggml_tensor second = set_rows(v, out_v.data(), row_v, from_v, cache_v);
    view.op = GGML_OP_VIEW;
    ggml_tensor * nodes[] = { &first, &view, &second };

    const auto stays = [&](const char * why) {
        if (ggml_cuda_turbo_fuse(context, nodes, 3) != 0) {
            wrong(std::string("two SET_ROWS are one launch, ") + why);
        }
    };
    const auto without = [&](auto & field, auto other, const char * why) {
        const auto before = std::exchange(field, other);
        stays(why);
        field = before;
    };
    without(view.op, GGML_OP_SCALE, "though something is computed between");
    without(second.view_src, &cache_k, "though both write to one cache");
    without(second.flags, 0, "though the second is not to be computed");
    without(first.flags, 0, "though the first is not to be computed");
    without(second.type, GGML_TYPE_F16, "though the second is no type of ours");
    without(second.op, GGML_OP_CPY, "though the second is another operator");
    without(from_v.ne[1], 17, "though there are many rows");
    without(context.curr_stream_no, 1, "though other streams run");
    if (ggml_cuda_turbo_fuse(context, nodes, 2) != 0 || ggml_cuda_turbo_fuse(context, nodes + 1, 2) != 0) {
        wrong("one SET_ROWS is taken for two");
    }
    if (!same(out_k.read(), cache(k, row_k)) || !same(out_v.read(), cache(v, row_v))) {
        wrong("something is computed, and nothing is said of it");
    }
    if (ggml_cuda_turbo_fuse(context, nodes, 3) != 2) {
        wrong("two SET_ROWS are two launches");
    }
    const auto expected = [&](int bits, int64_t row, const std::vector<float> & x) {
        std::vector<uint8_t> out = cache(bits, row);
        const auto coded = reference(bits, x);
        const size_t bytes = coded.size()/tokens;
        for (size_t t = 0; t < tokens; ++t) {
            memcpy(&out[(size_t) index[t]*bytes], &coded[t*bytes], bytes);
        }
        return out;
    };
    if (!same(out_k.read(), expected(k, row_k, keys)) || !same(out_v.read(), expected(v, row_v, values))) {
        wrong("two SET_ROWS in one launch, to turbo" + std::to_string(k) + " and turbo" + std::to_string(v));
    }
}

// CPY from f16 and bf16, to another shape.
static void test_encode_copy(int k, ggml_type type) {
    std::normal_distribution<float> normal;
    const std::vector<float> x = make(6, [&] { return normal(random_numbers); });
    std::vector<uint16_t>    raw(x.size());
    std::vector<float>       rounded(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        raw[i]     = type == GGML_TYPE_F16 ? ggml_fp32_to_fp16(x[i]) : ggml_fp32_to_bf16(x[i]).bits;
        rounded[i] = type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(raw[i]) : ggml_bf16_to_fp32({ raw[i] });
    }
    simt::input<uint16_t> in(raw);
    simt::output<uint8_t> out((size_t) 6*TURBO_BLOCK_BYTES(k), 2);
    ggml_tensor values = tensor(type, in.data(), { { 128, 3, 1, 1 }, {} });
    ggml_tensor op     = tensor(turbo_type(k), out.data(), { { 192, 1, 2, 1 }, {} });
    op.src[0] = &values;
    op.src[1] = &op;
    compute(op, GGML_OP_CPY);
    if (!same(out.read(), reference(k, rounded))) {
        wrong(std::string("CPY from ") + ggml_type_name(type) + " to turbo" + std::to_string(k));
    }
}

// ---- decoding ----

static std::vector<uint8_t> any_blocks(int k, int n) {
    std::vector<uint8_t> out((size_t) n*TURBO_BLOCK_BYTES(k));
    for (uint8_t & b : out) {
        b = (uint8_t) random_numbers();
    }
    return out;
}

static void test_get_rows(int k) {
    constexpr int64_t row = 192, rows = 5, layers = 2;
    const auto blocks = any_blocks(k, row/QK_TURBO*rows*layers);
    const auto values = decoded(k, blocks);
    const std::vector<int32_t> index = { 3, 0, 3, 1 };
    simt::input<uint8_t> in(blocks, 2);
    simt::input<int32_t> which(index);
    simt::output<float>  out((size_t) (4*row));
    ggml_tensor coded = tensor(turbo_type(k), in.data(), { { row, rows, layers, 1 }, {} });
    ggml_tensor ids   = tensor(GGML_TYPE_I32, which.data(), { { 2, layers, 1, 1 }, {} });
    ggml_tensor op    = tensor(GGML_TYPE_F32, out.data(), { { row, 2, layers, 1 }, {} });
    op.src[0] = &coded;
    op.src[1] = &ids;
    compute(op, GGML_OP_GET_ROWS);
    std::vector<float> expected;
    for (size_t i = 0; i < 4; ++i) {
        const float * from = &values[(i/2*rows + (size_t) index[i])*row];
        expected.insert(expected.end(), from, from + row);
    }
    if (!same(out.read(), expected)) {
        wrong("GET_ROWS of turbo" + std::to_string(k));
    }
}

template<typename T> static std::vector<T> rounded(const std::vector<float> & x) {
    std::vector<T> out(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        out[i] = turbo_to<T>(x[i]);
    }
    return out;
}

// CPY, and the functions for convert.cu: of rows side by side, and of rows with gaps.
template<typename T> static void test_decode(int k, ggml_type type) {
    const auto blocks   = any_blocks(k, 12);
    const auto expected = rounded<T>(decoded(k, blocks));
    simt::input<uint8_t> in(blocks, 2);
    const ggml_cuda_turbo_converter converter = { turbo_type(k) };
    {
        simt::output<T> out(12*QK_TURBO);
        ggml_tensor coded = tensor(turbo_type(k), in.data(), { { 192, 2, 2, 1 }, {} });
        ggml_tensor op    = tensor(type, out.data(), { { 384, 2, 1, 1 }, {} });
        op.src[0] = &coded;
        op.src[1] = &op;
        compute(op, GGML_OP_CPY);
        if (!same(out.read(), expected)) {
            wrong("CPY from turbo" + std::to_string(k) + " to " + ggml_type_name(type));
        }
    }
    {
        simt::output<T> out(12*QK_TURBO);
        to_t_cuda_t<T> convert = converter;
        convert(in.data(), out.data(), 12*QK_TURBO, nullptr);
        if (!same(out.read(), expected)) {
            wrong("conversion from turbo" + std::to_string(k) + " to " + ggml_type_name(type));
        }
    }
    { // the heads of a cache: 2 heads of 2 blocks, 3 tokens, permuted so that the tokens of a head follow each other
        simt::output<T> out(12*QK_TURBO);
        to_t_nc_cuda_t<T> convert = converter;
        convert(in.data(), out.data(), 128, 3, 2, 1, 4, 2, 12, nullptr);
        std::vector<T> permuted;
        for (size_t head = 0; head < 2; ++head) {
            for (size_t token = 0; token < 3; ++token) {
                const T * from = &expected[(token*4 + head*2)*QK_TURBO];
                permuted.insert(permuted.end(), from, from + 128);
            }
        }
        if (!same(out.read(), permuted)) {
            wrong("conversion of heads from turbo" + std::to_string(k) + " to " + ggml_type_name(type));
        }
    }
}

static void test_copy(int k) {
    const int64_t bytes = TURBO_BLOCK_BYTES(k);
    const auto blocks = any_blocks(k, 12);
    simt::input<uint8_t>  in(blocks, 2);
    simt::output<uint8_t> out((size_t) (6*bytes), 2);
    ggml_tensor from = tensor(turbo_type(k), in.data(), { { 128, 3, 1, 1 }, { 0, 4*bytes, 0, 0 } });
    ggml_tensor op   = tensor(turbo_type(k), out.data(), { { 128, 3, 1, 1 }, {} });
    op.src[0] = &from;
    for (ggml_op what : { GGML_OP_CONT, GGML_OP_DUP, GGML_OP_CPY }) {
        if (what == GGML_OP_CPY) { // to another shape with rows as long
            op = tensor(turbo_type(k), out.data(), { { 128, 1, 3, 1 }, {} });
            op.src[0] = &from;
        }
        memset(out.data(), 0, out.size());
        compute(op, what);
        for (int64_t i = 0; i < 3; ++i) {
            if (memcmp(out.data() + i*2*bytes, &blocks[(size_t) (i*4*bytes)], (size_t) (2*bytes)) != 0) {
                wrong(std::string(ggml_op_name(what)) + " of turbo" + std::to_string(k));
            }
        }
    }
}

// ---- what is refused ----

static void test_refusals() {
    const auto ask = [](ggml_op what, ggml_tensor op, ggml_tensor a, ggml_tensor b, int expected, const char * why) {
        op.op     = what;
        op.src[0] = &a;
        op.src[1] = &b;
        if (ggml_cuda_turbo_supports(0, &op) != expected) {
            wrong(std::string("supports ") + ggml_op_name(what) + ": " + why);
        }
        if (expected != 1 && ggml_cuda_turbo_compute(context, &op)) {
            wrong(std::string("computes ") + ggml_op_name(what) + ": " + why);
        }
    };
    const auto of = [](ggml_type type, int64_t ne0, int64_t ne1, int64_t nb0 = 0, int64_t nb1 = 0) {
        return tensor(type, nullptr, { { ne0, ne1, 1, 1 }, { nb0, nb1, 0, 0 } });
    };
    const ggml_type turbo = GGML_TYPE_TURBO3, other = GGML_TYPE_TURBO4;
    const ggml_type f32 = GGML_TYPE_F32, f16 = GGML_TYPE_F16, i32 = GGML_TYPE_I32;
    ask(GGML_OP_CPY, of(f32, 64, 2), of(f32, 64, 2), of(f32, 64, 2), -1, "no type of ours");
    ask(GGML_OP_MUL_MAT, of(f32, 4, 2), of(GGML_TYPE_Q4_0, 64, 4), of(f32, 64, 2), -1, "no type of ours");
    // a row of 96 values is a block and a half
    ask(GGML_OP_CPY, of(turbo, 64, 3), of(f32, 96, 2), of(turbo, 64, 3), 0, "values of a block in two rows");
    ask(GGML_OP_CPY, of(f32, 96, 2), of(turbo, 64, 3), of(f32, 96, 2), 0, "values of a block in two rows");
    ask(GGML_OP_CPY, of(turbo, 64, 2), of(f32, 64, 2, 8), of(turbo, 64, 2), 0, "values of a block with gaps");
    ask(GGML_OP_CPY, of(f32, 64, 2, 8), of(turbo, 64, 2), of(f32, 64, 2, 8), 0, "values of a block with gaps");
    ask(GGML_OP_CPY, of(f32, 128, 4), of(turbo, 64, 8, 0, 52), of(f32, 128, 4), 0, "rows of another length, and gaps");
    ask(GGML_OP_CPY, of(turbo, 64, 8, 0, 52), of(f32, 128, 4), of(turbo, 64, 8), 0, "rows of another length, and gaps");
    ask(GGML_OP_CPY, of(other, 64, 2), of(turbo, 64, 2), of(other, 64, 2), 0, "from one type of ours to another");
    ask(GGML_OP_CPY, of(GGML_TYPE_Q8_0, 64, 2), of(turbo, 64, 2), of(f32, 64, 2), 0, "to another quantized type");
    ask(GGML_OP_CPY, of(i32, 64, 2), of(turbo, 64, 2), of(i32, 64, 2), 0, "to integers");
    ask(GGML_OP_DUP, of(f32, 64, 2), of(turbo, 64, 2), of(f32, 64, 2), 0, "DUP does not convert");
    ask(GGML_OP_SET_ROWS, of(turbo, 64, 2), of(f32, 64, 2), of(f32, 2, 1), 0, "indices that are no integers");
    ask(GGML_OP_SET_ROWS, of(turbo, 64, 2), of(i32, 64, 2), of(i32, 2, 1), 0, "values that are integers");
    ask(GGML_OP_GET_ROWS, of(f32, 64, 2), of(turbo, 64, 2), of(f32, 2, 1), 0, "indices that are no integers");
    ask(GGML_OP_MUL_MAT, of(f32, 4, 2), of(turbo, 64, 4), of(f32, 64, 2), 1, "weights of ours");
    ask(GGML_OP_MUL_MAT, of(f32, 4, 2), of(turbo, 64, 4), of(f16, 64, 2), 0, "activations in f16");
    ask(GGML_OP_MUL_MAT, of(f32, 4, 2), of(turbo, 64, 4, 0, 30), of(f32, 64, 2), 0, "rows that begin within a block");
    ask(GGML_OP_MUL_MAT, of(f32, 4, 2), of(turbo, 64, 4, 0, 52), of(f32, 64, 2), 1, "rows with gaps");
    ask(GGML_OP_MUL_MAT, of(f32, 4, 2), of(f32, 64, 4), of(turbo, 64, 2), 0, "activations of ours");
    ggml_tensor experts = of(f32, 4, 2);
    experts.op_params[3] = GGML_PREC_F32;
    ask(GGML_OP_MUL_MAT_ID, of(f32, 4, 2), of(turbo, 64, 4), of(f32, 64, 2), 1, "weights of ours");
    ask(GGML_OP_MUL_MAT_ID, experts, of(turbo, 64, 4), of(f32, 64, 2), 0, "a precision that the code has not");
    ask(GGML_OP_VIEW, of(turbo, 64, 2), of(turbo, 64, 2), of(turbo, 64, 2), 1, "nothing to compute");
    // every other operator, though llama.cpp's code says yes to many, whatever their types, and then aborts
    for (int what = 0; what < GGML_OP_COUNT; ++what) {
        bool known = false;
        for (const turbo_operator & o : turbo_operators) {
            known = known || o.op == what;
        }
        if (!known) {
            ask((ggml_op) what, of(turbo, 64, 2), of(turbo, 64, 2), of(f32, 64, 2), 0, "not of ours");
            ask((ggml_op) what, of(f32, 64, 2), of(turbo, 64, 2), of(f32, 64, 2), 0, "not of ours");
        }
    }
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 2;
    }
    const int blocks = atoi(argv[2]);
    for (simt::schedule order : simt::schedules) {
        simt::set_schedule(order, 7);
        for (int k = 2; k <= 4; ++k) {
            test_bytes(k, blocks);
            test_set_rows<int64_t>(k, GGML_TYPE_I64);
            test_set_rows<int32_t>(k, GGML_TYPE_I32);
            for (int v = 2; v <= 4; ++v) {
                test_two(k, v);
            }
            test_encode_copy(k, GGML_TYPE_F16);
            test_encode_copy(k, GGML_TYPE_BF16);
            test_get_rows(k);
            test_decode<float>(k, GGML_TYPE_F32);
            test_decode<half>(k, GGML_TYPE_F16);
            test_decode<nv_bfloat16>(k, GGML_TYPE_BF16);
            test_copy(k);
        }
    }
    test_refusals();
    if (turbo_check_vectors(argv[1], encode_blocks, decode_blocks) != 0) {
        wrong("vectors.bin");
    }
    printf("right: 3 schedules, 3 types, 5 kinds of data of %d blocks, operators, refusals, vectors.bin\n", blocks);
}
