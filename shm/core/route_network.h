/* Top-8 selection by sorting networks: no branches, so nothing for fresh logits to mispredict.
 *
 * A key packs score and id in one double in [1, 2): the mantissa holds the score's order-preserving integer (32 bits)
 * above the inverted id (20 bits). Doubles of one exponent order like their mantissas, so minimum and maximum are one
 * instruction everywhere, all keys differ, and ties go to the lowest id by themselves.
 *
 * Eight vectors of keys are eight rows of KEY_LANES columns. Each column is sorted, descending from row 0; two such
 * arrays are merged keeping the best eight of each column; at last the columns are merged with each other. */
#ifndef HOTSET_ROUTE_NETWORK_H
#define HOTSET_ROUTE_NETWORK_H

#include "route.h"

#define NETWORK_ROWS 8u
#define NETWORK_SCORES (NETWORK_ROWS * KEY_LANES) /* the number of scores is padded to a multiple of it */

/* Afterwards a holds the larger key of each column. */
#define COMPARE(a, b)                      \
    do {                                   \
        keys larger = keys_max(a, b);      \
        b = keys_min(a, b);                \
        a = larger;                        \
    } while (0)

/* The 19 comparisons of an optimal network for eight. */
static inline void network_sort(keys *r) {
    COMPARE(r[0], r[2]); COMPARE(r[1], r[3]); COMPARE(r[4], r[6]); COMPARE(r[5], r[7]);
    COMPARE(r[0], r[4]); COMPARE(r[1], r[5]); COMPARE(r[2], r[6]); COMPARE(r[3], r[7]);
    COMPARE(r[0], r[1]); COMPARE(r[2], r[3]); COMPARE(r[4], r[5]); COMPARE(r[6], r[7]);
    COMPARE(r[2], r[4]); COMPARE(r[3], r[5]);
    COMPARE(r[1], r[4]); COMPARE(r[3], r[6]);
    COMPARE(r[1], r[2]); COMPARE(r[3], r[4]); COMPARE(r[5], r[6]);
}

/* A sequence that first falls, then rises (or is a rotation of one) comes out sorted. */
static inline void network_sort_bitonic(keys *r) {
    COMPARE(r[0], r[4]); COMPARE(r[1], r[5]); COMPARE(r[2], r[6]); COMPARE(r[3], r[7]);
    COMPARE(r[0], r[2]); COMPARE(r[1], r[3]); COMPARE(r[4], r[6]); COMPARE(r[5], r[7]);
    COMPARE(r[0], r[1]); COMPARE(r[2], r[3]); COMPARE(r[4], r[5]); COMPARE(r[6], r[7]);
}

/* The best eight of two sorted columns: row i of one against row 7 - i of the other. */
static inline void network_merge(keys *r, const keys *other) {
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) r[i] = keys_max(r[i], other[NETWORK_ROWS - 1 - i]);
    network_sort_bitonic(r);
}

static inline void network_load(const float *scores, uint32_t first, keys *r) {
    const uint32_t vectors = 8 / KEY_LANES; /* per block */
    for (uint32_t b = 0; b < NETWORK_SCORES / 8; b++)
        block_keys(block_load(scores + first + b * 8), first + b * 8, r + b * vectors);
}

/* The `k` <= 8 best of `count` finite or -inf scores, best first. `scores` is padded with -inf to NETWORK_SCORES. */
static inline void network_select(const float *scores, uint32_t count, uint32_t k, int32_t *ids) {
    keys best[NETWORK_ROWS], other[NETWORK_ROWS];
    network_load(scores, 0, best);
    network_sort(best);
    for (uint32_t first = NETWORK_SCORES; first < count; first += NETWORK_SCORES) {
        network_load(scores, first, other);
        network_sort(other);
        network_merge(best, other);
    }
    for (uint32_t distance = KEY_LANES / 2; distance > 0; distance /= 2) {
        for (uint32_t i = 0; i < NETWORK_ROWS; i++) other[i] = keys_exchange(best[i], distance);
        network_merge(best, other);
    }
    for (uint32_t i = 0; i < k; i++) ids[i] = (int32_t)(0xFFFFFu - (uint32_t)(keys_first(best[i]) & 0xFFFFFu));
}

#endif
