/* What every kernel shares: number formats, the vector type, expansion of packed values, threads.

   One translation unit per instruction set: the build passes the flags of `avx512` (F, BW, VL, DQ, VBMI2, BF16),
   `avx512vbmi2` (the same without BF16), `avx2` (with FMA and F16C), `neon` (SB_NEON) or `portable` (none), and the
   macros below follow from them. Plain loops are written on `vf`, a vector of the compiler's own vector extension, so
   that they compile everywhere; intrinsics appear only where the extension cannot say it. All arithmetic accumulates
   in float32. No -ffast-math: NaN and infinity propagate. */
#ifndef SPARSEBENCH_COMMON_H
#define SPARSEBENCH_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VBMI2__)
#define SB_AVX512 1
#elif defined(__AVX2__)
#define SB_AVX2 1
#endif

#if defined(SB_AVX512) || defined(SB_AVX2)
#include <immintrin.h>
#elif defined(SB_NEON)
#include <arm_neon.h>
#endif

#if defined(SB_AVX512)
#define LANES 16
#elif defined(SB_AVX2)
#define LANES 8
#else
#define LANES 4
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline, unused))
#define PRAGMA(text) _Pragma(#text)
#define UNROLL(n) PRAGMA(GCC unroll n)

typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES))); /* two bf16 to a lane, the first in the low half */
typedef uint32_t vu_memory __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

enum { F32 = 0, BF16 = 1 }; /* number formats, as the Python side passes them */
enum { OK = 0, NO_MEMORY = 1 };

INLINE vf load_vf(const float *p) { return *(const vf_memory *)p; }
INLINE void store_vf(float *p, vf v) { *(vf_memory *)p = v; }
INLINE vf zero_vf(void) { return (vf){0}; }
INLINE vu load_pairs(const void *p) { return *(const vu_memory *)p; }

/* The first and the second bf16 of each lane as float32. */
INLINE vf first_of_pairs(vu pairs) { return (vf)(pairs << 16); }
INLINE vf second_of_pairs(vu pairs) { return (vf)(pairs & 0xffff0000u); }

/* Sums made of pairs lie as the firsts of 2 * LANES bf16, then the seconds: which bf16 number i belongs to. */
INLINE int64_t of_pairs(int64_t i) {
    return i / (2 * LANES) * (2 * LANES) + i % LANES * 2 + i % (2 * LANES) / LANES;
}

/* Lanes are added in halves: the same order on every call, so results never depend on the thread count. */
INLINE float sum_vf(vf v) {
#if defined(SB_AVX512)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float lane[LANES];
    memcpy(lane, &v, sizeof lane);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
#endif
}

