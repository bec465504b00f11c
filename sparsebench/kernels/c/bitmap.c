/* y = W x + bias for weights stored as a bitmap and packed values; N:M is the same without offsets.

   Rows come in groups of four that share one value stream (order: group, block of 64 columns, row, ascending
   column), so that each load of x serves four rows and one cursor feeds the prefetcher: walking several rows with a
   cursor each was 1.4 to 2.3 times slower. mask: uint64 [groups, blocks, 4], bit j is column 64 * block + j, rows and
   columns outside the matrix are zero bits. ptr: int64 [groups + 1], offsets of the groups in elements; NULL where
   every group holds per_group values (N:M).

   Pruned entries are multiplied as zeros: infinity or NaN in x gives NaN in every row, as the masked dense product
   does. The order of additions depends on the layout and on the instruction set, never on the number of threads. */
#include "common.h"

#define SLICE 512 /* columns expanded at once for batches: four rows of them stay in L1 */
#define DIRECT 4  /* largest batch for which expanded registers are used at once */

typedef struct {
    const uint64_t *mask;
    const char *values;
    const int64_t *ptr;
    int64_t per_group;
    int format;
    int64_t rows, cols, blocks, groups;
} Weights;

static Weights weights_of(const uint64_t *mask, const void *values, const int64_t *ptr, int64_t per_group, int format,
                          int64_t rows, int64_t cols) {
    Weights w = {mask, (const char *)values, ptr, per_group, format, rows, cols, (cols + 63) / 64, (rows + 3) / 4};
    return w;
}

INLINE const char *group_values(const Weights *w, int64_t group) {
    int64_t start = w->ptr ? w->ptr[group] : group * w->per_group;
    return w->values + start * (int64_t)size_of(w->format);
}

/* x as the inner loops read it: padded with zeros to whole blocks; float32 unless the bf16 dot product is there. */
#if defined(SB_AVX512)
INLINE size_t inner_size(int format) { return size_of(format); }
#else
INLINE size_t inner_size(int format) { return (void)format, sizeof(float); }
#endif

