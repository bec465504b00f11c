/* y = W x + bias for weights of which little is left: per row the places and values of what was kept.

   A bitmap costs the same whatever it holds: two instructions or so for every 16 columns. Here work follows what was
   kept. Rows come in slices of 16, columns in chunks of 64. A chunk of a slice is a number of steps, and a step takes
   up to two entries of each row: lanes 2 r and 2 r + 1 are row r's, so that pairs of lanes add up to one sum per row
   and nothing is reduced across lanes. steps: uint8 [slices, chunks]; masks: uint32, one per step, which lanes are
   taken; index: uint8, a column within its chunk, and values, both in the order (slice, chunk, step, lane) without the
   lanes that are not; starts: int64 [slices + 1, 2], where a slice's masks and its entries begin.

   What was removed is not multiplied: an infinity in x reaches only the rows that kept its weight. The order of
   additions depends on the layout and on the instruction set, never on the number of threads. */
#include "bitmap.h"

#define ROWS 16   /* of a slice */
#define CHUNK 64  /* columns: what one permutation of two registers can reach */
#define AT_ONCE 4 /* rows of input that share what was unpacked */

typedef struct {
    const uint8_t *steps;
    const uint32_t *masks;
    const uint8_t *index;
    const bf16 *values;
    const int64_t *starts;
    int64_t rows, chunks, slices;
} Lists;

static Lists lists_of(const uint8_t *steps, const uint32_t *masks, const uint8_t *index, const bf16 *values,
                      const int64_t *starts, int64_t rows, int64_t cols) {
    Lists l = {steps, masks, index, values, starts, rows, (cols + CHUNK - 1) / CHUNK, (rows + ROWS - 1) / ROWS};
    return l;
}

#if defined(SB_AVX512)
/* The bytes of the taken lanes as 16-bit lanes; what the register held before is waited for otherwise (common.h). */
INLINE __m512i expand_index(__mmask32 taken, const uint8_t *index) {
    __m256i out;
    __asm__("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}%{z%}"
            : "=&v"(out)
            : "v"(_mm256_loadu_si256((const __m256i *)index)), "Yk"(taken));
    return _mm512_cvtepu8_epi16(out);
}

/* out [batch][ROWS] for rows of x that lie `stride` apart; batch is a constant in every call. */
INLINE void slice_times(const Lists *l, int64_t slice, const bf16 *x, int64_t stride, const int batch, float *out) {
    const uint32_t *masks = l->masks + l->starts[2 * slice];
    const uint8_t *index = l->index + l->starts[2 * slice + 1];
    const bf16 *values = l->values + l->starts[2 * slice + 1];
    const uint8_t *steps = l->steps + slice * l->chunks;
    vf first[AT_ONCE], second[AT_ONCE];
    UNROLL(4) for (int n = 0; n < batch; n++) first[n] = second[n] = zero_vf();
    for (int64_t chunk = 0; chunk < l->chunks; chunk++, x += CHUNK) {
        __m512i low[AT_ONCE], high[AT_ONCE];
        UNROLL(4) for (int n = 0; n < batch; n++) {
            low[n] = _mm512_load_si512(x + n * stride);
            high[n] = _mm512_load_si512(x + n * stride + CHUNK / 2);
        }
        UNROLL(3) for (int line = 0; line < 3; line++)
            _mm_prefetch((const char *)(values + 1024 + 32 * line), _MM_HINT_T0);
        UNROLL(2) for (int line = 0; line < 2; line++)
            _mm_prefetch((const char *)(index + 1024 + 64 * line), _MM_HINT_T0);
        for (int step = steps[chunk]; step; step--) {
            __mmask32 taken = *masks++;
            __m512i w = expand_bf16(taken, values), at = expand_index(taken, index);
            values += popcount(taken);
            index += popcount(taken);
            UNROLL(4) for (int n = 0; n < batch; n++) {
                /* lanes that are not taken become 0 in both factors: an infinity at column 0 is not theirs */
                __m512i in = _mm512_maskz_permutex2var_epi16(taken, low[n], at, high[n]);
#if defined(__AVX512BF16__)
                first[n] = (vf)dot_bf16((__m512)first[n], w, in);
#else
                first[n] += first_of_pairs((vu)w) * first_of_pairs((vu)in);
                second[n] += second_of_pairs((vu)w) * second_of_pairs((vu)in);
#endif
            }
        }
    }
    UNROLL(4) for (int n = 0; n < batch; n++) store_vf(out + n * ROWS, first[n] + second[n]);
}

