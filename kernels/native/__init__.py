"""The CPU kernels: a C library, which CMake builds, and its loader."""
