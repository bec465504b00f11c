/* y = W x + bias for weights stored as a bitmap and packed values; N:M is the same without offsets.

   Rows come in groups of four that share one value stream (order: group, block of 64 columns, row, ascending
   column), so that each load of x serves four rows and one cursor feeds the prefetcher: walking several rows with a
   cursor each was 1.4 to 2.3 times slower. mask: uint64 [groups, blocks, 4], bit j is column 64 * block + j, rows and
   columns outside the matrix are zero bits. ptr: int64 [groups + 1], offsets of the groups in elements; NULL where
   every group holds per_group values (N:M).

   Pruned entries are multiplied as zeros: infinity or NaN in x gives NaN in every row, as the masked dense product
   does. The order of additions depends on the layout and on the instruction set, never on the number of threads. */
#include "bitmap.h"

#define DIRECT 4 /* largest batch for which expanded registers are used at once */

static Weights weights_of(const uint64_t *mask, const void *values, const int64_t *ptr, int64_t per_group, int format,
                          int64_t rows, int64_t cols) {
    Weights w = {mask, (const char *)values, ptr, per_group, format, rows, cols, (cols + 63) / 64, (rows + 3) / 4};
    return w;
}

/* x as the inner loops read it: float32 unless pairs of bf16 are multiplied at once. */
#if defined(SB_AVX512)
#define INNER(format) (format)
#else
#define INNER(format) ((void)(format), F32)
#endif

/* ---- four rows at once, the expanded weights in registers ---- */

#if defined(SB_AVX512)
INLINE void direct_bf16(const uint64_t *mask, const bf16 *v, const bf16 *x, int64_t stride, int64_t blocks,
                        const int batch, float *out) {
    const int halves = batch <= 2 ? 2 : 1; /* at least eight chains of dot products, at most sixteen registers */
    __m512 sum[4][DIRECT][2];
    UNROLL(4) for (int q = 0; q < 4; q++)
        UNROLL(4) for (int n = 0; n < batch; n++) sum[q][n][0] = sum[q][n][1] = _mm512_setzero_ps();
    const uint32_t *words = (const uint32_t *)mask; /* little endian: the low half of a block comes first */
    for (int64_t b = 0; b < blocks; b++, words += 8) {
        __m512i x0[DIRECT], x1[DIRECT];
        UNROLL(4) for (int n = 0; n < batch; n++) {
            x0[n] = _mm512_load_si512(x + n * stride + 64 * b);
            x1[n] = _mm512_load_si512(x + n * stride + 64 * b + 32);
        }
        UNROLL(4) for (int line = 0; line < 4; line++) _mm_prefetch((const char *)(v + 2048 + 32 * line), _MM_HINT_T0);
        UNROLL(4) for (int q = 0; q < 4; q++) {
            __m512i w0 = expand_bf16(words[2 * q], v);
            v += popcount(words[2 * q]);
            __m512i w1 = expand_bf16(words[2 * q + 1], v);
            v += popcount(words[2 * q + 1]);
            UNROLL(4) for (int n = 0; n < batch; n++) {
                sum[q][n][0] = dot_bf16(sum[q][n][0], w0, x0[n]);
                sum[q][n][halves - 1] = dot_bf16(sum[q][n][halves - 1], w1, x1[n]);
            }
        }
    }
    UNROLL(4) for (int q = 0; q < 4; q++)
        UNROLL(4) for (int n = 0; n < batch; n++) {
            if (halves == 2) sum[q][n][0] = _mm512_add_ps(sum[q][n][0], sum[q][n][1]);
            out[q * DIRECT + n] = sum_vf((vf)sum[q][n][0]);
        }
}

INLINE void direct_f32(const uint64_t *mask, const float *v, const float *x, int64_t blocks, float *out) {
    __m512 sum[4][2];
    UNROLL(4) for (int q = 0; q < 4; q++) sum[q][0] = sum[q][1] = _mm512_setzero_ps();
    const uint16_t *words = (const uint16_t *)mask;
    for (int64_t b = 0; b < blocks; b++, words += 16) {
        UNROLL(8) for (int line = 0; line < 8; line++) _mm_prefetch((const char *)(v + 512 + 16 * line), _MM_HINT_T0);
        UNROLL(4) for (int q = 0; q < 4; q++)
            UNROLL(4) for (int part = 0; part < 4; part++) {
                __m512 w = expand_f32(words[4 * q + part], v);
                v += popcount(words[4 * q + part]);
                sum[q][part & 1] = _mm512_fmadd_ps(w, _mm512_load_ps(x + 64 * b + 16 * part), sum[q][part & 1]);
            }
    }
    UNROLL(4) for (int q = 0; q < 4; q++) out[q * DIRECT] = sum_vf((vf)(sum[q][0] + sum[q][1]));
}
#else
INLINE void direct_plain(const uint64_t *mask, const char *v, int format, const float *x, int64_t blocks, float *out) {
    vf sum[4][2] = {{{0}}};
    for (int64_t b = 0; b < blocks; b++)
        UNROLL(4) for (int q = 0; q < 4; q++) {
            uint64_t kept = mask[4 * b + q];
#if defined(SB_SHUFFLES)
            UNROLL(16) for (int part = 0; part < 64 / LANES; part++) {
                uint32_t bits = PART(kept, part);
                vf w = format == BF16 ? expand_lanes_bf16(bits, (const bf16 *)v)
                                      : expand_lanes_f32(bits, (const float *)v);
                v += (size_t)few(bits) * size_of(format);
                sum[q][part & 1] += w * load_vf(x + 64 * b + LANES * part);
            }
#else
            float w[64];
            expand64(kept, v, format, w);
            v += (size_t)popcount(kept) * size_of(format);
            for (int i = 0; i < 64; i += 2 * LANES) {
                sum[q][0] += load_vf(w + i) * load_vf(x + 64 * b + i);
                sum[q][1] += load_vf(w + i + LANES) * load_vf(x + 64 * b + i + LANES);
            }
#endif
        }
    for (int q = 0; q < 4; q++) out[q * DIRECT] = sum_vf(sum[q][0] + sum[q][1]);
}
#endif

