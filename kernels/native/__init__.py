"""The C library of the CPU kernels, which CMake builds, and its loader."""
