/* y = W x + bias where weights and inputs are sparse at once: of a bitmap, only what belongs to inputs with
   |x| > threshold is read.

   The bitmap lies input by input: outputs are cut into strips of `words` mask words, and in a strip the mask and the
   values of one input are contiguous. mask: uint64 [strips, inputs, words], bit j of word w is output
   64 * (strip * words + w) + j, outputs that do not exist are zero bits; values in the order (strip, input, ascending
   output); starts: int64 [strips], where a strip's values begin; offsets: int32 [strips, inputs, marks], where the
   values of every 16th word do, from there, so that a thread finds its part of a strip. Sums of a strip stay in L1 as
   float32 and inputs are added in ascending order: the result does not depend on the number of threads, each of which
   owns a range of mask words.

   A NaN in x is kept and reaches every output, infinity makes NaN of outputs whose weight was pruned, as in the masked
   dense product; what belongs to a skipped input is not read. */
#include "common.h"

#define MARK 16   /* words to an offset */
#define AT_ONCE 4 /* inputs per pass over the sums: their loads and stores cost more than four cursors do */

typedef struct {
    const uint64_t *mask;
    const char *values;
    const int64_t *starts;
    const int32_t *offsets;
    int format;
    int64_t inputs, words;
} Strips;

/* One input's part of a strip: its words from one on, and their values. */
typedef struct {
    const uint64_t *mask;
    const char *values;
} Part;

/* The mark at or in front of a word. */
INLINE const char *mark_of(const Strips *s, int64_t strip, int64_t row, int64_t word) {
    int64_t marks = (s->words + MARK - 1) / MARK, offset = s->offsets[row * marks + word / MARK];
    return s->values + (s->starts[strip] + offset) * (int64_t)size_of(s->format);
}

INLINE Part part_of(const Strips *s, int64_t strip, int64_t input, int64_t word) {
    int64_t row = strip * s->inputs + input;
    Part part = {s->mask + row * s->words + word, mark_of(s, strip, row, word)};
    for (int64_t w = word % MARK; w > 0; w--) part.values += (size_t)popcount(part.mask[-w]) * size_of(s->format);
    return part;
}

/* 64 outputs: sum += x[k] * weights of `count` inputs, a constant in every call, whose values move on. */
INLINE void add64(const uint64_t *kept, const char **v, const float *x, int format, const int count, float *sum) {
#if defined(SB_AVX512)
    if (format == BF16) {
        UNROLL(2) for (int half = 0; half < 2; half++, sum += 32) {
            vf first = load_vf(sum), second = load_vf(sum + LANES);
            UNROLL(4) for (int k = 0; k < count; k++) {
                uint32_t bits = (uint32_t)(kept[k] >> 32 * half);
                vu w = (vu)expand_bf16(bits, (const bf16 *)v[k]);
                v[k] += (size_t)popcount(bits) * sizeof(bf16);
                first += first_of_pairs(w) * x[k];
                second += second_of_pairs(w) * x[k];
            }
            store_vf(sum, first);
            store_vf(sum + LANES, second);
        }
        return;
    }
    UNROLL(4) for (int part = 0; part < 4; part++, sum += 16) {
        vf s = load_vf(sum);
        UNROLL(4) for (int k = 0; k < count; k++) {
            uint16_t bits = (uint16_t)(kept[k] >> 16 * part);
            s += (vf)expand_f32(bits, (const float *)v[k]) * x[k];
            v[k] += (size_t)popcount(bits) * sizeof(float);
        }
        store_vf(sum, s);
    }
#elif defined(SB_SHUFFLES)
    UNROLL(16) for (int part = 0; part < 64 / LANES; part++, sum += LANES) {
        vf s = load_vf(sum);
        UNROLL(4) for (int k = 0; k < count; k++) {
            uint32_t bits = PART(kept[k], part);
            vf w = format == BF16 ? expand_lanes_bf16(bits, (const bf16 *)v[k])
                                  : expand_lanes_f32(bits, (const float *)v[k]);
            s += w * x[k];
            v[k] += (size_t)few(bits) * size_of(format);
        }
        store_vf(sum, s);
    }
#else
    for (int k = 0; k < count; k++) {
        float w[64];
        expand64(kept[k], v[k], format, w);
        v[k] += (size_t)popcount(kept[k]) * size_of(format);
        for (int i = 0; i < 64; i += LANES) store_vf(sum + i, load_vf(sum + i) + load_vf(w + i) * x[k]);
    }
#endif
}

/* Which output sum number i is. */
INLINE int64_t place(int format, int64_t i) {
#if defined(SB_AVX512)
    if (format == BF16) return of_pairs(i);
#endif
    return (void)format, i;
}

/* Adds `count` inputs (a constant in every call) to the sums of words [first, last) of a strip; `next`: those that are
   to be fetched meanwhile. */
