// Blocks of any bytes through every CPU path that reads stored blocks, and any floats through the encoders. Every pattern of
// bytes is a valid block: all that is decoded is finite, and the CPU back end gives the same bits as the reference.

#include "fuzz.h"

#include "cpu/turbo-cpu.h"
#include "ggml-cpu.h"
#include "ggml-turbo.h"
#include "ggml.h"
#include "ops/turbo-window.h"

#include <algorithm>

namespace {

struct type {
    int       bits;
    ggml_type ggml;
    void (*decode_cpu)(const void *, float *, int64_t);
};

const type TYPES[] = {
    { 2, GGML_TYPE_TURBO2, dequantize_row_turbo2_cpu },
    { 3, GGML_TYPE_TURBO3, dequantize_row_turbo3_cpu },
    { 4, GGML_TYPE_TURBO4, dequantize_row_turbo4_cpu },
};

void fill_floats(fuzz_random & random, float * x, int64_t n) {
    const uint64_t kind = random.below(8);
    const float    size = std::ldexp(1.0f, (int) random.below(100) - 60), constant = random.hostile_float();
    for (int64_t i = 0; i < n; ++i) {
        switch (kind) {
            case 0:  x[i] = random.hostile_float(); break;
            case 1:  x[i] = constant; break;
            case 2:  x[i] = random.one_in(16) ? random.hostile_float() : random.gaussian(); break;
            case 3:  x[i] = random.one_in(32) ? size : 0.0f; break;
            case 4:  x[i] = random.gaussian()*std::exp(4*random.gaussian()); break;
            default: x[i] = random.gaussian()*size; break;
        }
    }
}

void fill_blocks(fuzz_random & random, const type & t, uint8_t * blocks, int64_t n) {
    const size_t size = TURBO_BLOCK_BYTES(t.bits);
    const uint64_t kind = random.below(7);
    const uint8_t  byte = (uint8_t) random.bits();
    float x[QK_TURBO];
    for (uint8_t * block = blocks; block < blocks + n*size; block += size) {
        random.fill(block, size);
        switch (kind) {
            case 0: // Gaussian values
            case 1: // with some bits flipped
                if (block < blocks + 4*size) {
                    for (float & value : x) {
                        value = random.gaussian();
                    }
                    turbo_quantize_block(turbo_get_codec(t.bits), x, block);
                } else { // the reference's search takes long
                    memcpy(block, blocks + random.below(4)*size, size);
                }
                for (int flips = kind == 1 ? 4 : 0; flips > 0; --flips) {
                    block[random.below(size)] ^= (uint8_t) (1 << random.below(8));
                }
                break;
            case 2: // one byte
                memset(block, random.pick({ (uint8_t) 0, (uint8_t) 255, byte }), size);
                break;
            case 3: { // half floats that are none, infinities, and the largest
                const uint16_t half = random.pick<uint16_t>({ 0x7e00, 0xfe00, 0x7c00, 0xfc00, 0x7bff, 0x7fff, 0x0001 });
                for (size_t i = 0; i < size; ++i) {
                    block[i] = (uint8_t) (half >> (i % 2*8));
                }
                break;
            }
            case 4: { // the ends of the scale
                const int code = random.pick({ 0, 1, (1 << (8 + t.bits)) - 1, (1 << (8 + t.bits)) - 2, 1 << (t.bits + 2) });
                const int header = code | (int) random.below(1 << (8 - t.bits)) << (8 + t.bits);
                block[0] = header & 0xff, block[1] = header >> 8;
                break;
            }
            default: break; // any bytes
        }
    }
}

float half(fuzz_random & random) { // as a half float has it, never huge
    return ggml_fp16_to_fp32(ggml_fp32_to_fp16(random.gaussian()));
}

// A graph of one node. Tensors have memory of their own.
class graph {
public:
    graph() : ctx(ggml_init({ 1 << 20, nullptr, true })) {}
    ~graph() { ggml_free(ctx); }

