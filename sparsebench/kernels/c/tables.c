/* The shuffle tables of the AVX2 expansion, filled when the library is loaded. */
#include "common.h"

#if defined(SB_AVX2)
uint8_t sb_shuffle_bf16[256][32] __attribute__((aligned(32)));
int32_t sb_permute_f32[256][8] __attribute__((aligned(32)));

__attribute__((constructor)) static void fill_tables(void) {
    for (int kept = 0; kept < 256; kept++) {
        int next = 0;
        memset(sb_shuffle_bf16[kept], 0x80, 32); /* a set top bit makes vpshufb write zero */
        for (int lane = 0; lane < 8; lane++) {
            int there = kept >> lane & 1;
            sb_permute_f32[kept][lane] = there ? next : -1;
            if (!there) continue;
            sb_shuffle_bf16[kept][4 * lane + 2] = (uint8_t)(2 * next);
            sb_shuffle_bf16[kept][4 * lane + 3] = (uint8_t)(2 * next + 1);
            next++;
        }
    }
}
#endif

/* Which instruction set this object was compiled for: 2 avx512, 1 avx2, 0 portable. */
API int sb_isa(void) {
#if defined(SB_AVX512)
    return 2;
#elif defined(SB_AVX2)
    return 1;
#else
    return 0;
#endif
}
