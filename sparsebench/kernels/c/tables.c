/* The shuffle tables of the AVX2 and NEON expansions, filled when the library is loaded. */
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
#elif defined(SB_NEON)
uint8_t sb_shuffle_bf16[16][16] __attribute__((aligned(16)));
uint8_t sb_shuffle_f32[16][16] __attribute__((aligned(16)));
uint8_t sb_few[16];

__attribute__((constructor)) static void fill_tables(void) {
    memset(sb_shuffle_bf16, 255, sizeof sb_shuffle_bf16); /* an index beyond the table makes tbl write zero */
    memset(sb_shuffle_f32, 255, sizeof sb_shuffle_f32);
    for (int kept = 0; kept < 16; kept++)
        for (int lane = 0; lane < 4; lane++) {
            if (!(kept >> lane & 1)) continue;
            int next = sb_few[kept]++;
            for (int byte = 0; byte < 4; byte++) sb_shuffle_f32[kept][4 * lane + byte] = (uint8_t)(4 * next + byte);
            for (int byte = 0; byte < 2; byte++)
                sb_shuffle_bf16[kept][4 * lane + 2 + byte] = (uint8_t)(2 * next + byte);
        }
}
#endif
