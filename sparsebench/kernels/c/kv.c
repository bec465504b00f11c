/* Attention of one new token over a cache whose keys and values are bitmap records, and a dense window behind it.

   A record holds one token of one kv head: ceil(dim / 64) mask words, then the kept entries as bf16 in ascending order;
   every record of a buffer takes `stride` bytes, so tokens are reached without offsets. The buffers end with 64 spare
   bytes. Recent tokens follow densely, [kv_heads, recent, dim], in the same softmax.

   The heads that share a kv head are served from one expansion of its records. Tokens are cut into splits of fixed
   length, each with its own online softmax in float32, merged in order: the result does not depend on the number of
   threads. Where the bf16 dot product is used, probabilities are rounded to bf16. Pruned entries count as zeros: an
   infinite query entry gives NaN. */
#include "common.h"

#define CHUNK 64   /* tokens per softmax step */
#define SPLIT 2048 /* tokens per independent softmax */
#define MOST 4     /* heads per pass */
#define AHEAD 16   /* tokens that are fetched ahead */

typedef struct {
    const uint8_t *at; /* token 0 */
    int64_t stride;
    int dense; /* plain bf16 rows instead of records */
} Tokens;

typedef struct {
    const void *q; /* [MOST][padded], padded with zeros, in the order QUERY: bf16, or float32 without the bf16 dot */
    int64_t dim, padded, words;
    float scale;
} Query;

typedef struct {
    float top[MOST], sum[MOST];
    float *out; /* [MOST][padded], in the order PLACE */
} State;

/* Which of the 64 dimensions of word `w` exist. */
INLINE uint64_t existing(int64_t dim, int64_t w) {
    int64_t left = dim - 64 * w;
    return left >= 64 ? ~0ull : (1ull << left) - 1;
}

