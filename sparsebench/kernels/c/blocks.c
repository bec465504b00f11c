/* Block-sparse attention of a prompt (flash attention whose inner loop walks a list of key blocks).

   For each head and block of 64 queries: the listed blocks of 64 keys, online softmax in float32. Keys are visible to
   query i of position p where their own position is <= p; `positions` gives the keys' positions where they were
   permuted (PBS-Attn), else it is their index. Only blocks with a key beyond the first query's position are masked
   entry by entry. A query that sees no key at all gets zeros. A NaN in a visible score makes its row NaN; -inf scores
   count as invisible. An invisible entry of a visited block has weight 0, so an infinite value there still gives NaN.

   Keys are packed per block as [D / 2][64][2] and values as [32][D][2] for the bf16 dot product, or as float32
   [D][64] and [64][D] where there is none; probabilities are rounded to bf16 in the first case. Query blocks are taken
   longest list first; each is computed by one thread alone, so the result does not depend on how many there are. */
#include "common.h"

#define BLOCK 64
#define ROWS 4 /* queries per register tile */

#if defined(__AVX512BF16__)
#define PAIRED(format) ((format) == BF16)
#else
#define PAIRED(format) ((void)(format), 0)
#endif

typedef struct {
    int format, paired;
    int64_t queries, keys, dim, padded; /* padded: dim rounded up to 16, as packed */
    int64_t first;                      /* position of query 0 */
    float scale;
    const int32_t *positions; /* of this head's keys, or NULL */
    const char *k, *v;        /* packed, of this head */
    const int32_t *latest;    /* per key block: its greatest position */
} Head;

typedef struct {
    float *score;     /* [64][64] */
    bf16 *weight;     /* the same as bf16, paired case */
    float *out;       /* [64][padded] */
    char *query;      /* [64][padded] in the packed format */
    float top[BLOCK]; /* running maximum per query */
    float sum[BLOCK];
} Work;

/* ---- packing ---- */

static void pack_head(const void *k, const void *v, int format, int64_t keys, int64_t dim, int64_t padded, char *pk,
                      char *pv) {
    int64_t blocks = (keys + BLOCK - 1) / BLOCK;
    int paired = PAIRED(format);
    size_t size = (size_t)(blocks * BLOCK * padded) * (paired ? 2 : 4);
    memset(pk, 0, size);
    memset(pv, 0, size);
    if (!paired) {
        for (int64_t t = 0; t < keys; t++) {
            float *to_k = (float *)pk + t / BLOCK * BLOCK * padded + t % BLOCK, *to_v = (float *)pv + t * padded;
            for (int64_t d = 0; d < dim; d++) {
                to_k[d * BLOCK] = get(k, t * dim + d, format);
                to_v[d] = get(v, t * dim + d, format);
            }
        }
        return;
    }
    for (int64_t t = 0; t < keys; t++) { /* keys: pairs of dimensions move together */
        bf16 *to = (bf16 *)pk + t / BLOCK * BLOCK * padded + t % BLOCK * 2;
        const bf16 *from = (const bf16 *)k + t * dim;
        for (int64_t d = 0; d + 1 < dim; d += 2) memcpy(to + d * BLOCK, from + d, 4);
        if (dim % 2) to[(dim - 1) * BLOCK] = from[dim - 1];
    }
    for (int64_t t = 0; t < keys; t += 2) { /* values: two tokens are interleaved */
        bf16 *to = (bf16 *)pv + t * padded;
        const bf16 *from = (const bf16 *)v + t * dim;
        if (t + 1 < keys)
            for (int64_t d = 0; d < dim; d++) to[2 * d] = from[d], to[2 * d + 1] = from[dim + d];
        else
            for (int64_t d = 0; d < dim; d++) to[2 * d] = from[d];
    }
}

/* ---- scores: 4 queries x 64 keys ---- */

#if defined(__AVX512BF16__)
INLINE void scores_bf16(const bf16 *q, const bf16 *k, int64_t padded, float scale, float *score) {
    __m512 sum[ROWS][4];
    UNROLL(4) for (int r = 0; r < ROWS; r++) UNROLL(4) for (int c = 0; c < 4; c++) sum[r][c] = _mm512_setzero_ps();
    for (int64_t d = 0; d < padded; d += 2) {
        __m512i key[4];
        UNROLL(4) for (int c = 0; c < 4; c++) key[c] = _mm512_load_si512(k + d * BLOCK + 32 * c);
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, q + r * padded + d, 4);
            __m512i query = _mm512_set1_epi32(pair);
            UNROLL(4) for (int c = 0; c < 4; c++) sum[r][c] = dot_bf16(sum[r][c], key[c], query);
        }
    }
    UNROLL(4) for (int r = 0; r < ROWS; r++)
        UNROLL(4) for (int c = 0; c < 4; c++)
            _mm512_store_ps(score + r * BLOCK + 16 * c, _mm512_mul_ps(sum[r][c], _mm512_set1_ps(scale)));
}

