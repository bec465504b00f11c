/* y = W x + bias, reading only the weights of inputs that count: |x| > threshold.

   The weights are stored transposed, [inputs, outputs], so that one input's weights are contiguous (TEAL, CATS,
   R-Sparse). Every thread owns a range of outputs, works through it in tiles whose float32 sums stay in L1, and adds
   eight selected inputs per pass. No atomics: the order of additions is the order of the inputs for any number of
   threads. A NaN in x is kept (|NaN| > t is false, so the test is "not |x| <= t") and reaches every output; a skipped
   input is not multiplied, so an infinite weight behind it stays silent. strips.c does the same for weights that are
   sparse themselves. */
#include "common.h"

#define AT_ONCE 8 /* inputs per pass over the sums */
#define TILE 2048 /* outputs per tile: 8 kB of sums */
#define AHEAD 8   /* selected inputs prefetched ahead: the next ones are not where hardware looks */

/* Whole passes are made up with rows of zeros: an unselected row's weights are never read. */
#define NOTHING (-1)
static const float zeros[TILE];

INLINE const void *row_of(const void *w, int format, int64_t stride, int32_t index) {
    return index == NOTHING ? (const void *)zeros : (const char *)w + index * stride * (int64_t)size_of(format);
}

#if defined(__AVX512BF16__)
/* Two inputs' weights are interleaved into pairs for the bf16 dot product; sums stay in the order of the interleave
   until they are stored. */
INLINE void pass_bf16(const bf16 *w, int64_t stride, const int32_t *index, const float *factor, int64_t width,
                      const int32_t *next, float *sum) {
    __m512i pair[AT_ONCE / 2];
    const bf16 *row[AT_ONCE], *soon[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
        row[k] = row_of(w, BF16, stride, index[k]);
        soon[k] = row_of(w, BF16, stride, next[k]);
    }
    for (int k = 0; k < AT_ONCE / 2; k++) /* bf16 inputs: nothing is rounded here */
        pair[k] = _mm512_set1_epi32((int)(to_bf16(factor[2 * k]) | (uint32_t)to_bf16(factor[2 * k + 1]) << 16));
    for (int64_t i = 0; i < width; i += 32) {
        __m512 low = _mm512_load_ps(sum + i), high = _mm512_load_ps(sum + i + 16);
        UNROLL(4) for (int k = 0; k < AT_ONCE / 2; k++) {
            __m512i a = _mm512_loadu_si512(row[2 * k] + i), b = _mm512_loadu_si512(row[2 * k + 1] + i);
            low = dot_bf16(low, _mm512_unpacklo_epi16(a, b), pair[k]);
            high = dot_bf16(high, _mm512_unpackhi_epi16(a, b), pair[k]);
        }
        UNROLL(8) for (int k = 0; k < AT_ONCE; k++) _mm_prefetch((const char *)(soon[k] + i), _MM_HINT_T0);
        _mm512_store_ps(sum + i, low);
        _mm512_store_ps(sum + i + 16, high);
    }
}

#define STEP_BF16 32
#define PLACE_BF16(i) interleaved(i)
#else
INLINE void pass_bf16(const bf16 *w, int64_t stride, const int32_t *index, const float *factor, int64_t width,
                      const int32_t *next, float *sum) {
    const bf16 *row[AT_ONCE], *soon[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
        row[k] = row_of(w, BF16, stride, index[k]);
        soon[k] = row_of(w, BF16, stride, next[k]);
    }
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        vf first = load_vf(sum + i), second = load_vf(sum + i + LANES);
        UNROLL(8) for (int k = 0; k < AT_ONCE; k++) {
            vu pairs = load_pairs(row[k] + i);
            first += first_of_pairs(pairs) * factor[k];
            second += second_of_pairs(pairs) * factor[k];
        }
        if (i % 32 == 0)
            UNROLL(8) for (int k = 0; k < AT_ONCE; k++) __builtin_prefetch(soon[k] + i);
        store_vf(sum + i, first);
        store_vf(sum + i + LANES, second);
    }
}

