/* y = W x + bias for group-sparse 4-bit weights (GQSA): kept groups of consecutive columns, each with its own scale and
   zero, in block-sparse rows. A weight is scale * (code - zero); removed groups are not multiplied at all.

   Rows are shared out so that every thread gets the same number of kept groups to within one row, whatever the mask;
   a row is never split, so results do not depend on the number of threads. */
#include "common.h"

typedef struct {
    const int32_t *row_ptr;
    const void *column;
    int column_bytes;
    const uint8_t *codes;
    const uint16_t *scale, *zero;
    int64_t group;
} Groups;

INLINE int64_t column_of(const Groups *g, int64_t k) {
    return g->column_bytes == 2 ? ((const int16_t *)g->column)[k] : ((const int32_t *)g->column)[k];
}

#if defined(SB_AVX512)
/* Sixteen codes from eight bytes: lane l takes nibble l / 2 of the first four bytes if even, of the last four if odd,
   so x is laid out in that order beforehand. Lane permutation looks the low four bits up in 0.0 ... 15.0. */
INLINE __m512 codes16(const uint8_t *p) {
    const __m512i shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t both;
    memcpy(&both, p, 8);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(both), shift), levels);
}
#endif

/* Where the kernel looks for column i of x. */
INLINE int64_t place(int64_t i, int64_t group) {
#if defined(SB_AVX512)
    if (group % 16 == 0) return i / 16 * 16 + i % 8 * 2 + i % 16 / 8;
#endif
    (void)group;
    return i;
}

static float row_sum(const Groups *g, int64_t row, const float *x) {
    float total = 0;
#if defined(SB_AVX512)
    if (g->group % 16 == 0) {
        __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        float factor[16], shift[16]; /* of sixteen groups at once: converting one by one costs more than multiplying */
        int64_t end = g->row_ptr[row + 1];
        for (int64_t first = g->row_ptr[row]; first < end; first += 16) {
            int64_t n = end - first < 16 ? end - first : 16;
            __mmask16 there = (__mmask16)((1u << n) - 1);
            __m512 scale = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, g->scale + first));
            __m512 zero = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, g->zero + first));
            _mm512_storeu_ps(factor, scale);
            _mm512_storeu_ps(shift, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale, zero)));
            for (int64_t k = 0; k < n; k++) {
                const uint8_t *codes = g->codes + (first + k) * g->group / 2;
                const float *in = x + column_of(g, first + k) * g->group;
                for (int64_t i = 0; i < g->group; i += 16) {
                    __m512 weight = _mm512_set1_ps(shift[k]);
                    weight = _mm512_fmadd_ps(codes16(codes + i / 2), _mm512_set1_ps(factor[k]), weight);
                    sum[k & 1] = _mm512_fmadd_ps(weight, _mm512_load_ps(in + i), sum[k & 1]);
                }
            }
        }
        return sum_vf((vf)_mm512_add_ps(sum[0], sum[1]));
    }
#endif
    for (int64_t k = g->row_ptr[row]; k < g->row_ptr[row + 1]; k++) {
        const uint8_t *codes = g->codes + k * g->group / 2;
        const float *in = x + column_of(g, k) * g->group;
        float scale = from_fp16(g->scale[k]), shift = -scale * from_fp16(g->zero[k]), sum = 0;
        for (int64_t i = 0; i < g->group; i += 2)
            sum += (scale * (float)(codes[i / 2] & 15) + shift) * in[i] +
                   (scale * (float)(codes[i / 2] >> 4) + shift) * in[i + 1];
        total += sum;
    }
    return total;
}

/* The first row of part `index`: where its share of the kept groups begins. */
static int64_t first_row(const int32_t *row_ptr, int64_t rows, int64_t parts, int64_t index) {
    if (index == parts) return rows;
    int64_t target = cut(row_ptr[rows], parts, index), low = 0, high = rows;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (row_ptr[middle] < target)
            low = middle + 1;
        else
            high = middle;
    }
    return index ? low : 0;
}

/* x: [batch, cols], bias: [rows] or NULL, y: [batch, rows], contiguous, in `format`; column: int16 or int32. */
API int sb_groups_gemm(const int32_t *row_ptr, const void *column, int column_bytes, const uint8_t *codes,
                       const uint16_t *scale, const uint16_t *zero, int64_t group, int64_t rows, int64_t cols,
                       int format, const void *x, int64_t batch, const void *bias, void *y, int threads) {
    Groups g = {row_ptr, column, column_bytes, codes, scale, zero, group};
    int64_t stride = round_up(cols, 16);
    float *in = scratch((size_t)(batch * stride) * sizeof *in);
    if (!in) return NO_MEMORY;
    for (int64_t n = 0; n < batch; n++)
        for (int64_t i = 0; i < cols; i++) in[n * stride + place(i, group)] = get(x, n * cols + i, format);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        int64_t last = first_row(row_ptr, rows, threads, part + 1);
        for (int64_t row = first_row(row_ptr, rows, threads, part); row < last; row++)
            for (int64_t n = 0; n < batch; n++)
                put(y, n * rows + row, format,
                    row_sum(&g, row, in + n * stride) + (bias ? get(bias, row, format) : 0.0f));
    }
    free(in);
    return OK;
}