/* Eight bytes at a time: a copy of unknown length is a call, before which all sums are written to memory. */
INLINE uint64_t word_at(const uint8_t *p) {
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* Mask word `w` of a token and where its values start. */
INLINE uint64_t word_of(const Tokens *s, const Query *q, int64_t token, int64_t w, const bf16 **values) {
    const uint8_t *record = s->at + token * s->stride, *soon = record + AHEAD * s->stride;
    __builtin_prefetch(soon + (s->dense ? 128 : 64) * w);
    if (s->dense) {
        __builtin_prefetch(soon + 128 * w + 64);
        *values = (const bf16 *)record + 64 * w;
        return existing(q->dim, w);
    }
    const bf16 *v = (const bf16 *)(record + 8 * q->words);
    for (int64_t i = 0; i < w; i++) v += popcount(word_at(record + 8 * i));
    *values = v;
    return word_at(record + 8 * w);
}

#if defined(SB_AVX512)
INLINE void entries(const Tokens *s, const Query *q, int64_t token, int64_t w, __m512i *low, __m512i *high) {
    const bf16 *v;
    uint64_t mask = word_of(s, q, token, w, &v);
    if (s->dense) {
        *low = _mm512_maskz_loadu_epi16((uint32_t)mask, v);
        *high = _mm512_maskz_loadu_epi16((uint32_t)(mask >> 32), v + 32);
    } else {
        *low = expand_bf16((uint32_t)mask, v);
        *high = expand_bf16((uint32_t)(mask >> 32), v + popcount((uint32_t)mask));
    }
}

/* The four sums of four vectors. */
INLINE __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* scores: score[t * heads + h] for n tokens; heads is 1 (then four tokens at a time) or 4. Tokens behind the last
   repeat it; their scores are overwritten by -inf. values: out[h] += sum over tokens of weight[t * heads + h] *
   value[t]. */
#if defined(__AVX512BF16__)
INLINE void scores(const Tokens *s, const Query *q, int64_t first, int64_t n, const int heads, float *score) {
    const bf16 *query = (const bf16 *)q->q;
    const int step = MOST / heads;
    for (int64_t t = 0; t < n; t += step) {
        __m512 sum[MOST];
        UNROLL(4) for (int i = 0; i < MOST; i++) sum[i] = _mm512_setzero_ps();
        for (int64_t w = 0; w < q->words; w++)
            UNROLL(4) for (int u = 0; u < step; u++) {
                __m512i low, high;
                entries(s, q, first + (t + u < n ? t + u : n - 1), w, &low, &high);
                UNROLL(4) for (int h = 0; h < heads; h++) {
                    const bf16 *in = query + h * q->padded + 64 * w;
                    sum[u * heads + h] = dot_bf16(sum[u * heads + h], low, _mm512_load_si512(in));
                    sum[u * heads + h] = dot_bf16(sum[u * heads + h], high, _mm512_load_si512(in + 32));
                }
            }
        __m128 four = _mm_mul_ps(sum_four(sum[0], sum[1], sum[2], sum[3]), _mm_set1_ps(q->scale));
        _mm_storeu_ps(score + t * heads, four);
    }
}

INLINE void values(const Tokens *s, const Query *q, int64_t first, int64_t n, const int heads, const float *weight,
                   float *out) {
    uint32_t pair[CHUNK / 2][MOST];
    for (int64_t t = 0; t < n; t += 2)
        for (int h = 0; h < heads; h++) {
            bf16 other = t + 1 < n ? to_bf16(weight[(t + 1) * heads + h]) : 0;
            pair[t / 2][h] = to_bf16(weight[t * heads + h]) | (uint32_t)other << 16;
        }
    for (int64_t w = 0; w < q->words; w++) {
        __m512 sum[MOST][4];
        UNROLL(4) for (int h = 0; h < heads; h++)
            UNROLL(4) for (int c = 0; c < 4; c++) sum[h][c] = _mm512_load_ps(out + h * q->padded + 64 * w + 16 * c);
        for (int64_t t = 0; t < n; t += 2) {
            __m512i a0, a1, b0 = _mm512_setzero_si512(), b1 = b0;
            entries(s, q, first + t, w, &a0, &a1);
            if (t + 1 < n) entries(s, q, first + t + 1, w, &b0, &b1);
            __m512i value[4] = {_mm512_unpacklo_epi16(a0, b0), _mm512_unpackhi_epi16(a0, b0),
                                _mm512_unpacklo_epi16(a1, b1), _mm512_unpackhi_epi16(a1, b1)};
            UNROLL(4) for (int h = 0; h < heads; h++) {
                __m512i factor = _mm512_set1_epi32((int)pair[t / 2][h]);
                UNROLL(4) for (int c = 0; c < 4; c++) sum[h][c] = dot_bf16(sum[h][c], value[c], factor);
            }
        }
        UNROLL(4) for (int h = 0; h < heads; h++)
            UNROLL(4) for (int c = 0; c < 4; c++) _mm512_store_ps(out + h * q->padded + 64 * w + 16 * c, sum[h][c]);
    }
}

#define INNER sizeof(bf16)
#define QUERY(i) (i)
#define PLACE(i) ((i) / 32 * 32 + interleaved((int)((i) % 32)))
#else
INLINE void scores(const Tokens *s, const Query *q, int64_t first, int64_t n, const int heads, float *score) {
    const float *query = (const float *)q->q;
    const int step = MOST / heads;
    for (int64_t t = 0; t < n; t += step) {
        vf sum[MOST] = {{0}};
        for (int64_t w = 0; w < q->words; w++)
            UNROLL(4) for (int u = 0; u < step; u++) {
                __m512i low, high;
                entries(s, q, first + (t + u < n ? t + u : n - 1), w, &low, &high);
                vf entry[4] = {first_of_pairs((vu)low), second_of_pairs((vu)low), first_of_pairs((vu)high),
                               second_of_pairs((vu)high)};
                UNROLL(4) for (int h = 0; h < heads; h++)
                    UNROLL(4) for (int c = 0; c < 4; c++)
                        sum[u * heads + h] += entry[c] * load_vf(query + h * q->padded + 64 * w + LANES * c);
            }
        __m128 four = sum_four((__m512)sum[0], (__m512)sum[1], (__m512)sum[2], (__m512)sum[3]);
        _mm_storeu_ps(score + t * heads, _mm_mul_ps(four, _mm_set1_ps(q->scale)));
    }
}

INLINE void values(const Tokens *s, const Query *q, int64_t first, int64_t n, const int heads, const float *weight,
                   float *out) {
    for (int64_t w = 0; w < q->words; w++) {
        vf sum[MOST][4];
        UNROLL(4) for (int h = 0; h < heads; h++)
            UNROLL(4) for (int c = 0; c < 4; c++) sum[h][c] = load_vf(out + h * q->padded + 64 * w + LANES * c);
        for (int64_t t = 0; t < n; t++) {
            __m512i low, high;
            entries(s, q, first + t, w, &low, &high);
            vf entry[4] = {first_of_pairs((vu)low), second_of_pairs((vu)low), first_of_pairs((vu)high),
                           second_of_pairs((vu)high)};
            UNROLL(4) for (int h = 0; h < heads; h++)
                UNROLL(4) for (int c = 0; c < 4; c++) sum[h][c] += entry[c] * weight[t * heads + h];
        }
        UNROLL(4) for (int h = 0; h < heads; h++)
            UNROLL(4) for (int c = 0; c < 4; c++) store_vf(out + h * q->padded + 64 * w + LANES * c, sum[h][c]);
    }
}

#define INNER sizeof(float)
#define QUERY(i) of_pairs(i)
#define PLACE(i) of_pairs(i)
#endif
#else
INLINE void entries(const Tokens *s, const Query *q, int64_t token, int64_t w, float *entry) {
    const bf16 *v;
    uint64_t mask = word_of(s, q, token, w, &v);
    if (!s->dense) {
        expand64_bf16(mask, v, entry);
        return;
    }
    if (mask == ~0ull)
        for (int i = 0; i < 64; i++) entry[i] = from_bf16(v[i]);
    else
        for (int i = 0; i < 64; i++) entry[i] = mask >> i & 1 ? from_bf16(v[i]) : 0.0f;
}

INLINE void scores(const Tokens *s, const Query *q, int64_t first, int64_t n, const int heads, float *score) {
    const float *query = (const float *)q->q;
    for (int64_t t = 0; t < n; t++) {
        vf sum[MOST] = {{0}};
        for (int64_t w = 0; w < q->words; w++) {
            float entry[64];
            entries(s, q, first + t, w, entry);
            for (int i = 0; i < 64; i += LANES)
                UNROLL(4) for (int h = 0; h < heads; h++)
                    sum[h] += load_vf(entry + i) * load_vf(query + h * q->padded + 64 * w + i);
        }
        for (int h = 0; h < heads; h++) score[t * heads + h] = sum_vf(sum[h]) * q->scale;
    }
}

INLINE void values(const Tokens *s, const Query *q, int64_t first, int64_t n, const int heads, const float *weight,
                   float *out) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t w = 0; w < q->words; w++) {
            float entry[64];
            entries(s, q, first + t, w, entry);
            for (int h = 0; h < heads; h++) {
                float *to = out + h * q->padded + 64 * w;
                for (int i = 0; i < 64; i += LANES)
                    store_vf(to + i, load_vf(to + i) + load_vf(entry + i) * weight[t * heads + h]);
            }
        }
}

