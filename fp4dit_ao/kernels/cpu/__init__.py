"""CPU kernels: a library of C, opened with ctypes."""