/* out += weights x values for 4 queries and 16 * n dimensions; n is a constant in every call. */
INLINE void values_bf16(const bf16 *p, const bf16 *v, int64_t padded, const int n, float *out) {
    __m512 sum[ROWS][4];
    UNROLL(4) for (int r = 0; r < ROWS; r++)
        UNROLL(4) for (int c = 0; c < n; c++) sum[r][c] = _mm512_load_ps(out + r * padded + 16 * c);
    for (int t = 0; t < BLOCK; t += 2) {
        __m512i value[4];
        UNROLL(4) for (int c = 0; c < n; c++) value[c] = _mm512_load_si512(v + t * padded + 32 * c);
        UNROLL(4) for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, p + r * BLOCK + t, 4);
            __m512i weight = _mm512_set1_epi32(pair);
            UNROLL(4) for (int c = 0; c < n; c++) sum[r][c] = dot_bf16(sum[r][c], value[c], weight);
        }
    }
    UNROLL(4) for (int r = 0; r < ROWS; r++)
        UNROLL(4) for (int c = 0; c < n; c++) _mm512_store_ps(out + r * padded + 16 * c, sum[r][c]);
}
#endif

#define WIDE (64 / LANES < 4 ? 64 / LANES : 4) /* vectors per register tile */
#define FEW (LANES == 16 ? 4 : 2)              /* queries per register tile of float32 */

/* sum of a[r][i] * b[i][c] over i < n: out[r][c] (+)= for FEW rows and WIDE vectors of columns. */
INLINE void tile_f32(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t n, const int width,
                     int add, float scale, float *out, int64_t out_stride) {
    vf sum[FEW][WIDE];
    UNROLL(4) for (int r = 0; r < FEW; r++)
        UNROLL(4) for (int c = 0; c < width; c++)
            sum[r][c] = add ? load_vf(out + r * out_stride + LANES * c) : zero_vf();
    for (int64_t i = 0; i < n; i++) {
        vf in[WIDE];
        UNROLL(4) for (int c = 0; c < width; c++) in[c] = load_vf(b + i * b_stride + LANES * c);
        UNROLL(4) for (int r = 0; r < FEW; r++)
            UNROLL(4) for (int c = 0; c < width; c++) sum[r][c] += in[c] * a[r * a_stride + i];
    }
    UNROLL(4) for (int r = 0; r < FEW; r++)
        UNROLL(4) for (int c = 0; c < width; c++) store_vf(out + r * out_stride + LANES * c, sum[r][c] * scale);
}

static void block_scores(const Head *h, const char *k, const Work *w, int64_t row) {
    float *score = w->score + row * BLOCK;
#if defined(__AVX512BF16__)
    if (h->paired) {
        scores_bf16((const bf16 *)w->query + row * h->padded, (const bf16 *)k, h->padded, h->scale, score);
        return;
    }
#endif
    const float *q = (const float *)w->query + row * h->padded;
    for (int r = 0; r < ROWS; r += FEW)
        for (int c = 0; c < BLOCK; c += WIDE * LANES)
            tile_f32(q + r * h->padded, h->padded, (const float *)k + c, BLOCK, h->dim, WIDE, 0, h->scale,
                     score + r * BLOCK + c, BLOCK);
}

static void block_values(const Head *h, const char *v, const Work *w, int64_t row) {
    float *out = w->out + row * h->padded;
    int64_t d = 0;
#if defined(__AVX512BF16__)
    if (h->paired) {
        const bf16 *p = w->weight + row * BLOCK, *value = (const bf16 *)v;
        for (; d + 64 <= h->padded; d += 64) values_bf16(p, value + 2 * d, h->padded, 4, out + d);
        for (; d < h->padded; d += 16) values_bf16(p, value + 2 * d, h->padded, 1, out + d);
        return;
    }
#endif
    const float *p = w->score + row * BLOCK, *value = (const float *)v;
    for (int r = 0; r < ROWS; r += FEW) {
        for (d = 0; d + WIDE * LANES <= h->padded; d += WIDE * LANES)
            tile_f32(p + r * BLOCK, BLOCK, value + d, h->padded, BLOCK, WIDE, 1, 1.0f, out + r * h->padded + d,
                     h->padded);
        for (; d < h->padded; d += LANES)
            tile_f32(p + r * BLOCK, BLOCK, value + d, h->padded, BLOCK, 1, 1, 1.0f, out + r * h->padded + d, h->padded);
    }
}

