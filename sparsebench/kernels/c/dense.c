/* What the sparse kernels are measured against: a dense product as fast as memory allows, and a plain read.

   Both walk several rows (streams) at once: hardware prefetching stops at page ends, and eight streams hide that. */
#include "common.h"

#define STREAMS 8

/* out[q] = sum of w[q * stride + i] * x[i] for `rows` rows; `rows` is a constant in every call. */
INLINE void rows_f32(const float *w, const float *x, int64_t stride, int64_t cols, const int rows, float *out) {
    vf sum[STREAMS];
    int64_t whole = cols / LANES * LANES;
    UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = zero_vf();
    for (int64_t i = 0; i < whole; i += LANES) {
        vf in = load_vf(x + i);
        UNROLL(8) for (int q = 0; q < rows; q++) sum[q] += load_vf(w + q * stride + i) * in;
    }
    for (int q = 0; q < rows; q++) {
        out[q] = sum_vf(sum[q]);
        for (int64_t i = whole; i < cols; i++) out[q] += w[q * stride + i] * x[i];
    }
}

#if defined(SB_AVX512)
INLINE void rows_bf16(const bf16 *w, const bf16 *x, int64_t stride, int64_t cols, const int rows, float *out) {
    __m512 sum[STREAMS];
    int64_t whole = cols / 32 * 32;
    UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = _mm512_setzero_ps();
    for (int64_t i = 0; i < whole; i += 32) {
        __m512i in = _mm512_loadu_si512(x + i);
        UNROLL(8) for (int q = 0; q < rows; q++) sum[q] = dot_bf16(sum[q], _mm512_loadu_si512(w + q * stride + i), in);
    }
    for (int q = 0; q < rows; q++) {
        out[q] = sum_vf((vf)sum[q]);
        for (int64_t i = whole; i < cols; i++) out[q] += from_bf16(w[q * stride + i]) * from_bf16(x[i]);
    }
}
#else
INLINE void rows_bf16(const bf16 *w, const bf16 *x, int64_t stride, int64_t cols, const int rows, float *out) {
    for (int q = 0; q < rows; q++) {
        float sum[4 * LANES] = {0};
        int64_t i = 0;
        for (; i + 4 * LANES <= cols; i += 4 * LANES)
            for (int c = 0; c < 4 * LANES; c++) sum[c] += from_bf16(w[q * stride + i + c]) * from_bf16(x[i + c]);
        out[q] = 0;
        for (; i < cols; i++) out[q] += from_bf16(w[q * stride + i]) * from_bf16(x[i]);
        for (int c = 0; c < 4 * LANES; c++) out[q] += sum[c];
    }
}
#endif

INLINE void some_rows(const void *w, int format, int64_t row, int64_t cols, const void *x, const int rows, void *y) {
    float out[STREAMS];
    if (format == BF16)
        rows_bf16((const bf16 *)w + row * cols, (const bf16 *)x, cols, cols, rows, out);
    else
        rows_f32((const float *)w + row * cols, (const float *)x, cols, cols, rows, out);
    for (int q = 0; q < rows; q++) put(y, row + q, format, out[q]);
}

/* w: [rows, cols], x: [cols], y: [rows], contiguous, one format. */
API int sb_dense_gemv(const void *w, int format, int64_t rows, int64_t cols, const void *x, void *y, int threads) {
    int64_t eights = rows / STREAMS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t i = cut(eights, threads, part); i < cut(eights, threads, part + 1); i++)
            some_rows(w, format, STREAMS * i, cols, x, STREAMS, y);
    for (int64_t row = STREAMS * eights; row < rows; row++) some_rows(w, format, row, cols, x, 1, y);
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