    ggml_tensor * tensor(ggml_type t, int64_t a, int64_t b = 1, int64_t c = 1, int64_t d = 1) {
        return with_memory(ggml_new_tensor_4d(ctx, t, a, b, c, d));
    }

    ggml_tensor * with_memory(ggml_tensor * t) {
        memory.push_back(std::make_unique<fuzz_bytes>(ggml_nbytes(t)));
        t->data = memory.back()->data();
        return t;
    }

    void compute(ggml_tensor * node) {
        if (node->view_src) {
            node->data = (char *) node->view_src->data + node->view_offs;
        } else {
            with_memory(node);
        }
        ggml_cgraph * nodes = ggml_new_graph_custom(ctx, 16, false);
        ggml_build_forward_expand(nodes, node);
        ggml_cplan plan = ggml_graph_plan(nodes, 1, nullptr);
        fuzz_bytes work(plan.work_size);
        plan.work_data = work.data();
        expect(ggml_graph_compute(nodes, &plan) == GGML_STATUS_SUCCESS, "a graph could not be computed");
    }

    ggml_context * const ctx;

private:
    std::vector<std::unique_ptr<fuzz_bytes>> memory;
};

class blocks : public fuzz_target {
public:
    blocks() { ggml_cpu_init(); }

    void run(fuzz_random & random) override {
        const type & t = random.of(TYPES);
        decode(random, t);
        encode(random, t);
        ++rows;
        switch (random.below(24)) {
            case 0: attend(random, false); ++attentions; break;
            case 1: attend(random, true);  ++attentions; break;
            case 2: move_rows(random, t); break;
        }
    }

    std::string summary() const override {
        return std::to_string(rows) + " rows decoded, encoded and multiplied, " + std::to_string(attentions) + " attentions";
    }

private:
    uint64_t rows = 0, attentions = 0;

    static void decode(fuzz_random & random, const type & t) {
        const int64_t n = 1 + random.below(5), size = TURBO_BLOCK_BYTES(t.bits), values = n*QK_TURBO;
        const size_t  before = random.below(4); // blocks need no alignment
        fuzz_bytes stored(before + n*size), reference(values*sizeof(float)), cpu(values*sizeof(float)), q8(values/32*34);
        uint8_t * bytes = stored.data() + before;
        fill_blocks(random, t, bytes, n);

        ggml_get_type_traits(t.ggml)->to_float(bytes, reference.as<float>(), values);
        t.decode_cpu(bytes, cpu.as<float>(), values);
        expect(memcmp(reference.data(), cpu.data(), cpu.size()) == 0, "decoded differently from the reference");
        const float * y = reference.as<float>();
        for (int64_t i = 0; i < values; ++i) {
            const float scale = turbo_block_scale(t.bits, bytes + i/QK_TURBO*size);
            expect(std::abs(y[i]) <= 128*scale && scale <= 0x1p24f, "a decoded value is out of range");
        }

        random.fill(q8.data(), q8.size());
        for (int64_t i = 0; i < values; ++i) { // -128 is none of q8_0's
            int8_t & value = (int8_t &) q8.data()[i/32*34 + 2 + i%32];
            value = std::max<int8_t>(value, -127);
        }
        const bool is_hostile = random.one_in(4);
        for (int64_t i = 0; i < values/32 && !is_hostile; ++i) {
            const ggml_fp16_t d = ggml_fp32_to_fp16(half(random));
            memcpy(q8.data() + 34*i, &d, sizeof(d));
        }
        float dot;
        ggml_get_type_traits_cpu(t.ggml)->vec_dot((int) values, &dot, 0, bytes, 0, q8.data(), 0, 1);
        if (!is_hostile) {
            double sum = 0, magnitude = 0;
            for (int64_t i = 0; i < values; ++i) {
                ggml_fp16_t d;
                memcpy(&d, q8.data() + i/32*34, sizeof(d));
                const double term = (double) y[i]*ggml_fp16_to_fp32(d)*(int8_t) q8.data()[i/32*34 + 2 + i%32];
                sum += term;
                magnitude += std::abs(term);
            }
            // rounded a few times in each of at most 10 partial sums; or below all normal numbers
            expect(std::abs(dot - sum) <= 64*0x1p-24*magnitude + 1e-37, "a dot product is off");
        }
    }

