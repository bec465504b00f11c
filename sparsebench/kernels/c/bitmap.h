/* Weights as a bitmap and packed values, as bitmap.c describes them. */
#ifndef SPARSEBENCH_BITMAP_H
#define SPARSEBENCH_BITMAP_H

#include "common.h"

typedef struct {
    const uint64_t *mask;
    const char *values;
    const int64_t *ptr;
    int64_t per_group;
    int format;
    int64_t rows, cols, blocks, groups;
} Weights;

INLINE const char *group_values(const Weights *w, int64_t group) {
    int64_t start = w->ptr ? w->ptr[group] : group * w->per_group;
    return w->values + start * (int64_t)size_of(w->format);
}

/* A copy of x [batch, cols] in the format `inner` (BF16 only where x is), rows padded with zeros to `padded`. */
static inline void *padded_copy(const void *x, int format, int inner, int64_t batch, int64_t cols, int64_t padded) {
    size_t size = size_of(inner);
    char *copy = scratch((size_t)(batch * padded) * size);
    if (!copy) return NULL;
    for (int64_t row = 0; row < batch; row++) {
        char *to = copy + (size_t)(row * padded) * size;
        if (inner == format)
            memcpy(to, (const char *)x + (size_t)(row * cols) * size, (size_t)cols * size);
        else
            for (int64_t i = 0; i < cols; i++) ((float *)to)[i] = from_bf16(((const bf16 *)x)[row * cols + i]);
        memset(to + (size_t)cols * size, 0, (size_t)(padded - cols) * size);
    }
    return copy;
}

/* y [batch, rows] for batches that registers cannot hold at once (batch.c). */
int sb_batch_gemm(const Weights *w, const void *x, int64_t batch, const void *bias, void *y, int threads);

#endif
