/* xxh3-64 (seed 0, default secret) of bytes that arrive bit by bit but stay where they are: the state is eight numbers,
 * nothing is buffered.
 *
 * The Python library does 21 GB/s of what lies in the second-level cache, from which this has to be a small share of
 * what copying takes: its build knows SSE2 only. */
#ifndef HOTSET_XXH3_H
#define HOTSET_XXH3_H

#include <stddef.h>
#include <stdint.h>

#define XXH3_BLOCK 1024 /* bytes between two scrambles */

struct xxh3 {
    uint64_t sums[8];
};

struct xxh3_kernel {
    const char *name;
    int (*supported)(void);
    void (*blocks)(uint64_t *sums, const uint8_t *data, size_t count);
};

extern const struct xxh3_kernel xxh3_kernels[]; /* the widest last */
extern const size_t xxh3_kernel_count;
const struct xxh3_kernel *xxh3_best(void);

void xxh3_begin(struct xxh3 *state);

/* How many whole blocks of an input, which is not empty, are hashed one by one; `xxh3_end` takes the rest. */
static inline size_t xxh3_whole_blocks(size_t nbytes) { return (nbytes - 1) / XXH3_BLOCK; }

/* The checksum, once all whole blocks of `data` [nbytes] went through `blocks`. */
uint64_t xxh3_end(const struct xxh3 *state, const uint8_t *data, size_t nbytes);

#endif