#define INNER sizeof(float)
#define QUERY(i) (i)
#define PLACE(i) (i)
#endif

/* One chunk of n tokens through scores, softmax and values. */
INLINE void chunk(const Tokens *k, const Tokens *v, const Query *q, int64_t first, int64_t n, const int heads,
                  State *state) {
    float score[CHUNK * MOST] __attribute__((aligned(64)));
    float most[16], top[16], sum[16] = {0};
    scores(k, q, first, n, heads, score);
    for (int64_t i = n * heads; i < CHUNK * heads; i++) score[i] = -INFINITY;
    for (int i = 0; i < 16; i++) most[i] = score[i]; /* lane i belongs to head i % heads */
    for (int j = 16; j < CHUNK * heads; j += 16)
        for (int i = 0; i < 16; i++) most[i] = score[j + i] > most[i] ? score[j + i] : most[i];
    for (int h = 0; h < heads; h++) {
        float peak = most[h];
        for (int i = h + heads; i < 16; i += heads) peak = most[i] > peak ? most[i] : peak;
        if (peak > state->top[h]) {
            float shrink = state->top[h] == -INFINITY ? 0.0f : exp_negative(state->top[h] - peak);
            for (int64_t d = 0; d < q->padded; d++) state->out[h * q->padded + d] *= shrink;
            state->sum[h] *= shrink;
            state->top[h] = peak;
        }
        for (int i = h; i < 16; i += heads) top[i] = state->top[h] == -INFINITY ? 0.0f : state->top[h];
    }
    for (int j = 0; j < CHUNK * heads; j += 16)
        for (int i = 0; i < 16; i++) {
            score[j + i] = exp_negative(score[j + i] - top[i]);
            sum[i] += score[j + i];
        }
    for (int i = 0; i < 16; i++) state->sum[i % heads] += sum[i];
    values(v, q, first, n, heads, score, state->out);
}

static void walk(const Tokens *k, const Tokens *v, const Query *q, int64_t first, int64_t last, int heads,
                   State *state) {
    for (int64_t t = first; t < last; t += CHUNK) {
        int64_t n = last - t < CHUNK ? last - t : CHUNK;
        if (heads == 1)
            chunk(k, v, q, t, n, 1, state);
        else
            chunk(k, v, q, t, n, MOST, state);
    }
}

/* The queries of one pass, padded with zeros to `heads` rows of `padded`. */
static void prepare(const void *q, int format, int64_t have, int64_t dim, int64_t padded, void *to) {
    memset(to, 0, (size_t)(MOST * padded) * INNER);
    for (int64_t h = 0; h < have; h++)
        for (int64_t i = 0; i < padded; i++) {
            if (QUERY(i) >= dim) continue;
            float value = get(q, h * dim + QUERY(i), format);
            if (INNER == sizeof(bf16))
                ((bf16 *)to)[h * padded + i] = to_bf16(value);
            else
                ((float *)to)[h * padded + i] = value;
        }
}

