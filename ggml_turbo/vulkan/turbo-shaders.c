#include "turbo-shaders.h"

static const uint32_t encode_words[] =
#include "turbo-encode.spv.inc"
;
static const uint32_t decode_words[] =
#include "turbo-decode.spv.inc"
;
static const uint32_t attention_words[] =
#include "turbo-attention.spv.inc"
;
static const uint32_t combine_words[] =
#include "turbo-combine.spv.inc"
;

const turbo_vk_words turbo_vk_encode    = { "turbo_encode",    encode_words,    sizeof(encode_words) };
const turbo_vk_words turbo_vk_decode    = { "turbo_decode",    decode_words,    sizeof(decode_words) };
const turbo_vk_words turbo_vk_attention = { "turbo_attention", attention_words, sizeof(attention_words) };
const turbo_vk_words turbo_vk_combine   = { "turbo_combine",   combine_words,   sizeof(combine_words) };
