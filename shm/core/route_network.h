/* Top-8 selection by sorting networks: no branches, so nothing for fresh logits to mispredict.
 *
 * Eight vectors are eight rows of as many columns as the vector has lanes. Each column is sorted, descending from row
 * 0; two such arrays are merged keeping the best eight of each column; at last the columns are merged with each other
 * where they belong to one row of logits. */
#ifndef HOTSET_ROUTE_NETWORK_H
#define HOTSET_ROUTE_NETWORK_H

#include "route_softmax.h"

#include <float.h>

/* Eight blocks reduced to one; in the order of canonical_sum(). */
#define BLOCK_TREE(op, b)                                                                                            \
    op(op(op((b)[0], (b)[4]), op((b)[2], (b)[6])), op(op((b)[1], (b)[5]), op((b)[3], (b)[7])))

#define NETWORK_ROWS 8u
#define NETWORK_KEYS (NETWORK_ROWS * KEY_LANES) /* scores that eight vectors of keys hold */

/* The 19 comparisons of an optimal network for eight. */
static const uint8_t NETWORK_PAIRS[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6},
                                             {3, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5},
                                             {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};

/* VECTOR_sort() and VECTOR_merge() from VECTOR_max() and VECTOR_min().
 *
 * Merging takes the best eight of two sorted columns: row i of one against row 7 - i of the other leaves rows that first
 * fall, then rise (or are a rotation of such), which three rounds of comparisons sort. */
#define NETWORK(VECTOR)                                                                                              \
    static inline void VECTOR##_compare(VECTOR *r, uint32_t i, uint32_t j) {                                         \
        VECTOR larger = VECTOR##_max(r[i], r[j]);                                                                    \
        r[j] = VECTOR##_min(r[i], r[j]);                                                                             \
        r[i] = larger;                                                                                               \
    }                                                                                                                \
    static inline void VECTOR##_sort(VECTOR *r) {                                                                    \
        _Pragma("GCC unroll 19") for (int i = 0; i < 19; i++)                                                        \
            VECTOR##_compare(r, NETWORK_PAIRS[i][0], NETWORK_PAIRS[i][1]);                                           \
    }                                                                                                                \
    static inline void VECTOR##_sort_four(VECTOR *r) {                                                               \
        VECTOR##_compare(r, 0, 2), VECTOR##_compare(r, 1, 3);                                                        \
        VECTOR##_compare(r, 0, 1), VECTOR##_compare(r, 2, 3), VECTOR##_compare(r, 1, 2);                             \
    }                                                                                                                \
    static inline void VECTOR##_merge(VECTOR *r, const VECTOR *other) {                                              \
        _Pragma("GCC unroll 8") for (uint32_t i = 0; i < NETWORK_ROWS; i++)                                          \
            r[i] = VECTOR##_max(r[i], other[NETWORK_ROWS - 1 - i]);                                                  \
        _Pragma("GCC unroll 3") for (uint32_t step = 4; step > 0; step /= 2)                                         \
            _Pragma("GCC unroll 8") for (uint32_t i = 0; i < NETWORK_ROWS; i++)                                      \
                if (!(i & step)) VECTOR##_compare(r, i, i + step);                                                   \
    }

NETWORK(keys)  /* single rows */
NETWORK(block) /* columns: see route_ranking.h */

/* VECTOR_fold() merges columns that are `distance` lanes apart. */
#define NETWORK_FOLD(VECTOR)                                                                                         \
    static inline void VECTOR##_fold(VECTOR *r, uint32_t distance) {                                                 \
        VECTOR other[NETWORK_ROWS];                                                                                  \
        _Pragma("GCC unroll 8") for (uint32_t i = 0; i < NETWORK_ROWS; i++)                                          \
            other[i] = VECTOR##_exchange(r[i], distance);                                                            \
        VECTOR##_merge(r, other);                                                                                    \
    }

NETWORK_FOLD(keys)
NETWORK_FOLD(block)

static inline void network_load_keys(const float *scores, uint32_t first, keys *r) {
    for (uint32_t i = 0; i < NETWORK_KEYS; i += BLOCK_LANES)
        block_keys(block_load(scores + first + i), first + i, r + i / KEY_LANES);
    keys_sort(r);
}