static void slice_of(const Lists *l, int64_t slice, const bf16 *x, int64_t stride, int64_t batch, float *out) {
    switch (batch) {
    case 1: slice_times(l, slice, x, stride, 1, out); break;
    case 2: slice_times(l, slice, x, stride, 2, out); break;
    case 3: slice_times(l, slice, x, stride, 3, out); break;
    default: slice_times(l, slice, x, stride, 4, out); break;
    }
}
#else
static void slice_of(const Lists *l, int64_t slice, const bf16 *x, int64_t stride, int64_t batch, float *out) {
    const uint32_t *masks = l->masks + l->starts[2 * slice];
    const uint8_t *index = l->index + l->starts[2 * slice + 1];
    const bf16 *values = l->values + l->starts[2 * slice + 1];
    memset(out, 0, AT_ONCE * ROWS * sizeof *out);
    for (int64_t chunk = 0; chunk < l->chunks; chunk++, x += CHUNK)
        for (int step = l->steps[slice * l->chunks + chunk]; step; step--)
            for (uint32_t taken = *masks++; taken; taken &= taken - 1, index++, values++)
                for (int64_t n = 0; n < batch; n++)
                    out[n * ROWS + __builtin_ctz(taken) / 2] += from_bf16(*values) * from_bf16(x[n * stride + *index]);
}
#endif

/* x: [batch, cols], bias: [rows] or NULL, y: [batch, rows], all bf16 and contiguous. */
API int sb_lists_gemm(const uint8_t *steps, const uint32_t *masks, const uint8_t *index, const bf16 *values,
                      const int64_t *starts, int64_t rows, int64_t cols, const bf16 *x, int64_t batch,
                      const bf16 *bias, bf16 *y, int threads) {
    Lists l = lists_of(steps, masks, index, values, starts, rows, cols);
    int64_t padded = CHUNK * l.chunks;
    bf16 *in = padded_copy(x, BF16, BF16, batch, cols, padded);
    if (!in) return NO_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        float out[AT_ONCE * ROWS];
        for (int64_t slice = cut(l.slices, threads, part); slice < cut(l.slices, threads, part + 1); slice++)
            for (int64_t from = 0; from < batch; from += AT_ONCE) {
                int64_t many = batch - from < AT_ONCE ? batch - from : AT_ONCE;
                slice_of(&l, slice, in + from * padded, padded, many, out);
                for (int64_t n = 0; n < many; n++)
                    for (int64_t q = 0, row = ROWS * slice; q < ROWS && row < rows; q++, row++) {
                        float offset = bias ? from_bf16(bias[row]) : 0.0f;
                        y[(from + n) * rows + row] = to_bf16(out[n * ROWS + q] + offset);
                    }
            }
    }
    free(in);
    return OK;
}

/* The dense matrix: out [rows, cols] bf16, contiguous. */
API int sb_lists_unpack(const uint8_t *steps, const uint32_t *masks, const uint8_t *index, const bf16 *values,
                        const int64_t *starts, int64_t rows, int64_t cols, bf16 *out, int threads) {
    Lists l = lists_of(steps, masks, index, values, starts, rows, cols);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++)
        for (int64_t slice = cut(l.slices, threads, part); slice < cut(l.slices, threads, part + 1); slice++) {
            const uint32_t *mask = masks + starts[2 * slice];
            int64_t entry = starts[2 * slice + 1], first = ROWS * slice;
            int64_t many = rows - first < ROWS ? rows - first : ROWS;
            memset(out + first * cols, 0, (size_t)(many * cols) * sizeof *out);
            for (int64_t chunk = 0; chunk < l.chunks; chunk++)
                for (int step = steps[slice * l.chunks + chunk]; step; step--)
                    for (uint32_t taken = *mask++; taken; taken &= taken - 1, entry++) {
                        int64_t row = first + __builtin_ctz(taken) / 2;
                        out[row * cols + CHUNK * chunk + index[entry]] = values[entry];
                    }
        }
    return OK;
}