INLINE float from_bf16(bf16 h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* Round to nearest even; a NaN stays one (adding to its mantissa could carry it to infinity). */
INLINE bf16 to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_fp16(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    float f;
    if (exponent == 0) {
        f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&f, &bits, 4);
    return f;
#endif
}

INLINE float get(const void *p, int64_t i, int format) {
    return format == BF16 ? from_bf16(((const bf16 *)p)[i]) : ((const float *)p)[i];
}

INLINE void put(void *p, int64_t i, int format, float value) {
    if (format == BF16)
        ((bf16 *)p)[i] = to_bf16(value);
    else
        ((float *)p)[i] = value;
}

INLINE size_t size_of(int format) { return format == BF16 ? 2 : 4; }

INLINE void *scratch(size_t bytes) { return aligned_alloc(64, (bytes + 127) / 64 * 64); }

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE int popcount(uint64_t m) { return __builtin_popcountll(m); }

/* The start of part `index` of `n` items cut into `parts` equal parts. */
INLINE int64_t cut(int64_t n, int64_t parts, int64_t index) { return n * index / parts; }

/* exp(x) for x <= 0: 2^n times a polynomial of degree 5 on [-ln2/2, ln2/2], relative error 2e-6; exp(-inf) = 0 and
   NaN stays NaN. */
INLINE float exp_negative(float x) {
    float clipped = x < -87.0f ? -87.0f : x; /* NaN passes: the comparison is false */
    float n = clipped * 1.44269504f, whole;
    whole = (n + 12582912.0f) - 12582912.0f; /* round to nearest by the float32 grid at 1.5 * 2^23 */
    float r = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666667f + r * 0.0083333333f))));
    int32_t bits = ((int32_t)(whole == whole ? whole : 0.0f) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

#if defined(SB_AVX512)
/* vpexpandw with a zeroing mask waits for the old value of its destination on the cores that have it (5 cycles
   against 1.5); the register is cleared just before, which compilers do not do by themselves. Values are loaded
   first because expansion from memory cannot be cleared this way on every core. Reads 64 bytes whatever the mask. */
INLINE __m512i expand_bf16(__mmask32 kept, const bf16 *values) {
    __m512i out;
    __asm__("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}%{z%}"
            : "=&v"(out)
            : "v"(_mm512_loadu_si512(values)), "Yk"(kept));
    return out;
}

INLINE __m512i compress_16(__mmask32 kept, __m512i from) {
    __m512i out;
    __asm__("vpxord %0, %0, %0\n\tvpcompressw %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(from), "Yk"(kept));
    return out;
}

INLINE __m512 expand_f32(__mmask16 kept, const float *values) {
    __m512 out;
    __asm__("vpxord %0, %0, %0\n\tvpexpandd %1, %0%{%2%}%{z%}"
            : "=&v"(out)
            : "v"(_mm512_loadu_ps(values)), "Yk"(kept));
    return out;
}

/* sum[i] + a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]. Without the instruction the halves of what several products share
   are taken apart once: compilers see that after inlining. */
INLINE __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    vf first = (vf)sum + first_of_pairs((vu)a) * first_of_pairs((vu)b);
    return (__m512)(first + second_of_pairs((vu)a) * second_of_pairs((vu)b));
#endif
}

/* exp_negative of 16 numbers, the power of two set by an instruction. */
INLINE __m512 exp_negative_16(__m512 x) {
    const __m512 least = _mm512_set1_ps(-87.0f);
    __mmask16 counts = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ); /* NaN too */
    __m512 clipped = _mm512_max_ps(least, x);                     /* the second where one is NaN */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clipped, _mm512_set1_ps(1.44269504f)), 8);
    vf r = (vf)clipped - (vf)n * 0.693359375f + (vf)n * 2.12194440e-4f;
    vf p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666667f + r * 0.0083333333f))));
    return _mm512_maskz_scalef_ps(counts, (__m512)p, n);
}

/* 16 bf16 as float32. */
INLINE __m512i widened(__m256i packed) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16); }

/* Two vectors of 32 bf16 are interleaved into pairs for the dot product (unpacklo, unpackhi); their sums stay in that
   order. Which of the 32 is float32 number `i` of the two result vectors: */
INLINE int interleaved(int i) { return i % 16 / 4 * 8 + i / 16 * 4 + i % 4; }
#endif

/* 64 columns of a bitmap row as float32: `out` gets the kept values in their places and zeros elsewhere.
   Reads up to 64 bytes behind the last kept value (the buffers are padded). */
#if defined(SB_AVX512)
INLINE void expand64_bf16(uint64_t kept, const bf16 *values, float *out) {
    for (int half = 0; half < 2; half++) {
        uint32_t mask = (uint32_t)(kept >> 32 * half);
        __m512i w = expand_bf16(mask, values);
        values += popcount(mask);
        __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(w));
        __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1));
        _mm512_storeu_si512(out + 32 * half, _mm512_slli_epi32(low, 16));
        _mm512_storeu_si512(out + 32 * half + 16, _mm512_slli_epi32(high, 16));
    }
}

INLINE void expand64_f32(uint64_t kept, const float *values, float *out) {
    for (int part = 0; part < 4; part++) {
        uint16_t mask = (uint16_t)(kept >> 16 * part);
        _mm512_storeu_ps(out + 16 * part, expand_f32(mask, values));
        values += popcount(mask);
    }
}
#elif defined(SB_AVX2) || defined(SB_NEON)
#define SB_SHUFFLES 1 /* one vector of columns at a time, by a table of byte shuffles */
#if defined(SB_AVX2)
extern uint8_t sb_shuffle_bf16[256][32]; /* bytes of 8 packed bf16 -> the high halves of 8 float32 lanes */
extern int32_t sb_permute_f32[256][8];   /* lane of 8 packed float32, or -1 where nothing was kept */

/* LANES columns; `kept` has so many bits. */
INLINE vf expand_lanes_bf16(uint32_t kept, const bf16 *values) {
    __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    __m256i order = _mm256_load_si256((const __m256i *)sb_shuffle_bf16[kept]);
    return (vf)_mm256_shuffle_epi8(packed, order);
}

INLINE vf expand_lanes_f32(uint32_t kept, const float *values) {
    __m256i order = _mm256_load_si256((const __m256i *)sb_permute_f32[kept]);
    __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), order);
    return (vf)_mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(order)); /* -1: its sign bit */
}

