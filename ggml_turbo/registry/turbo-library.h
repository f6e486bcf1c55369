#pragma once

// Where the libraries of this process lie. With GGML_BACKEND_DL back ends are files beside libggml, and which of the CPU's is
// in use is known only at run time. Windows' paths are in UTF-8.

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// The file of the library that holds what is at this address, such as a function or a ggml_backend_reg_t; NULL if none
// does. Valid until the calling thread asks again.
GGML_API const char * turbo_library_path(const void * address);

#ifdef __cplusplus
}

#include <string>

// The folder that libggml itself is in.
std::string turbo_library_folder();

#endif
