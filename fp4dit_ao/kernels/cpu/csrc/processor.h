/* What this processor and its system let a process use; 0 or 1. */
#ifndef FP4DIT_PROCESSOR_H
#define FP4DIT_PROCESSOR_H

int has_avx512(void);     /* F, BW, DQ and VL */
int has_avx512vnni(void); /* with the four above */
int has_amx(void);        /* int8 and bfloat16, with the AVX-512 above and its bfloat16; asks the system for permission */
int has_dot_product(void); /* Arm's, of bytes */

#endif
