/* Products with whole rows: of all rows, which sparse kernels are measured against, or of the rows of neurons that a
   gate kept (CATS, top-k), whose other outputs are not needed. And a plain read.

   All walk several rows (streams) at once: hardware prefetching stops at page ends, and eight streams hide that. */
#include "common.h"

#define STREAMS 8

/* out[q] = sum of w[q][i] * x[i] for `rows` rows; `rows` is a constant in every call. */
INLINE void rows_f32(const float **w, const float *x, int64_t cols, const int rows, float *out) {
    vf sum[STREAMS];
    int64_t whole = cols / LANES * LANES;
    UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = zero_vf();
    for (int64_t i = 0; i < whole; i += LANES) {
        vf in = load_vf(x + i);
        UNROLL(8) for (int q = 0; q < rows; q++) sum[q] += load_vf(w[q] + i) * in;
    }
    for (int q = 0; q < rows; q++) {
        out[q] = sum_vf(sum[q]);
        for (int64_t i = whole; i < cols; i++) out[q] += w[q][i] * x[i];
    }
}

#if defined(SB_AVX512)
INLINE void rows_bf16(const bf16 **w, const bf16 *x, int64_t cols, const int rows, float *out) {
    __m512 sum[STREAMS];
    int64_t whole = cols / 32 * 32;
    UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = _mm512_setzero_ps();
    for (int64_t i = 0; i < whole; i += 32) {
        __m512i in = _mm512_loadu_si512(x + i);
        UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = dot_bf16(sum[q], _mm512_loadu_si512(w[q] + i), in);
    }
    for (int q = 0; q < rows; q++) {
        out[q] = sum_vf((vf)sum[q]);
        for (int64_t i = whole; i < cols; i++) out[q] += from_bf16(w[q][i]) * from_bf16(x[i]);
    }
}
#else
INLINE void rows_bf16(const bf16 **w, const bf16 *x, int64_t cols, const int rows, float *out) {
    vf sum[STREAMS];
    int64_t whole = cols / (2 * LANES) * (2 * LANES);
    UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = zero_vf();
    for (int64_t i = 0; i < whole; i += 2 * LANES) {
        vu in = load_pairs(x + i);
        UNROLL(8) for (int q = 0; q < rows; q++) {
            vu pairs = load_pairs(w[q] + i);
            sum[q] += first_of_pairs(pairs) * first_of_pairs(in);
            sum[q] += second_of_pairs(pairs) * second_of_pairs(in);
        }
    }
    for (int q = 0; q < rows; q++) {
        out[q] = sum_vf(sum[q]);
        for (int64_t i = whole; i < cols; i++) out[q] += from_bf16(w[q][i]) * from_bf16(x[i]);
    }
}
#endif

/* y[index[q]] of `rows` rows; `rows` is a constant in every call. */
INLINE void some_rows(const void *w, int format, const int32_t *index, int64_t cols, const void *x, const void *bias,
                      const int rows, void *y) {
    float out[STREAMS];
    const bf16 *half[STREAMS];
    const float *full[STREAMS];
    for (int q = 0; q < rows; q++) {
        half[q] = (const bf16 *)w + index[q] * cols;
        full[q] = (const float *)w + index[q] * cols;
    }
    if (format == BF16)
        rows_bf16(half, (const bf16 *)x, cols, rows, out);
    else
        rows_f32(full, (const float *)x, cols, rows, out);
    for (int q = 0; q < rows; q++) put(y, index[q], format, out[q] + (bias ? get(bias, index[q], format) : 0.0f));
}

/* w: [rows, cols], x: [cols], kept: [rows] of 0 and 1 or NULL for all, bias: [rows] or NULL, y: [rows], contiguous,
   one format. Rows that are not kept are not read, and give 0. */
API int sb_rows_gemv(const void *w, int format, int64_t rows, int64_t cols, const void *x, const uint8_t *kept,
                     const void *bias, void *y, int threads) {
    int64_t n = 0;
    int32_t *index = scratch((size_t)(rows + 1) * sizeof *index);
    if (!index) return NO_MEMORY;
    for (int64_t row = 0; row < rows; row++) {
        int keep = !kept || kept[row];
        index[n] = (int32_t)row;
        n += keep;
        if (!keep) put(y, row, format, 0.0f);
    }
    int64_t eights = n / STREAMS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t i = cut(eights, threads, part); i < cut(eights, threads, part + 1); i++)
            some_rows(w, format, index + STREAMS * i, cols, x, bias, STREAMS, y);
    for (int64_t i = STREAMS * eights; i < n; i++) some_rows(w, format, index + i, cols, x, bias, 1, y);
    free(index);
    return OK;
}

/* Reads every whole cache line once, in eight streams per thread, and stores a sum that depends on each: the ceiling
   for all kernels. */
API int sb_read(const void *from, int64_t bytes, float *out, int threads) {
    float total = 0;
    int64_t lines = bytes / 64;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int part = 0; part < threads; part++) {
        vf sum[STREAMS] = {{0}};
        int64_t first = cut(lines, threads, part), each = (cut(lines, threads, part + 1) - first) / STREAMS;
        const char *p = (const char *)from + 64 * first;
        for (int64_t i = 0; i < each; i++)
            UNROLL(8) for (int s = 0; s < STREAMS; s++)
                UNROLL(4) for (int at = 0; at < 16; at += LANES)
                    sum[s] += load_vf((const float *)(p + 64 * (s * each + i)) + at);
        for (int s = 1; s < STREAMS; s++) sum[0] += sum[s];
        total += sum_vf(sum[0]);
    }
    *out = total;
    return OK;
}