#define STEP_BF16 (2 * LANES)
#define PLACE_BF16(i) of_pairs(i)
#endif

INLINE void pass_f32(const float *w, int64_t stride, const int32_t *index, const float *factor, int64_t width,
                     const int32_t *next, float *sum) {
    const float *row[AT_ONCE], *soon[AT_ONCE];
    for (int k = 0; k < AT_ONCE; k++) {
        row[k] = row_of(w, F32, stride, index[k]);
        soon[k] = row_of(w, F32, stride, next[k]);
    }
    for (int64_t i = 0; i < width; i += LANES) {
        vf s = load_vf(sum + i);
        UNROLL(8) for (int k = 0; k < AT_ONCE; k++) s += load_vf(row[k] + i) * factor[k];
        if (i % 16 == 0)
            UNROLL(8) for (int k = 0; k < AT_ONCE; k++) __builtin_prefetch(soon[k] + i);
        store_vf(sum + i, s);
    }
}

/* The outputs behind the last whole vector, one by one. */
INLINE void pass_tail(const void *w, int format, int64_t stride, const int32_t *index, const float *factor, int64_t n,
                      int64_t from, int64_t to, float *sum) {
    for (int64_t k = 0; k < n; k++)
        for (int64_t i = from; i < to; i++) sum[i - from] += get(w, index[k] * stride + i, format) * factor[k];
}

static void outputs(const void *w, int format, int64_t stride, const int32_t *index, const float *factor, int64_t n,
                    int64_t from, int64_t to, const void *bias, void *y, float *sum) {
    const int step = format == BF16 ? STEP_BF16 : LANES;
    for (int64_t first = from; first < to; first += TILE) {
        int64_t width = to - first < TILE ? to - first : TILE, whole = width / step * step;
        memset(sum, 0, (size_t)width * sizeof *sum);
        for (int64_t k = 0; k < n; k += AT_ONCE) {
            const int32_t *next = index + (k + AHEAD < n ? k + AHEAD : k);
            if (format == BF16)
                pass_bf16((const bf16 *)w + first, stride, index + k, factor + k, whole, next, sum);
            else
                pass_f32((const float *)w + first, stride, index + k, factor + k, whole, next, sum);
        }
        pass_tail(w, format, stride, index, factor, n, first + whole, first + width, sum + whole);
        for (int64_t i = 0; i < width; i++) {
            int64_t at = first + i;
            if (format == BF16 && i < whole) at = first + i / STEP_BF16 * STEP_BF16 + PLACE_BF16((int)(i % STEP_BF16));
            put(y, at, format, sum[i] + (bias ? get(bias, at, format) : 0.0f));
        }
    }
}

/* w: [inputs, outputs], x: [inputs], bias: [outputs] or NULL, y: [outputs], contiguous, one format.
   selected: how many inputs counted. */
API int sb_columns_gemv(const void *w, int format, int64_t inputs, int64_t width, const void *x, float threshold,
                        const void *bias, void *y, int64_t *selected, int threads) {
    int64_t room = round_up(inputs + 16, AT_ONCE);
    int32_t *index = scratch((size_t)room * sizeof *index);
    float *factor = scratch((size_t)room * sizeof *factor);
    float *sums = scratch((size_t)threads * TILE * sizeof *sums);
    if (!index || !factor || !sums) {
        free(index);
        free(factor);
        free(sums);
        return NO_MEMORY;
    }
    int64_t n = choose(x, format, inputs, threshold, index, factor);
    *selected = n;
    for (int64_t k = n; k % AT_ONCE; k++) index[k] = NOTHING, factor[k] = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) /* cut between whole vectors, so that cuts move no output to the tail */
        outputs(w, format, width, index, factor, n, cut(width / 32, threads, part) * 32,
                part + 1 == threads ? width : cut(width / 32, threads, part + 1) * 32, bias, y, sums + part * TILE);
    free(index);
    free(factor);
    free(sums);
    return OK;
}
