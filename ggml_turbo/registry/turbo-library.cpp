#include "turbo-library.h"

#ifdef _WIN32

#  ifndef WIN32_LEAN_AND_MEAN
#    define WIN32_LEAN_AND_MEAN
#  endif
#  ifndef NOMINMAX
#    define NOMINMAX
#  endif
#  include <windows.h>

const char * turbo_library_path(const void * address) {
    static thread_local std::string path;
    HMODULE module = nullptr;
    const DWORD how = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (!GetModuleHandleExW(how, (LPCWSTR) address, &module)) {
        return nullptr;
    }
    std::wstring wide(MAX_PATH, L'\0');
    DWORD length;
    while ((length = GetModuleFileNameW(module, &wide[0], (DWORD) wide.size())) == wide.size()) {
        wide.resize(2*wide.size());
    }
    path.resize(4*length);
    path.resize(WideCharToMultiByte(CP_UTF8, 0, wide.data(), (int) length, &path[0], (int) path.size(), nullptr, nullptr));
    return path.c_str();
}

#else

#  include <dlfcn.h>

const char * turbo_library_path(const void * address) {
    Dl_info info;
    return dladdr(address, &info) ? info.dli_fname : nullptr;
}

#endif

std::string turbo_library_folder() {
    const char * path = turbo_library_path((const void *) turbo_library_folder);
    const std::string file = path ? path : "";
    const size_t slash = file.find_last_of("/\\");
    return slash == std::string::npos ? "." : file.substr(0, slash);
}