INLINE int few(uint32_t kept) { return __builtin_popcount(kept); }
#else
extern uint8_t sb_shuffle_bf16[16][16]; /* bytes of 4 packed bf16 -> the high halves of 4 float32 lanes, 255: zero */
extern uint8_t sb_shuffle_f32[16][16];
extern uint8_t sb_few[16]; /* set bits */

INLINE vf expand_lanes_bf16(uint32_t kept, const bf16 *values) {
    uint8x16_t packed = vcombine_u8(vld1_u8((const uint8_t *)values), vdup_n_u8(0));
    return (vf)vqtbl1q_u8(packed, vld1q_u8(sb_shuffle_bf16[kept]));
}

INLINE vf expand_lanes_f32(uint32_t kept, const float *values) {
    return (vf)vqtbl1q_u8(vld1q_u8((const uint8_t *)values), vld1q_u8(sb_shuffle_f32[kept]));
}

INLINE int few(uint32_t kept) { return sb_few[kept]; } /* counting bits goes through the vector unit */
#endif

#define PART(kept, part) ((uint32_t)((kept) >> LANES * (part)) & ((1u << LANES) - 1))

INLINE void expand64_bf16(uint64_t kept, const bf16 *values, float *out) {
    for (int part = 0; part < 64 / LANES; part++) {
        store_vf(out + LANES * part, expand_lanes_bf16(PART(kept, part), values));
        values += few(PART(kept, part));
    }
}

INLINE void expand64_f32(uint64_t kept, const float *values, float *out) {
    for (int part = 0; part < 64 / LANES; part++) {
        store_vf(out + LANES * part, expand_lanes_f32(PART(kept, part), values));
        values += few(PART(kept, part));
    }
}
#else
INLINE void expand64_bf16(uint64_t kept, const bf16 *values, float *out) {
    memset(out, 0, 64 * sizeof *out);
    for (; kept; kept &= kept - 1) out[__builtin_ctzll(kept)] = from_bf16(*values++);
}

INLINE void expand64_f32(uint64_t kept, const float *values, float *out) {
    memset(out, 0, 64 * sizeof *out);
    for (; kept; kept &= kept - 1) out[__builtin_ctzll(kept)] = *values++;
}
#endif

/* The same without conversion: 64 columns as bfloat16, bit for bit. */
INLINE void copy64_bf16(uint64_t kept, const bf16 *values, bf16 *out) {
#if defined(SB_AVX512)
    _mm512_storeu_si512(out, expand_bf16((uint32_t)kept, values));
    _mm512_storeu_si512(out + 32, expand_bf16((uint32_t)(kept >> 32), values + popcount((uint32_t)kept)));
#else
    memset(out, 0, 64 * sizeof *out);
    for (; kept; kept &= kept - 1) out[__builtin_ctzll(kept)] = *values++;
#endif
}

INLINE void expand64(uint64_t kept, const void *values, int format, float *out) {
    if (format == BF16)
        expand64_bf16(kept, (const bf16 *)values, out);
    else
        expand64_f32(kept, (const float *)values, out);
}

/* Inputs with not |x| <= threshold, ascending: their numbers and values; returns how many. Room for inputs + 16. */
INLINE int64_t choose(const void *x, int format, int64_t inputs, float threshold, int32_t *index, float *factor) {
    int64_t n = 0, i = 0;
    if (format == BF16) threshold = from_bf16(to_bf16(threshold)); /* compared in the inputs' format, as torch does */
#if defined(SB_AVX512)
    for (; i + 16 <= inputs; i += 16) {
        __m512 value = format == BF16 ? (__m512)widened(_mm256_loadu_si256((const __m256i *)((const bf16 *)x + i)))
                                      : _mm512_loadu_ps((const float *)x + i);
        __mmask16 counts = _mm512_cmp_ps_mask(_mm512_abs_ps(value), _mm512_set1_ps(threshold), _CMP_NLE_UQ);
        __m512i at = _mm512_add_epi32(_mm512_set1_epi32((int)i), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                                                                   11, 12, 13, 14, 15));
        _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(counts, at));
        _mm512_storeu_ps(factor + n, _mm512_maskz_compress_ps(counts, value));
        n += popcount(counts);
    }
#endif
    for (; i < inputs; i++) {
        float value = get(x, i, format);
        index[n] = (int32_t)i;
        factor[n] = value;
        n += !(fabsf(value) <= threshold);
    }
    return n;
}

#endif
