/* Instruction sets of this processor. */
#include "processor.h"

#include "targets.h"

#ifdef FP4DIT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    REQUEST_STATE = 0x1023, /* arch_prctl's ARCH_REQ_XCOMP_PERM */
    TILE_STATE = 18,
    BFLOAT16_BIT = 1 << 22, TILE_BIT = 1 << 24, INT8_BIT = 1 << 25 /* of CPUID leaf 7, EDX */
};
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

int has_avx512(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}

int has_avx512vnni(void) {
#if defined(__x86_64__)
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
    return 0;
#endif
}

int has_amx(void) {
#ifdef FP4DIT_AMX
    const unsigned wanted = BFLOAT16_BIT | TILE_BIT | INT8_BIT;
    unsigned a, b, c, d;
    if (!has_avx512() || !__builtin_cpu_supports("avx512bf16")) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return 0;
    return !syscall(SYS_arch_prctl, REQUEST_STATE, TILE_STATE);
#else
    return 0;
#endif
}

int has_dot_product(void) {
#if defined(__aarch64__) && defined(__linux__)
    return !!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP);
#elif defined(__aarch64__) && defined(__APPLE__)
    return 1; /* every one has it */
#else
    return 0;
#endif
}
