/* y = W x + bias for a bitmap and several rows of x, which share what each weight costs to unpack.

   Where much is kept, four rows of W are expanded into L1 and a dense register tile runs over them. Where little is,
   the kept columns of a row are listed, and each entry is multiplied with all rows of x at once: x is transposed, so
   that one column of it is one vector. Multiplications by zero are left out then, so x must be finite; else (infinity
   times a pruned zero is NaN) the first way is taken. */
#include "bitmap.h"

#define SLICE 512 /* columns at once: what is unpacked of them, and x, stay in L1 */

#if defined(__AVX512BF16__)
#define INNER(format) (format)
#else
#define INNER(format) ((void)(format), F32)
#endif

/* ---- four rows expanded into L1, then a dense register tile ---- */

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

#if defined(__AVX512BF16__)
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

INLINE void tile(const char *w, const char *x, int64_t stride, int64_t cols, int inner, const int batch, vf *sum) {
#if defined(__AVX512BF16__)
    if (inner == BF16) {
        tile_bf16((const bf16 *)w, (const bf16 *)x, stride, cols, batch, sum);
        return;
    }
#endif
    (void)inner;
    tile_f32((const float *)w, (const float *)x, stride, cols, batch, sum);
}

/* Columns [64 * first, 64 * last) of a group's four rows, in the inner format; returns where the values go on. */
static const char *expand_rows(const Weights *w, int64_t group, int64_t first, int64_t last, const char *v, char *out) {
    const uint64_t *mask = w->mask + group * w->blocks * 4;
    for (int64_t b = first; b < last; b++)
        for (int q = 0; q < 4; q++) {
            uint64_t kept = mask[4 * b + q];
            int64_t at = q * SLICE + 64 * (b - first);
            if (INNER(w->format) == BF16)
                copy64_bf16(kept, (const bf16 *)v, (bf16 *)out + at);
            else
                expand64(kept, v, w->format, (float *)out + at);
            v += (size_t)popcount(kept) * size_of(w->format);
        }
    return v;
}

/* One group of four rows; out: [4, batch]. */
static void sliced(const Weights *w, int64_t group, const char *x, int64_t padded, int64_t batch, char *dense, vf *sums,
                   float *out) {
    const char *v = group_values(w, group);
    int64_t tiles = (batch + TILE - 1) / TILE;
    int inner = INNER(w->format);
    for (int64_t i = 0; i < tiles * 4 * TILE; i++) sums[i] = zero_vf();
    for (int64_t first = 0; first < w->blocks; first += SLICE / 64) {
        int64_t last = first + SLICE / 64 < w->blocks ? first + SLICE / 64 : w->blocks, cols = 64 * (last - first);
        v = expand_rows(w, group, first, last, v, dense);
        for (int64_t t = 0; t < tiles; t++) {
            const char *in = x + (size_t)(t * TILE * padded + 64 * first) * size_of(inner);
            vf *sum = sums + t * 4 * TILE;
            switch (batch - t * TILE) {
            case 1: tile(dense, in, padded, cols, inner, 1, sum); break;
#if TILE == 4
            case 2: tile(dense, in, padded, cols, inner, 2, sum); break;
            case 3: tile(dense, in, padded, cols, inner, 3, sum); break;
#endif
            default: tile(dense, in, padded, cols, inner, TILE, sum); break;
            }
        }
    }
    for (int q = 0; q < 4; q++)
        for (int64_t n = 0; n < batch; n++)
            out[q * batch + n] = sum_vf(sums[n / TILE * 4 * TILE + q * TILE + n % TILE]);
}

static int expanded(const Weights *w, const void *x, int64_t batch, const void *bias, void *y, int threads) {
    size_t dense = 4 * SLICE * sizeof(float), sums = (size_t)(batch + TILE) * 4 * sizeof(vf);
    size_t own = (size_t)round_up((int64_t)(dense + sums) + 16 * batch, 64);
    int64_t padded = 64 * w->blocks;
    char *in = padded_copy(x, w->format, INNER(w->format), batch, w->cols, padded);
    char *work = scratch(own * (size_t)threads);
    int status = in && work ? OK : NO_MEMORY;
    if (status == OK) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int part = 0; part < threads; part++) {
            char *mine = work + own * (size_t)part;
            float *out = (float *)(mine + dense + sums);
            for (int64_t group = cut(w->groups, threads, part); group < cut(w->groups, threads, part + 1); group++) {
                sliced(w, group, in, padded, batch, mine, (vf *)(mine + dense), out);
                for (int q = 0; q < 4 && 4 * group + q < w->rows; q++)
                    for (int64_t n = 0; n < batch; n++) {
                        float offset = bias ? get(bias, 4 * group + q, w->format) : 0.0f;
                        put(y, n * w->rows + 4 * group + q, w->format, out[q * batch + n] + offset);
                    }
            }
        }
    }
    free(in);
    free(work);
    return status;
}

