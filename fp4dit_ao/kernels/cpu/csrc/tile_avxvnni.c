/* AVX-VNNI: VNNI's dot product in 256-bit registers, for processors without AVX-512. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avxvnni")
#include <immintrin.h>

#define DOT _mm256_dpbusd_avx_epi32
#define OFFSET 128
#include "tile_avx2.h"

const tile_kernel tile_avxvnni = {
    .name = "avxvnni", .offset = 128, .group = 4, .unpack = unpack, .pack = pack_in_order, .multiply = multiply, .write = write_rows,
};
#endif