/* ---- one block of queries ---- */

static void mask_scores(const Head *h, int64_t block, int64_t query, float *score) {
    for (int64_t j = 0; j < BLOCK; j++) {
        int64_t key = block * BLOCK + j;
        int64_t position = key >= h->keys ? INT64_MAX : h->positions ? h->positions[key] : key;
        if (position > h->first + query) score[j] = -INFINITY;
    }
}

INLINE float maximum(const float *score) {
#if defined(SB_AVX512)
    __m512 first = _mm512_max_ps(_mm512_load_ps(score), _mm512_load_ps(score + 16));
    __m512 second = _mm512_max_ps(_mm512_load_ps(score + 32), _mm512_load_ps(score + 48));
    return _mm512_reduce_max_ps(_mm512_max_ps(first, second));
#else
    float top[LANES];
    for (int i = 0; i < LANES; i++) top[i] = score[i];
    for (int j = LANES; j < BLOCK; j += LANES)
        for (int i = 0; i < LANES; i++) top[i] = score[j + i] > top[i] ? score[j + i] : top[i];
    float most = top[0];
    for (int i = 1; i < LANES; i++) most = top[i] > most ? top[i] : most;
    return most;
#endif
}

/* Scores become exp(score - top); returns their sum. */
INLINE float exponentials(float *score, float top) {
    float total = 0, sums[16] = {0};
#if defined(SB_AVX512)
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < BLOCK; j += 16) {
        __m512 weight = exp_negative_16(_mm512_sub_ps(_mm512_load_ps(score + j), _mm512_set1_ps(top)));
        _mm512_store_ps(score + j, weight);
        sum = _mm512_add_ps(sum, weight);
    }
    _mm512_storeu_ps(sums, sum);
#else
    for (int j = 0; j < BLOCK; j += 16)
        for (int i = 0; i < 16; i++) {
            score[j + i] = exp_negative(score[j + i] - top);
            sums[i] += score[j + i];
        }
#endif
    for (int i = 0; i < 16; i++) total += sums[i];
    return total;
}

