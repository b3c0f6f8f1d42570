/* Stands before the compiler's own header of this name: the AVX2 and AVX-512 of SIMDe, which are
   plain C, so that kernels can be checked on a processor that has neither. */
#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE
#include <simde/x86/avx512.h>

#ifndef _mm512_cmpneq_epi8_mask         /* old versions have only its opposite */
#define _mm512_cmpneq_epi8_mask(a, b) (~simde_mm512_cmpeq_epi8_mask(a, b))
#endif

/* Else the compiler itself would use those instructions in a function that asks for them. */
#define target(instructions) unused