    static void encode(fuzz_random & random, const type & t) {
        const int64_t n = 1 + random.below(3), size = TURBO_BLOCK_BYTES(t.bits), values = n*QK_TURBO;
        fuzz_bytes x(values*sizeof(float)), reference(n*size), cpu(n*size), y(values*sizeof(float));
        fill_floats(random, x.as<float>(), values);
        ggml_get_type_traits(t.ggml)->from_float_ref(x.as<float>(), reference.data(), values);
        ggml_get_type_traits_cpu(t.ggml)->from_float(x.as<float>(), cpu.data(), values);
        expect(memcmp(reference.data(), cpu.data(), n*size) == 0, "encoded differently from the reference");
        t.decode_cpu(cpu.data(), y.as<float>(), values);
        for (int64_t b = 0; b < n; ++b) {
            float largest = 0;
            for (int64_t i = b*QK_TURBO; i < (b + 1)*QK_TURBO; ++i) {
                const float v = std::abs(x.as<float>()[i]);
                largest = v < INFINITY && v > largest ? v : largest;
            }
            for (int64_t i = b*QK_TURBO; i < (b + 1)*QK_TURBO; ++i) {
                // no codec of so few bits is exact, but none invents values far larger than those it was given
                expect(std::abs(y.as<float>()[i]) <= 4*largest, "a value became far larger than all of its block");
            }
        }
    }

    // Rows that are stored, read and multiplied by ggml's own operators.
    static void move_rows(fuzz_random & random, const type & t) {
        graph g;
        const int64_t width = QK_TURBO*(1 + random.below(3)), n_rows = 1 + random.below(6), n = 1 + random.below(n_rows);
        ggml_tensor * cache = g.tensor(t.ggml, width, n_rows), * x = g.tensor(GGML_TYPE_F32, width, n);
        ggml_tensor * places = g.tensor(GGML_TYPE_I64, n), * wanted = g.tensor(GGML_TYPE_I32, n);
        fill_blocks(random, t, (uint8_t *) cache->data, n_rows*width/QK_TURBO);
        fill_floats(random, (float *) x->data, n*width);
        for (int64_t i = 0; i < n; ++i) {
            ((int64_t *) places->data)[i] = i;
            ((int32_t *) wanted->data)[i] = (int32_t) random.below(n_rows);
        }
        g.compute(ggml_set_rows(g.ctx, cache, x, places));
        ggml_tensor * read = ggml_get_rows(g.ctx, cache, wanted);
        g.compute(read);
        std::vector<float> row(width);
        for (int64_t i = 0; i < n; ++i) {
            ggml_get_type_traits(t.ggml)->to_float((char *) cache->data + ((int32_t *) wanted->data)[i]*cache->nb[1], row.data(), width);
            expect(memcmp(row.data(), (char *) read->data + i*read->nb[1], width*sizeof(float)) == 0, "a row was read differently");
        }
        ggml_tensor * y = g.tensor(GGML_TYPE_F32, width, 2);
        for (int64_t i = 0; i < 2*width; ++i) {
            ((float *) y->data)[i] = random.gaussian();
        }
        ggml_tensor * product = ggml_mul_mat(g.ctx, cache, y);
        g.compute(product);
        for (int64_t i = 0; i < ggml_nelements(product); ++i) {
            expect(std::isfinite(((float *) product->data)[i]), "a product of finite values is not finite");
        }
    }

