#version 450

// The result of attention from its parts (turbo-attention.comp): a workgroup a row.

layout(local_size_x = 64) in;

layout(push_constant) uniform parameters {
    uint n_parts, n_rows, size_v; // rows: of all queries of this dispatch, heads and streams; heads are the fastest
    uint n_heads, n_queries;      // of this dispatch
    uint first_query, all_queries, has_sinks;
    uint sinks_offset, result_offset;
} p;

layout(binding = 0) readonly  buffer PARTS  { float data[]; } parts;
layout(binding = 1) readonly  buffer SINKS  { float data[]; } sinks;
layout(binding = 2) writeonly buffer RESULT { float data[]; } result;

#define HIDDEN uintBitsToFloat(0xff800000u) // -infinity

void main() {
    const uint row = gl_WorkGroupID.y*gl_NumWorkGroups.x + gl_WorkGroupID.x, size = p.size_v + 2u;
    if (row >= p.n_rows) {
        return;
    }
    const uint head = row % p.n_heads, query = p.first_query + row/p.n_heads % p.n_queries;
    const uint stream = row/p.n_heads/p.n_queries;
    const float sink = p.has_sinks != 0u ? sinks.data[p.sinks_offset + head] : HIDDEN; // one more key, without a value
    float largest = sink;
    for (uint i = 0u; i < p.n_parts; ++i) {
        largest = max(largest, parts.data[(i*p.n_rows + row)*size + p.size_v]);
    }
    float total = sink == HIDDEN ? 0.0 : exp(sink - largest);
    for (uint i = 0u; i < p.n_parts; ++i) {
        const uint at = (i*p.n_rows + row)*size + p.size_v;
        total += parts.data[at] == HIDDEN ? 0.0 : exp(parts.data[at] - largest)*parts.data[at + 1u];
    }
    for (uint d = gl_LocalInvocationID.x; d < p.size_v; d += 64u) {
        float sum = 0.0;
        for (uint i = 0u; i < p.n_parts; ++i) {
            const uint at = (i*p.n_rows + row)*size;
            const float top = parts.data[at + p.size_v];
            sum += top == HIDDEN ? 0.0 : exp(top - largest)*parts.data[at + d];
        }
        result.data[p.result_offset + ((stream*p.all_queries + query)*p.n_heads + head)*p.size_v + d] =
            total > 0.0 ? sum/total : 0.0;
    }
}