/* Turns a row of scores into weights relative to the running maximum, which moves if it must. */
INLINE void soften(Work *w, int64_t row, int64_t padded, int paired) {
    float *score = w->score + row * BLOCK, most = maximum(score);
    if (most > w->top[row]) {
        float shrink = w->top[row] == -INFINITY ? 0.0f : exp_negative(w->top[row] - most);
        float *out = w->out + row * padded;
        for (int64_t d = 0; d < padded; d++) out[d] *= shrink;
        w->sum[row] *= shrink;
        w->top[row] = most;
    }
    float top = w->top[row] == -INFINITY ? 0.0f : w->top[row]; /* nothing visible yet: exp(-inf - 0) = 0 */
    w->sum[row] += exponentials(score, top);
#if defined(__AVX512BF16__)
    if (paired)
        for (int j = 0; j < BLOCK; j += 32) {
            __m512 low = _mm512_load_ps(score + j), high = _mm512_load_ps(score + j + 16);
            _mm512_store_si512(w->weight + row * BLOCK + j, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
#endif
    (void)paired;
}

static void query_block(const Head *h, const void *q, int64_t start, const int32_t *list, int64_t count, Work *w,
                        void *out) {
    int64_t rows = h->queries - start < BLOCK ? h->queries - start : BLOCK, tiles = round_up(rows, ROWS);
    size_t unit = h->paired ? 2 : 4;
    memset(w->query, 0, (size_t)(BLOCK * h->padded) * unit);
    memset(w->out, 0, (size_t)(BLOCK * h->padded) * sizeof(float));
    for (int64_t r = 0; r < BLOCK; r++) w->top[r] = -INFINITY, w->sum[r] = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < h->dim; d++) {
            if (h->paired)
                ((bf16 *)w->query)[r * h->padded + d] = ((const bf16 *)q)[(start + r) * h->dim + d];
            else
                ((float *)w->query)[r * h->padded + d] = get(q, (start + r) * h->dim + d, h->format);
        }
    for (int64_t i = 0; i < count; i++) {
        int64_t block = list[i], at = block * BLOCK * h->padded * (int64_t)unit;
        int whole = h->latest[block] <= h->first + start;
        /* all rows in each step: keys and values of float32 do not fit the first cache together */
        for (int64_t row = 0; row < tiles; row += ROWS) block_scores(h, h->k + at, w, row);
        for (int64_t r = 0; r < tiles; r++) {
            if (!whole) mask_scores(h, block, start + r, w->score + r * BLOCK);
            soften(w, r, h->padded, h->paired);
        }
        for (int64_t row = 0; row < tiles; row += ROWS) block_values(h, h->v + at, w, row);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < h->dim; d++) {
            float value = w->out[r * h->padded + d];
            put(out, (start + r) * h->dim + d, h->format, w->sum[r] == 0.0f ? 0.0f : value / w->sum[r]);
        }
}

/* ---- all heads ---- */

typedef struct {
    int32_t head, block, length;
} Job;

static int longest_first(const void *a, const void *b) {
    const Job *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    if (x->head != y->head) return x->head < y->head ? -1 : 1;
    return (x->block > y->block) - (x->block < y->block);
}

static size_t work_size(int64_t padded) {
    return sizeof(Work) + BLOCK * BLOCK * 6 + (size_t)(BLOCK * padded) * 8 + 5 * 64;
}

static Work *work_at(char *memory, int64_t padded) {
    Work *w = (Work *)memory;
    char *next = memory + round_up(sizeof(Work), 64);
    w->score = (float *)next;
    next += BLOCK * BLOCK * sizeof(float);
    w->weight = (bf16 *)next;
    next += BLOCK * BLOCK * sizeof(bf16);
    w->out = (float *)next;
    next += BLOCK * padded * (int64_t)sizeof(float);
    w->query = next;
    return w;
}

/* q: [heads, queries, dim], k, v: [kv_heads, keys, dim], out as q, contiguous, in `format`. Block lists: ptr
   [heads * query_blocks + 1] and idx, ascending key blocks. positions: [heads, keys] or NULL (they make k and v per
   query head: kv_heads == heads). first: position of query 0. */
API int sb_blocks_attention(const void *q, const void *k, const void *v, int format, int64_t heads, int64_t kv_heads,
                            int64_t queries, int64_t keys, int64_t dim, float scale, int64_t first, const int32_t *ptr,
                            const int32_t *idx, const int32_t *positions, void *out, int threads) {
    int64_t padded = round_up(dim, 16), qb = (queries + BLOCK - 1) / BLOCK, kb = (keys + BLOCK - 1) / BLOCK;
    int paired = PAIRED(format);
    int64_t per_head = kb * BLOCK * padded * (paired ? 2 : 4);
    size_t each = (size_t)round_up((int64_t)work_size(padded), 64);
    char *packed = scratch((size_t)(2 * kv_heads * per_head)), *memory = scratch(each * (size_t)threads);
    Job *jobs = scratch((size_t)(heads * qb) * sizeof *jobs);
    int32_t *latest = scratch((size_t)(heads * kb) * sizeof *latest);
    int status = packed && memory && jobs && latest ? OK : NO_MEMORY;
    if (status == OK) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t h = 0; h < kv_heads; h++) {
            size_t from = (size_t)(h * keys * dim) * size_of(format);
            pack_head((const char *)k + from, (const char *)v + from, format, keys, dim, padded, packed + h * per_head,
                      packed + (kv_heads + h) * per_head);
        }
        for (int64_t i = 0; i < heads * kb; i++) {
            int64_t h = i / kb, start = i % kb * BLOCK, end = start + BLOCK;
            latest[i] = end > keys ? INT32_MAX : positions ? 0 : (int32_t)(end - 1);
            for (int64_t t = start; positions && t < end && t < keys; t++)
                if (positions[h * keys + t] > latest[i]) latest[i] = positions[h * keys + t];
        }
        for (int64_t i = 0; i < heads * qb; i++)
            jobs[i] = (Job){(int32_t)(i / qb), (int32_t)(i % qb), ptr[i + 1] - ptr[i]};
        qsort(jobs, (size_t)(heads * qb), sizeof *jobs, longest_first);
        int64_t taken = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int part = 0; part < threads; part++) {
            Work *w = work_at(memory + each * (size_t)part, padded);
            for (;;) {
                int64_t i = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
                if (i >= heads * qb) break;
                int64_t head = jobs[i].head, list = head * qb + jobs[i].block, kv = head * kv_heads / heads;
                Head h = {format, paired, queries, keys, dim, padded, first, scale,
                          positions ? positions + head * keys : NULL, packed + kv * per_head,
                          packed + (kv_heads + kv) * per_head, latest + head * kb};
                size_t from = (size_t)(head * queries * dim) * size_of(format);
                query_block(&h, (const char *)q + from, (int64_t)jobs[i].block * BLOCK, idx + ptr[list],
                            jobs[i].length, w, (char *)out + from);
            }
        }
    }
    free(packed);
    free(memory);
    free(jobs);
    free(latest);
    return status;
}