    // ---- attention ----

    // Keys and values of one KV head, in any order, as decoded floats: what a query may see.
    struct seen {
        const float * k, * v;
    };

    static ggml_tensor * stored(graph & g, fuzz_random & random, ggml_type to, int64_t size, int64_t tokens, int64_t heads) {
        ggml_tensor * t = g.tensor(to, size, tokens, heads);
        for (const type & known : TYPES) {
            if (known.ggml == to) {
                fill_blocks(random, known, (uint8_t *) t->data, ggml_nelements(t)/QK_TURBO);
                return t;
            }
        }
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(random.gaussian());
        }
        return t;
    }

    static std::vector<float> decoded(const ggml_tensor * t) {
        std::vector<float> values(ggml_nelements(t));
        ggml_get_type_traits(t->type)->to_float(t->data, values.data(), values.size());
        return values;
    }

    static ggml_tensor * mask(graph & g, fuzz_random & random, int64_t keys, int64_t queries) {
        ggml_tensor * t = g.tensor(GGML_TYPE_F16, keys, queries);
        for (int64_t i = 0; i < keys*queries; ++i) {
            const bool is_seen = i % keys == 0 || random.one_in(2); // each query sees something
            ((ggml_fp16_t *) t->data)[i] = ggml_fp32_to_fp16(is_seen ? 0.0f : -INFINITY);
        }
        return t;
    }

    // A result is a mean of the values seen, and near that of exact arithmetic: queries are rounded to 8 bits, which moves a
    // score by at most `off`, and weights to 16 bits of the largest among 64.
    static void check_result(const float * result, const float * q, const std::vector<seen> & keys, int64_t size_k, int64_t size_v, float scale) {
        std::vector<double> scores, exact(size_v, 0.0);
        double off = 0, top = -INFINITY, total = 0, largest = 0;
        for (const seen & key : keys) {
            double score = 0, rounding = 0;
            for (int64_t chunk = 0; chunk < size_k; chunk += QK_TURBO) {
                double largest_q = 0, sum = 0;
                for (int64_t d = chunk; d < chunk + QK_TURBO; ++d) {
                    score += (double) q[d]*key.k[d];
                    largest_q = std::max(largest_q, std::abs((double) q[d]));
                    sum += std::abs((double) key.k[d]);
                }
                rounding += largest_q*(1/253.0 + 1e-4)*sum;
            }
            scores.push_back(score*scale);
            off = std::max(off, rounding*scale + 1e-6);
            top = std::max(top, score*scale);
        }
        for (size_t i = 0; i < keys.size(); ++i) {
            const double weight = std::exp(scores[i] - top);
            total += weight;
            for (int64_t d = 0; d < size_v; ++d) {
                exact[d] += weight*keys[i].v[d];
                largest = std::max(largest, std::abs((double) keys[i].v[d]));
            }
        }
        const double tolerance = (std::min(std::expm1(2*off), 2.0) + 4e-3)*largest + 1e-30;
        for (int64_t d = 0; d < size_v; ++d) {
            expect(std::isfinite(result[d]), "a result of attention is not finite");
            expect(std::abs(result[d]) <= largest*1.01 + 1e-30, "a result of attention is larger than all values");
            expect(std::abs(result[d] - exact[d]/total) <= tolerance, "a result of attention is off");
        }
    }

