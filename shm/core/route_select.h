/* Top-k selection: by (score descending, id ascending), NaN last. */
#ifndef HOTSET_ROUTE_SELECT_H
#define HOTSET_ROUTE_SELECT_H

#include "float_bits.h"
#include "route.h"

/* An integer that orders like the float: NaN below everything, -0 equal to +0. */
static inline uint32_t ordered_bits(float value) {
    if (value != value) return 0;
    uint32_t bits = bits_from_float(value + 0.0f); /* -0 + 0 is +0 */
    return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* Experts by rank: larger is better, ties go to the lowest id. */
static inline uint64_t rank_key(float score, uint32_t id) {
    return (uint64_t)ordered_bits(score) << 32 | (UINT32_MAX - id);
}
static inline uint32_t rank_id(uint64_t key) { return UINT32_MAX - (uint32_t)key; }

static inline int contains(const int32_t *ids, uint32_t count, int32_t id) {
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] == id) return 1;
    return 0;
}

/* The `k` best of `count` scores, at least as many, into `ids`, best first. Keys are unique, so ties need no case of
 * their own. */
static inline void select_top_k(const float *scores, uint32_t count, uint32_t k, int32_t *ids) {
    uint64_t best[ROUTE_MAX_TOP_K];
    uint32_t held = 0;
    for (uint32_t id = 0; id < count; id++) {
        uint64_t key = rank_key(scores[id], id);
        if (held == k && key < best[k - 1]) continue;
        uint32_t at = held < k ? held++ : k - 1;
        for (; at > 0 && best[at - 1] < key; at--) best[at] = best[at - 1];
        best[at] = key;
    }
    for (uint32_t i = 0; i < held; i++) ids[i] = (int32_t)rank_id(best[i]);
}

/* The same of the scores whose bit in `mask` is `bit`; returns how many there are, at most `k`. */
static inline uint32_t select_of_kind(const float *scores, uint32_t count, uint32_t k, const uint64_t *mask, int bit,
                                      int32_t *ids) {
    float of_kind[ROUTE_MAX_EXPERTS];
    int32_t as_listed[ROUTE_MAX_EXPERTS];
    uint32_t found = 0;
    for (uint32_t id = 0; id < count; id++) {
        as_listed[found] = (int32_t)id;
        of_kind[found] = scores[id];
        found += bit_test(mask, id) == bit;
    }
    k = found < k ? found : k;
    select_top_k(of_kind, found, k, ids);
    for (uint32_t i = 0; i < k; i++) ids[i] = as_listed[ids[i]];
    return k;
}

#endif
