#pragma once

// The words of our shaders, which our CMakeLists.txt compiles.

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char     * name;
    const uint32_t * words;
    size_t           bytes;
} turbo_vk_words;

extern const turbo_vk_words turbo_vk_encode, turbo_vk_decode, turbo_vk_attention, turbo_vk_combine;

#ifdef __cplusplus
}
#endif
