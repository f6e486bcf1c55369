# Builds for Windows on Linux: cmake -B build -DCMAKE_TOOLCHAIN_FILE=cmake/mingw-w64.cmake (docs/packaging.md).
set(CMAKE_SYSTEM_NAME      Windows)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(CMAKE_C_COMPILER       x86_64-w64-mingw32-gcc-posix)
set(CMAKE_CXX_COMPILER     x86_64-w64-mingw32-g++-posix)
set(CMAKE_RC_COMPILER      x86_64-w64-mingw32-windres)
set(CMAKE_FIND_ROOT_PATH   /usr/x86_64-w64-mingw32)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static) # the compiler's libraries, which Windows does not have
# What Debian 12's headers (version 10) have: llama.cpp asks for more only from Windows 8 on.
set(CMAKE_C_FLAGS_INIT -D_WIN32_WINNT=0x0601)