/* ---- kept columns listed, each multiplied with all rows of x ---- */

#define WIDTH 16 /* rows of x at most: floats to a column of the transposed x, 64 bytes */

typedef struct {
    uint16_t column[SLICE + 64]; /* times 8: the distance in units of 8 bytes, which an address can scale */
    float value[SLICE + 64];
} List;

/* Appends the kept entries of 64 columns, the first of them `column` of the slice, behind `count` entries; returns how
   many there are then. */
INLINE int64_t append(List *list, int64_t count, uint64_t kept, const char *v, const int format, int64_t column) {
#if defined(SB_AVX512)
    static const uint16_t eights[32] = {0,   8,   16,  24,  32,  40,  48,  56,  64,  72,  80,
                                        88,  96,  104, 112, 120, 128, 136, 144, 152, 160, 168,
                                        176, 184, 192, 200, 208, 216, 224, 232, 240, 248};
    UNROLL(2) for (int half = 0; half < 2; half++) {
        uint32_t bits = (uint32_t)(kept >> 32 * half);
        __m512i at = _mm512_add_epi16(_mm512_loadu_si512(eights), _mm512_set1_epi16((short)(8 * (column + 32 * half))));
        _mm512_storeu_si512(list->column + count, compress_16(bits, at));
        UNROLL(2) for (int i = 0; i < 32; i += 16) {
            __m512i wide = format == BF16 ? widened(_mm256_loadu_si256((const __m256i *)((const bf16 *)v + i)))
                                          : _mm512_loadu_si512((const float *)v + i);
            _mm512_storeu_si512(list->value + count + i, wide);
        }
        count += popcount(bits);
        v += (size_t)popcount(bits) * size_of(format);
    }
#else
    for (int64_t i = 0; kept; kept &= kept - 1, i++) {
        list->column[count] = (uint16_t)(8 * (column + __builtin_ctzll(kept)));
        list->value[count++] = get(v, i, format);
    }
#endif
    return count;
}

/* sum += value * column of x, over a list whose length is a multiple of 4; `vectors` is a constant in every call. */
INLINE void add_listed(const List *list, int64_t count, const float *x, const int vectors, float *sum) {
    const int chains = vectors == 1 ? 4 : vectors == 2 ? 2 : 1; /* sums that do not wait for each other */
    vf s[4][4];
    UNROLL(4) for (int c = 0; c < chains; c++) UNROLL(4) for (int n = 0; n < vectors; n++) s[c][n] = zero_vf();
    for (int64_t i = 0; i < count; i += 4) {
        uint64_t four;
        memcpy(&four, list->column + i, sizeof four);
        UNROLL(4) for (int c = 0; c < 4; c++, four >>= 16) {
            const float *in = (const float *)((const char *)x + 8 * (four & 0xffff));
            UNROLL(4) for (int n = 0; n < vectors; n++)
                s[c % chains][n] += load_vf(in + LANES * n) * list->value[i + c];
        }
    }
    UNROLL(4) for (int n = 0; n < vectors; n++) {
        vf total = load_vf(sum + LANES * n);
        UNROLL(4) for (int c = 0; c < chains; c++) total += s[c][n];
        store_vf(sum + LANES * n, total);
    }
}

typedef struct {
    float *x;            /* transposed: [64 * blocks, WIDTH], zeros beyond its columns and rows */
    float *sums;         /* [4 * groups, WIDTH] */
    const char **cursor; /* [groups]: where the values of the next slice are */
    List *lists;         /* [threads] */
} Listing;

/* Mask words [first, last) of groups [start, end). Format and vectors are constants in every call. */
INLINE void listed_slice(const Weights *w, const Listing *l, int64_t first, int64_t last, int64_t start, int64_t end,
                         const int format, const int vectors, List *list) {
    int64_t at[4 * SLICE / 64 + 1]; /* where each word's values are, in bytes */
    at[0] = 0;
    for (int64_t group = start; group < end; group++) {
        const uint64_t *mask = w->mask + (group * w->blocks + first) * 4;
        const char *v = l->cursor[group], *next = l->cursor[group + 1 < end ? group + 1 : group];
        for (int64_t i = 0; i < 4 * (last - first); i++)
            at[i + 1] = at[i] + popcount(mask[i]) * (int64_t)size_of(format);
        int64_t bytes = at[4 * (last - first)];
        for (int64_t i = 0; i < 4 * (last - first); i += 8) __builtin_prefetch(mask + 4 * w->blocks + i);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i); /* about as many */
        for (int q = 0; q < 4; q++) {
            int64_t count = 0;
            for (int64_t b = 0; b < last - first; b++)
                count = append(list, count, mask[4 * b + q], v + at[4 * b + q], format, 64 * b);
            memset(list->column + count, 0, 4 * sizeof *list->column); /* made up to whole fours with zeros */
            memset(list->value + count, 0, 4 * sizeof *list->value);
            add_listed(list, round_up(count, 4), l->x + 64 * WIDTH * first, vectors, l->sums + WIDTH * (4 * group + q));
        }
        l->cursor[group] = v + bytes;
    }
}