INLINE void pass(const Strips *s, int64_t strip, const int32_t *index, const float *x, const int count, int64_t first,
                 int64_t last, const int32_t *next, float *sum) {
    Part part[AT_ONCE];
    const char *v[AT_ONCE], *soon[AT_ONCE], *end[AT_ONCE];
    UNROLL(4) for (int k = 0; k < count; k++) {
        int64_t row = strip * s->inputs + next[k], after = last < s->words ? row : row + 1;
        part[k] = part_of(s, strip, index[k], first);
        v[k] = part[k].values;
        soon[k] = end[k] = mark_of(s, strip, row, first);
        if (after < (strip + 1) * s->inputs) end[k] = mark_of(s, strip, after, last < s->words ? last : 0);
        for (int64_t w = first; w < last; w += 8) __builtin_prefetch(s->mask + row * s->words + w);
    }
    for (int64_t w = 0; w < last - first; w++, sum += 64) {
        uint64_t kept[AT_ONCE];
        UNROLL(4) for (int k = 0; k < count; k++) {
            kept[k] = part[k].mask[w];
            if (soon[k] < end[k]) __builtin_prefetch(soon[k]);
            soon[k] += 64;
        }
        add64(kept, v, x, s->format, count, sum);
    }
}

/* The outputs of words [first, last) of a strip. */
static void strip_words(const Strips *s, int64_t strip, const int32_t *index, const float *x, int64_t n, int64_t first,
                        int64_t last, int64_t width, const void *bias, void *y, float *sum) {
    memset(sum, 0, (size_t)(64 * (last - first)) * sizeof *sum);
    int64_t k = 0;
    for (; k + AT_ONCE <= n; k += AT_ONCE)
        pass(s, strip, index + k, x + k, AT_ONCE, first, last, index + (k + 2 * AT_ONCE <= n ? k + AT_ONCE : k), sum);
    for (; k < n; k++) pass(s, strip, index + k, x + k, 1, first, last, index + k, sum);
    for (int64_t i = 0; i < 64 * (last - first); i++) {
        int64_t at = 64 * (strip * s->words + first) + place(s->format, i);
        if (at < width) put(y, at, s->format, sum[i] + (bias ? get(bias, at, s->format) : 0.0f));
    }
}

/* width: outputs; x: [inputs], bias: [width] or NULL, y: [width], contiguous and in the values' format. */
API int sb_strips_gemv(const uint64_t *mask, const void *values, const int64_t *starts, const int32_t *offsets,
                       int format, int64_t inputs, int64_t width, int64_t words, const void *x, float threshold,
                       const void *bias, void *y, int threads) {
    Strips s = {mask, (const char *)values, starts, offsets, format, inputs, words};
    int64_t all = (width + 63) / 64;
    int32_t *index = scratch((size_t)(inputs + 16) * sizeof *index);
    float *factor = scratch((size_t)(inputs + 16) * sizeof *factor);
    float *sums = scratch((size_t)(threads * 64 * words) * sizeof *sums);
    int status = index && factor && sums ? OK : NO_MEMORY;
    if (status == OK) {
        int64_t n = choose(x, format, inputs, threshold, index, factor);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int part = 0; part < threads; part++) {
            int64_t last = cut(all, threads, part + 1), next;
            for (int64_t word = cut(all, threads, part); word < last; word = next) {
                int64_t strip = word / words, end = (strip + 1) * words;
                next = end < last ? end : last;
                strip_words(&s, strip, index, factor, n, word - strip * words, next - strip * words, width, bias, y,
                            sums + part * 64 * words);
            }
        }
    }
    free(index);
    free(factor);
    free(sums);
    return status;
}

/* The dense matrix, transposed: out [inputs, width], contiguous, in the values' format. */
API int sb_strips_unpack(const uint64_t *mask, const void *values, const int64_t *starts, const int32_t *offsets,
                         int format, int64_t inputs, int64_t width, int64_t words, void *out, int threads) {
    Strips s = {mask, (const char *)values, starts, offsets, format, inputs, words};
    int64_t strips = ((width + 63) / 64 + words - 1) / words;
    size_t size = size_of(format);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t strip = 0; strip < strips; strip++)
            for (int64_t input = cut(inputs, threads, part); input < cut(inputs, threads, part + 1); input++) {
                Part from = part_of(&s, strip, input, 0);
                for (int64_t w = 0; w < words; w++) {
                    int64_t at = 64 * (strip * words + w), left = width - at < 64 ? width - at : 64;
                    float block[64];
                    if (left <= 0) break;
                    if (format == BF16)
                        copy64_bf16(from.mask[w], (const bf16 *)from.values, (bf16 *)block);
                    else
                        expand64_f32(from.mask[w], (const float *)from.values, block);
                    memcpy((char *)out + (size_t)(input * width + at) * size, block, (size_t)left * size);
                    from.values += (size_t)popcount(from.mask[w]) * size;
                }
            }
    return OK;
}
