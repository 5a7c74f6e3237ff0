/* Code for instruction sets that the compiler is not told of for the whole library. */
#ifndef FP4DIT_TARGETS_H
#define FP4DIT_TARGETS_H

/* Functions between these two are compiled for the instruction sets that `features` names. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

/* Arm's dot product of bytes, as a feature. */
#if defined(__clang__)
#define DOT_PRODUCT "dotprod"
#else
#define DOT_PRODUCT "arch=armv8.2-a+dotprod"
#endif

/* Compilers that know tile registers; Linux grants their use. */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FP4DIT_AMX 1
#endif

#define INLINE static inline __attribute__((always_inline))

#endif