/* Joins the splits of one head in order: [splits][2 + padded] each, (top, sum, out). */
static void merge(const float *part, int64_t splits, int64_t step, int64_t padded, float *out) {
    float top = -INFINITY, sum = 0;
    for (int64_t s = 0; s < splits; s++) top = part[s * step] > top ? part[s * step] : top;
    memset(out, 0, (size_t)padded * sizeof *out);
    for (int64_t s = 0; s < splits; s++) {
        const float *p = part + s * step;
        if (p[0] == -INFINITY && p[1] == 0.0f) continue;
        float factor = exp_negative(p[0] - top);
        sum += p[1] * factor;
        for (int64_t d = 0; d < padded; d++) out[d] += p[2 + d] * factor;
    }
    for (int64_t d = 0; d < padded; d++) out[d] = sum == 0.0f ? 0.0f : out[d] / sum;
}

/* q, out: [heads, dim] in `format`; k, v: records [kv_heads, capacity, stride], the first `tokens` of each head valid;
   recent_k, recent_v: bf16 [kv_heads, recent, dim] or NULL. dim <= 256. */
API int sb_kv_attention(const void *q, int format, int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                        const uint8_t *k, const uint8_t *v, int64_t k_stride, int64_t v_stride, int64_t capacity,
                        int64_t tokens, const bf16 *recent_k, const bf16 *recent_v, int64_t recent, void *out,
                        int threads) {
    int64_t words = (dim + 63) / 64, padded = 64 * words, share = heads / kv_heads;
    int64_t passes = (share + MOST - 1) / MOST, sparse = (tokens + SPLIT - 1) / SPLIT;
    int64_t splits = sparse + (recent + SPLIT - 1) / SPLIT, step = padded + 2, jobs = kv_heads * passes * splits;
    size_t each = (size_t)round_up((int64_t)((size_t)(MOST * padded) * (INNER + sizeof(float))), 64);
    float *parts = scratch((size_t)(heads * (splits + 1) * step) * sizeof *parts);
    char *memory = scratch(each * (size_t)threads);
    if (!parts || !memory) {
        free(parts);
        free(memory);
        return NO_MEMORY;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t job = cut(jobs, threads, part); job < cut(jobs, threads, part + 1); job++) {
            int64_t split = job % splits, pass = job / splits % passes, kv = job / splits / passes;
            int64_t head = kv * share + pass * MOST, have = share - pass * MOST < MOST ? share - pass * MOST : MOST;
            int window = split >= sparse;
            int64_t first = (window ? split - sparse : split) * SPLIT, end = window ? recent : tokens;
            int64_t last = first + SPLIT < end ? first + SPLIT : end, row = dim * (int64_t)sizeof(bf16);
            Tokens keys = window ? (Tokens){(const uint8_t *)recent_k + kv * recent * row, row, 1}
                                 : (Tokens){k + kv * capacity * k_stride, k_stride, 0};
            Tokens vals = window ? (Tokens){(const uint8_t *)recent_v + kv * recent * row, row, 1}
                                 : (Tokens){v + kv * capacity * v_stride, v_stride, 0};
            char *mine = memory + each * (size_t)part;
            State state = {.out = (float *)mine};
            for (int h = 0; h < MOST; h++) state.top[h] = -INFINITY;
            memset(mine, 0, (size_t)(MOST * padded) * sizeof(float));
            Query query = {mine + (size_t)(MOST * padded) * sizeof(float), dim, padded, words, scale};
            prepare((const char *)q + (size_t)(head * dim) * size_of(format), format, have, dim, padded,
                    mine + (size_t)(MOST * padded) * sizeof(float));
            walk(&keys, &vals, &query, first, last, have == 1 ? 1 : MOST, &state);
            for (int64_t h = 0; h < have; h++) {
                float *to = parts + ((head + h) * splits + split) * step;
                to[0] = state.top[h];
                to[1] = state.sum[h];
                memcpy(to + 2, state.out + h * padded, (size_t)padded * sizeof(float));
            }
        }
    for (int64_t head = 0; head < heads; head++) {
        float *whole = parts + heads * splits * step;
        merge(parts + head * splits * step, splits, step, padded, whole);
        for (int64_t i = 0; i < padded; i++)
            if (PLACE(i) < dim) put(out, head * dim + PLACE(i), format, whole[i]);
    }
    free(parts);
    free(memory);
    return OK;
}