    static void attend(fuzz_random & random, bool has_window) {
        graph g;
        const auto any_type = [&] { return random.pick({ GGML_TYPE_TURBO2, GGML_TYPE_TURBO3, GGML_TYPE_TURBO4 }); };
        const ggml_type type_k = any_type(), type_v = has_window || random.one_in(4) ? type_k : any_type();
        const int64_t size_k = QK_TURBO*(1 + random.below(2)), size_v = QK_TURBO*(1 + random.below(2));
        const int64_t kv_heads = 1 + random.below(2), heads = kv_heads*(1 + random.below(3)), queries = 1 + random.below(3);
        const int64_t tokens = 1 + random.below(140), slots = 1 + random.below(20);
        const float   scale = 1/std::sqrt((float) size_k);
        ggml_tensor * q = g.tensor(GGML_TYPE_F32, size_k, queries, heads);
        for (int64_t i = 0; i < ggml_nelements(q); ++i) {
            ((float *) q->data)[i] = random.gaussian();
        }
        ggml_tensor * k = stored(g, random, type_k, size_k, tokens, kv_heads), * v = stored(g, random, type_v, size_v, tokens, kv_heads);
        ggml_tensor * mask_c = mask(g, random, tokens, queries);
        ggml_tensor * ring = nullptr, * new_k = nullptr, * new_v = nullptr, * mask_w = nullptr, * columns = nullptr, * node;
        if (has_window) {
            ring    = stored(g, random, GGML_TYPE_F16, kv_heads*(size_k + size_v), slots, 1);
            ring->ne[2] = 1;
            new_k   = stored(g, random, GGML_TYPE_F16, size_k, queries, kv_heads);
            new_v   = stored(g, random, GGML_TYPE_F16, size_v, queries, kv_heads);
            mask_w  = mask(g, random, slots + queries, queries);
            columns = g.tensor(GGML_TYPE_I32, tokens);
            for (int64_t i = 0; i < tokens; ++i) {
                ((int32_t *) columns->data)[i] = random.one_in(3) ? (int32_t) random.below(slots + queries) : -1;
            }
            ggml_tensor * sources[TURBO_WINDOW_SOURCES] = { q, k, v, mask_c, nullptr, ring, new_k, new_v, mask_w, columns };
            node = turbo_window_attention(g.ctx, sources, scale, 0.0f, 0.0f);
        } else {
            node = ggml_flash_attn_ext(g.ctx, q, k, v, mask_c, scale, 0.0f, 0.0f);
        }
        g.compute(node);

        const auto to_float = [](const ggml_tensor * t, int64_t at) { return ggml_fp16_to_fp32(((const ggml_fp16_t *) t->data)[at]); };
        const std::vector<float> keys = decoded(k), values = decoded(v);
        std::vector<float> ring_values, new_keys, new_values;
        if (has_window) {
            ring_values = decoded(ring), new_keys = decoded(new_k), new_values = decoded(new_v);
        }
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t kv = head/(heads/kv_heads);
            for (int64_t query = 0; query < queries; ++query) {
                std::vector<seen> sees;
                for (int64_t i = 0; i < tokens; ++i) {
                    const int32_t column = has_window ? ((int32_t *) columns->data)[i] : -1;
                    const bool is_in_window = column >= 0 && to_float(mask_w, query*mask_w->ne[0] + column) == 0.0f;
                    if (to_float(mask_c, query*tokens + i) == 0.0f && !is_in_window) {
                        sees.push_back({ &keys[(kv*tokens + i)*size_k], &values[(kv*tokens + i)*size_v] });
                    }
                }
                for (int64_t i = 0; has_window && i < slots + queries; ++i) {
                    if (to_float(mask_w, query*mask_w->ne[0] + i) != 0.0f) {
                        continue;
                    }
                    const float * row = i < slots ? &ring_values[i*ring->ne[0]] : nullptr;
                    sees.push_back({ row ? row + kv*size_k                      : &new_keys  [(kv*queries + i - slots)*size_k],
                                     row ? row + kv_heads*size_k + kv*size_v    : &new_values[(kv*queries + i - slots)*size_v] });
                }
                check_result((const float *) node->data + (query*heads + head)*size_v, (const float *) q->data + (head*queries + query)*size_k,
                    sees, size_k, size_v, scale);
            }
        }
    }
};

} // namespace

std::unique_ptr<fuzz_target> fuzz_blocks() {
    return std::make_unique<blocks>();
}
