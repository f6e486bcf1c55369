#pragma once

// Included before everything else in ggml-backend-reg.cpp, where back ends are loaded at run time: they are looked for beside
// libggml first, so that programs elsewhere (Python) find them too. Upstream's option names one folder, at build time.

#ifndef GGML_BACKEND_DIR
#  include "registry/turbo-library.h"
#  define GGML_BACKEND_DIR turbo_library_folder()
#endif