/* The `k` <= 8 best of `count` scores, none NaN, best first. Padded with -inf to a multiple of NETWORK_KEYS. */
static inline void network_select(const float *scores, uint32_t count, uint32_t k, int32_t *ids) {
    keys best[NETWORK_ROWS], other[NETWORK_ROWS];
    network_load_keys(scores, 0, best);
    for (uint32_t first = NETWORK_KEYS; first < count; first += NETWORK_KEYS) {
        network_load_keys(scores, first, other);
        keys_merge(best, other);
    }
    for (uint32_t distance = KEY_LANES / 2; distance > 0; distance /= 2) keys_fold(best, distance);
    for (uint32_t i = 0; i < k; i++) ids[i] = (int32_t)key_id(keys_first(best[i]));
}

/* Whether `ids` are certainly the `k` best, best first: nothing ties with one of them. */
static inline int network_sure(const float *scores, uint32_t count, uint32_t k, const int32_t *ids) {
    uint32_t reaching = 0;
    for (uint32_t i = 1; i < k; i++)
        if (!(scores[ids[i - 1]] > scores[ids[i]])) return 0;
    block last = block_all(scores[ids[k - 1]]);
    for (uint32_t e = 0; e < count; e += BLOCK_LANES)
        reaching += (uint32_t)__builtin_popcount(mask_bits(block_at_least(block_load(scores + e), last)));
    return reaching == k;
}

/* Keys of floats (see route_ranking.h) of the scores from `first` on, sorted. Beyond `count` there are none. */
static inline void network_load_blocks(const float *scores, uint32_t first, uint32_t count, uint32_t id_mask, block *r) {
    block kept = block_all(float_from_bits(~id_mask)), least = block_all(-FLT_MAX), most = block_all(FLT_MAX);
    block tags = block_or(block_count(), block_all(float_from_bits(first)));
#pragma GCC unroll 8
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) {
        uint32_t at = first + i * BLOCK_LANES;
        block score = at < count ? block_load(scores + at) : least;
        r[i] = block_tagged(block_min(block_max(score, least), most), tags, kept);
        tags = block_count_on(tags);
    }
    block_sort(r);
}

/* The same as network_select() with keys of floats, of which there are half as many vectors. 0 if they do not tell all of
 * the best apart. Padded as there. */
static inline int network_select_roughly(const float *scores, uint32_t count, uint32_t k, int32_t *ids) {
    block best[NETWORK_ROWS], other[NETWORK_ROWS];
    uint32_t id_mask = ROUTE_MAX_EXPERTS - 1;
    while (id_mask / 2 >= count - 1) id_mask /= 2;
    network_load_blocks(scores, 0, count, id_mask, best);
    for (uint32_t first = NETWORK_ROWS * BLOCK_LANES; first < count; first += NETWORK_ROWS * BLOCK_LANES) {
        network_load_blocks(scores, first, count, id_mask, other);
        block_merge(best, other);
    }
    for (uint32_t distance = BLOCK_LANES / 2; distance > 0; distance /= 2) block_fold(best, distance);
    for (uint32_t i = 0; i < k; i++) ids[i] = (int32_t)(block_first(best[i]) & id_mask);
    return network_sure(scores, count, k, ids);
}

/* Eight scores need no network: each one's rank is the number of those that beat it. Padded with -inf to a block. */
static inline void rank_eight(const float *scores, uint32_t k, int32_t *ids) {
    block own = block_load(scores), beaten[8];
#pragma GCC unroll 8
    for (uint32_t other = 0; other < 8; other++) {
        block score = block_all(scores[other]);
        lane_mask later = mask_from_bits(0xFEu << other);
        lane_mask wins = mask_or(block_above(score, own), mask_and(block_equal(score, own), later));
        beaten[other] = block_where(wins, block_all(1));
    }
    block rank = BLOCK_TREE(block_add, beaten);
    for (uint32_t i = 0; i < k; i++)
        ids[i] = (int32_t)__builtin_ctz(mask_bits(block_equal(rank, block_all((float)i))));
}

#endif
