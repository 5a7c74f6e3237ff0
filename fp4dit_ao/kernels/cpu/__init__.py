"""CPU kernels: a compiled library of C, opened with ctypes."""
