/* Calls one kernel for test_arm.py: standard input names it and holds its arguments, written arrays come back on
   standard output. All arguments but the one float are passed as 64-bit words, which the 64-bit ARM calling convention
   on Linux allows: smaller integers are read from a word's low half, floats have registers of their own. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 20

typedef int64_t Word;
typedef int (*Kernel)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word,
                      Word, Word, Word, Word, float);

extern int sb_bitmap_gemm(), sb_bitmap_unpack(), sb_columns_gemv(), sb_strips_gemv(), sb_strips_unpack(),
    sb_lists_gemm(), sb_lists_unpack(), sb_groups_gemm(), sb_blocks_attention(), sb_kv_attention(), sb_rows_gemv();

#define KNOWN(name) {#name, (Kernel)name}
static const struct {
    const char *name;
    Kernel call;
} known[] = {KNOWN(sb_bitmap_gemm),   KNOWN(sb_bitmap_unpack), KNOWN(sb_columns_gemv),
             KNOWN(sb_strips_gemv),   KNOWN(sb_strips_unpack), KNOWN(sb_groups_gemm),
             KNOWN(sb_lists_gemm),    KNOWN(sb_lists_unpack),
             KNOWN(sb_blocks_attention), KNOWN(sb_kv_attention), KNOWN(sb_rows_gemv)};

static void take(void *to, size_t size) {
    if (fread(to, 1, size, stdin) != size) exit(3);
}

int main(void) {
    char name[32];
    float number;
    struct {
        Word kind, value; /* 0: a word; 1: an array of so many bytes; 2: an array to give back */
    } head;
    Word count, a[MOST] = {0}, size[MOST] = {0};
    take(name, sizeof name);
    take(&number, sizeof number);
    take(&count, sizeof count);
    for (Word i = 0; i < count; i++) {
        take(&head, sizeof head);
        a[i] = head.value;
        if (!head.kind) continue;
        char *memory = aligned_alloc(64, (size_t)(head.value + 127) / 64 * 64);
        take(memory, (size_t)head.value);
        a[i] = (Word)memory;
        size[i] = head.kind == 2 ? head.value : 0;
    }
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        if (strcmp(name, known[k].name)) continue;
        int status = known[k].call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                   a[13], a[14], a[15], a[16], a[17], a[18], a[19], number);
        for (Word i = 0; i < count; i++) fwrite((void *)a[i], 1, (size_t)size[i], stdout);
        return status;
    }
    return 2;
}