static void direct(const Weights *w, int64_t group, const void *x, int64_t padded, int64_t batch, float *out) {
    const uint64_t *mask = w->mask + group * w->blocks * 4;
    const char *values = group_values(w, group);
#if defined(SB_AVX512)
    if (w->format == BF16) {
        const bf16 *v = (const bf16 *)values, *in = (const bf16 *)x;
        switch (batch) {
        case 1: direct_bf16(mask, v, in, padded, w->blocks, 1, out); break;
        case 2: direct_bf16(mask, v, in, padded, w->blocks, 2, out); break;
        case 3: direct_bf16(mask, v, in, padded, w->blocks, 3, out); break;
        default: direct_bf16(mask, v, in, padded, w->blocks, 4, out); break;
        }
    } else
        direct_f32(mask, (const float *)values, (const float *)x, w->blocks, out);
#else
    if (w->format == BF16)
        direct_plain(mask, values, BF16, (const float *)x, w->blocks, out);
    else
        direct_plain(mask, values, F32, (const float *)x, w->blocks, out);
    (void)padded, (void)batch;
#endif
}

/* x: [batch, cols], bias: [rows] or NULL, y: [batch, rows], all contiguous and in the values' format. */
API int sb_bitmap_gemm(const uint64_t *mask, const void *values, const int64_t *ptr, int64_t per_group, int format,
                       int64_t rows, int64_t cols, const void *x, int64_t batch, const void *bias, void *y,
                       int threads) {
    Weights w = weights_of(mask, values, ptr, per_group, format, rows, cols);
    int64_t padded = 64 * w.blocks;
    int at_once = batch == 1;
#if defined(SB_AVX512)
    at_once = batch == 1 || (format == BF16 && batch <= DIRECT);
#endif
    if (!at_once) return sb_batch_gemm(&w, x, batch, bias, y, threads);
    void *in = padded_copy(x, format, INNER(format), batch, cols, padded);
    if (!in) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        float out[4 * DIRECT];
        for (int64_t group = cut(w.groups, threads, part); group < cut(w.groups, threads, part + 1); group++) {
            direct(&w, group, in, padded, batch, out);
            for (int q = 0; q < 4 && 4 * group + q < rows; q++)
                for (int64_t n = 0; n < batch; n++) {
                    float offset = bias ? get(bias, 4 * group + q, format) : 0.0f;
                    put(y, n * rows + 4 * group + q, format, out[q * DIRECT + n] + offset);
                }
        }
    }
    free(in);
    return OK;
}

/* The dense matrix: out [rows, cols], contiguous, in the values' format. */
API int sb_bitmap_unpack(const uint64_t *mask, const void *values, const int64_t *ptr, int64_t per_group, int format,
                         int64_t rows, int64_t cols, void *out, int threads) {
    Weights w = weights_of(mask, values, ptr, per_group, format, rows, cols);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t group = cut(w.groups, threads, part); group < cut(w.groups, threads, part + 1); group++) {
            const uint64_t *kept = mask + group * w.blocks * 4;
            const char *v = group_values(&w, group);
            for (int64_t b = 0; b < w.blocks; b++)
                for (int q = 0; q < 4; q++) {
                    int64_t row = 4 * group + q, width = cols - 64 * b < 64 ? cols - 64 * b : 64;
                    uint64_t bits = kept[4 * b + q];
                    float block[64];
                    if (format == BF16)
                        copy64_bf16(bits, (const bf16 *)v, (bf16 *)block);
                    else
                        expand64_f32(bits, (const float *)v, block);
                    if (row < rows)
                        memcpy((char *)out + (size_t)(row * cols + 64 * b) * size_of(format), block,
                               (size_t)width * size_of(format));
                    v += (size_t)popcount(bits) * size_of(format);
                }
        }
    return OK;
}