static void listed_part(const Weights *w, const Listing *l, int64_t batch, int64_t start, int64_t end, List *list) {
    for (int64_t group = start; group < end; group++) l->cursor[group] = group_values(w, group);
    memset(l->sums + 4 * WIDTH * start, 0, (size_t)(4 * WIDTH * (end - start)) * sizeof *l->sums);
    for (int64_t first = 0; first < w->blocks; first += SLICE / 64) { /* outside: a slice of x stays in L1 */
        int64_t last = first + SLICE / 64 < w->blocks ? first + SLICE / 64 : w->blocks;
        switch (10 * w->format + (int)((batch + LANES - 1) / LANES)) {
        case 10 * F32 + 1: listed_slice(w, l, first, last, start, end, F32, 1, list); break;
        case 10 * BF16 + 1: listed_slice(w, l, first, last, start, end, BF16, 1, list); break;
#if LANES <= 8
        case 10 * F32 + 2: listed_slice(w, l, first, last, start, end, F32, 2, list); break;
        case 10 * BF16 + 2: listed_slice(w, l, first, last, start, end, BF16, 2, list); break;
#endif
#if LANES <= 4
        case 10 * F32 + 3: listed_slice(w, l, first, last, start, end, F32, 3, list); break;
        case 10 * BF16 + 3: listed_slice(w, l, first, last, start, end, BF16, 3, list); break;
        case 10 * F32 + 4: listed_slice(w, l, first, last, start, end, F32, 4, list); break;
        case 10 * BF16 + 4: listed_slice(w, l, first, last, start, end, BF16, 4, list); break;
#endif
        }
    }
}

static int listed(const Weights *w, const void *x, int64_t batch, const void *bias, void *y, int threads) {
    Listing l = {scratch((size_t)(64 * w->blocks * WIDTH) * sizeof *l.x),
                 scratch((size_t)(4 * w->groups * WIDTH) * sizeof *l.sums),
                 scratch((size_t)w->groups * sizeof *l.cursor), scratch((size_t)threads * sizeof *l.lists)};
    int status = l.x && l.sums && l.cursor && l.lists ? OK : NO_MEMORY;
    if (status == OK) {
        memset(l.x, 0, (size_t)(64 * w->blocks * WIDTH) * sizeof *l.x);
        for (int64_t n = 0; n < batch; n++)
            for (int64_t i = 0; i < w->cols; i++) l.x[WIDTH * i + n] = get(x, n * w->cols + i, w->format);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int part = 0; part < threads; part++) {
            int64_t start = cut(w->groups, threads, part), end = cut(w->groups, threads, part + 1);
            listed_part(w, &l, batch, start, end, l.lists + part);
            for (int64_t row = 4 * start; row < 4 * end && row < w->rows; row++)
                for (int64_t n = 0; n < batch; n++) {
                    float offset = bias ? get(bias, row, w->format) : 0.0f;
                    put(y, n * w->rows + row, w->format, l.sums[WIDTH * row + n] + offset);
                }
        }
    }
    free(l.x);
    free(l.sums);
    free(l.cursor);
    free(l.lists);
    return status;
}

static int all_finite(const void *x, int64_t n, int format) {
    float zero = 0;
    for (int64_t i = 0; i < n; i++) zero += get(x, i, format) * 0.0f;
    return zero == 0.0f;
}

/* A tile's time grows with the batch, a list's with what is kept; at 16 rows they meet at about this density. */
#define MEET 0.22f

int sb_batch_gemm(const Weights *w, const void *x, int64_t batch, const void *bias, void *y, int threads) {
    int64_t kept = w->ptr ? w->ptr[w->groups] : w->groups * w->per_group;
    float most = MEET * (float)batch / WIDTH * (float)(w->rows * w->cols);
    int few = batch <= WIDTH && (float)kept <= most;
    return few && all_finite(x, batch * w->cols, w->format) ? listed(w, x, batch, bias, y, threads)
                                                            : expanded(w, x, batch, bias, y, threads);
}
