#pragma once

// What the programs of llama.cpp tell of their KV cache. Included before everything else in llama-server's answers.

#include "json.h"

// Has the log say it of each cache that is made.
void llama_turbo_log_caches();

// Of the cache that was made last, drafts' aside: types, their bits a value, tokens of the recent window. Null if none was.
common_json llama_turbo_cache_json();