static void *prepare(const void *x, int format, int64_t batch, int64_t cols, int64_t padded) {
    size_t inner = inner_size(format);
    char *copy = scratch((size_t)(batch * padded) * inner);
    if (!copy) return NULL;
    for (int64_t row = 0; row < batch; row++) {
        char *to = copy + (size_t)(row * padded) * inner;
        if (inner == size_of(format))
            memcpy(to, (const char *)x + (size_t)(row * cols) * inner, (size_t)cols * inner);
        else
            for (int64_t i = 0; i < cols; i++) ((float *)to)[i] = from_bf16(((const bf16 *)x)[row * cols + i]);
        memset(to + (size_t)cols * inner, 0, (size_t)(padded - cols) * inner);
    }
    return copy;
}

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
        _mm_prefetch((const char *)(v + 1024), _MM_HINT_T0);
        _mm_prefetch((const char *)(v + 1056), _MM_HINT_T0);
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
#if defined(SB_AVX2)
            UNROLL(8) for (int part = 0; part < 8; part++, kept >>= 8) {
                vf w = (vf)(format == BF16 ? expand8_bf16((uint8_t)kept, (const bf16 *)v)
                                           : expand8_f32((uint8_t)kept, (const float *)v));
                v += (size_t)popcount(kept & 255) * size_of(format);
                sum[q][part & 1] += w * load_vf(x + 64 * b + 8 * part);
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

/* ---- larger batches: four rows expanded into L1, then a dense register tile ---- */

#if LANES == 16
#define TILE 4 /* rows of x per register tile */
#else
#define TILE 2
#endif

INLINE void tile_f32(const float *w, const float *x, int64_t stride, int64_t cols, const int batch, vf *sum) {
    vf s[4][TILE];
    UNROLL(4) for (int q = 0; q < 4; q++) UNROLL(4) for (int n = 0; n < batch; n++) s[q][n] = sum[q * TILE + n];
    for (int64_t i = 0; i < cols; i += LANES) {
        vf in[TILE];
        UNROLL(4) for (int n = 0; n < batch; n++) in[n] = load_vf(x + n * stride + i);
        UNROLL(4) for (int q = 0; q < 4; q++) {
            vf weight = load_vf(w + q * SLICE + i);
            UNROLL(4) for (int n = 0; n < batch; n++) s[q][n] += weight * in[n];
        }
    }
    UNROLL(4) for (int q = 0; q < 4; q++) UNROLL(4) for (int n = 0; n < batch; n++) sum[q * TILE + n] = s[q][n];
}

#if defined(SB_AVX512)
INLINE void tile_bf16(const bf16 *w, const bf16 *x, int64_t stride, int64_t cols, const int batch, vf *sum) {
    __m512 s[4][TILE];
    UNROLL(4) for (int q = 0; q < 4; q++)
        UNROLL(4) for (int n = 0; n < batch; n++) s[q][n] = (__m512)sum[q * TILE + n];
    for (int64_t i = 0; i < cols; i += 32) {
        __m512i in[TILE];
        UNROLL(4) for (int n = 0; n < batch; n++) in[n] = _mm512_load_si512(x + n * stride + i);
        UNROLL(4) for (int q = 0; q < 4; q++) {
            __m512i weight = _mm512_load_si512(w + q * SLICE + i);
            UNROLL(4) for (int n = 0; n < batch; n++) s[q][n] = dot_bf16(s[q][n], weight, in[n]);
        }
    }
    UNROLL(4) for (int q = 0; q < 4; q++)
        UNROLL(4) for (int n = 0; n < batch; n++) sum[q * TILE + n] = (vf)s[q][n];
}
#endif

INLINE void tile(const char *w, const char *x, int64_t stride, int64_t cols, int format, const int batch, vf *sum) {
#if defined(SB_AVX512)
    if (format == BF16) {
        tile_bf16((const bf16 *)w, (const bf16 *)x, stride, cols, batch, sum);
        return;
    }
#endif
    (void)format;
    tile_f32((const float *)w, (const float *)x, stride, cols, batch, sum);
}

/* Columns [64 * first, 64 * last) of a group's four rows, in the inner format; returns where the values go on. */
static const char *expand_rows(const Weights *w, int64_t group, int64_t first, int64_t last, const char *v, char *out) {
    const uint64_t *mask = w->mask + group * w->blocks * 4;
    for (int64_t b = first; b < last; b++)
        for (int q = 0; q < 4; q++) {
            uint64_t kept = mask[4 * b + q];
            int64_t at = q * SLICE + 64 * (b - first);
            if (inner_size(w->format) == sizeof(bf16))
                copy64_bf16(kept, (const bf16 *)v, (bf16 *)out + at);
            else
                expand64(kept, v, w->format, (float *)out + at);
            v += (size_t)popcount(kept) * size_of(w->format);
        }
    return v;
}

/* out: [4, batch] */
static void sliced(const Weights *w, int64_t group, const char *x, int64_t padded, int64_t batch, char *dense, vf *sums,
                   float *out) {
    const char *v = group_values(w, group);
    int64_t tiles = (batch + TILE - 1) / TILE;
    size_t inner = inner_size(w->format);
    for (int64_t i = 0; i < tiles * 4 * TILE; i++) sums[i] = zero_vf();
    for (int64_t first = 0; first < w->blocks; first += SLICE / 64) {
        int64_t last = first + SLICE / 64 < w->blocks ? first + SLICE / 64 : w->blocks, cols = 64 * (last - first);
        v = expand_rows(w, group, first, last, v, dense);
        for (int64_t t = 0; t < tiles; t++) {
            const char *in = x + (size_t)(t * TILE * padded + 64 * first) * inner;
            vf *sum = sums + t * 4 * TILE;
            switch (batch - t * TILE) {
            case 1: tile(dense, in, padded, cols, w->format, 1, sum); break;
#if TILE == 4
            case 2: tile(dense, in, padded, cols, w->format, 2, sum); break;
            case 3: tile(dense, in, padded, cols, w->format, 3, sum); break;
#endif
            default: tile(dense, in, padded, cols, w->format, TILE, sum); break;
            }
        }
    }
    for (int q = 0; q < 4; q++)
        for (int64_t n = 0; n < batch; n++)
            out[q * batch + n] = sum_vf(sums[n / TILE * 4 * TILE + q * TILE + n % TILE]);
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
    size_t dense_bytes = 4 * SLICE * sizeof(float), sum_bytes = (size_t)(batch + TILE) * 4 * sizeof(vf);
    size_t own = (size_t)round_up((int64_t)(dense_bytes + sum_bytes) + 16 * batch, 64);
    void *in = prepare(x, format, batch, cols, padded);
    char *work = at_once ? NULL : scratch(own * (size_t)threads);
    if (!in || (!at_once && !work)) {
        free(in);
        free(work);
        return NO_MEMORY;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        char *mine = work ? work + own * (size_t)part : NULL;
        float few[4 * DIRECT];
        float *out = at_once ? few : (float *)(mine + dense_bytes + sum_bytes);
        int64_t step = at_once ? DIRECT : batch;
        for (int64_t group = cut(w.groups, threads, part); group < cut(w.groups, threads, part + 1); group++) {
            if (at_once)
                direct(&w, group, in, padded, batch, out);
            else
                sliced(&w, group, in, padded, batch, mine, (vf *)(mine + dense_bytes), out);
            for (int q = 0; q < 4 && 4 * group + q < rows; q++)
                for (int64_t n = 0; n < batch; n++) {
                    float offset = bias ? get(bias, 4 * group + q, format) : 0.0f;
                    put(y, n * rows + 4 * group + q, format, out[q * step + n] + offset);
                }
        }
    }
    free(in);
    free(work);
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
