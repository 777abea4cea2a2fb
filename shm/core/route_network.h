/* Top-8 selection by sorting networks: no branches, so nothing for fresh logits to mispredict.
 *
 * Eight vectors are eight rows of as many columns as the vector has lanes. Each column is sorted, descending from row
 * 0; two such arrays are merged keeping the best eight of each column; at last the columns are merged with each other.
 *
 * Two kinds of vectors go through the same networks. Blocks hold the scores alone: twice as fast, but the ids must be
 * found afterwards, and ties do not tell. Keys pack score and id in one double in [1, 2): the mantissa holds the
 * score's order-preserving integer (32 bits) above the inverted id (20 bits). Doubles of one exponent order like their
 * mantissas, so all keys differ and ties go to the lowest id by themselves. */
#ifndef HOTSET_ROUTE_NETWORK_H
#define HOTSET_ROUTE_NETWORK_H

#include "route.h"

#define NETWORK_ROWS 8u
#define NETWORK_KEYS (NETWORK_ROWS * KEY_LANES) /* scores that eight vectors of keys hold */
#define NETWORK_SCORES (NETWORK_ROWS * 8)       /* scores that eight blocks hold */

/* For one type of vectors:
 *   _sort     the 19 comparisons of an optimal network for eight
 *   _bitonic  sorts rows that first fall, then rise (or are a rotation of such)
 *   _merge    the best eight of two sorted columns: row i of one against row 7 - i of the other */
#define DEFINE_NETWORK(vector)                                                                                       \
    static inline void vector##_compare(vector *r, uint32_t i, uint32_t j) {                                          \
        vector larger = vector##_max(r[i], r[j]);                                                                     \
        r[j] = vector##_min(r[i], r[j]);                                                                              \
        r[i] = larger;                                                                                                \
    }                                                                                                                 \
    static inline void vector##_sort(vector *r) {                                                                     \
        static const uint8_t pairs[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1},   \
                                             {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4},   \
                                             {5, 6}};                                                                 \
        _Pragma("GCC unroll 19") for (int i = 0; i < 19; i++) vector##_compare(r, pairs[i][0], pairs[i][1]);          \
    }                                                                                                                 \
    static inline void vector##_bitonic(vector *r) {                                                                  \
        _Pragma("GCC unroll 3") for (uint32_t step = 4; step > 0; step /= 2)                                          \
            _Pragma("GCC unroll 8") for (uint32_t i = 0; i < NETWORK_ROWS; i++)                                       \
                if (!(i & step)) vector##_compare(r, i, i + step);                                                    \
    }                                                                                                                 \
    static inline void vector##_merge(vector *r, const vector *other) {                                               \
        _Pragma("GCC unroll 8") for (uint32_t i = 0; i < NETWORK_ROWS; i++)                                           \
            r[i] = vector##_max(r[i], other[NETWORK_ROWS - 1 - i]);                                                   \
        vector##_bitonic(r);                                                                                          \
    }                                                                                                                 \
    /* Merges columns that are `distance` lanes apart. */                                                             \
    static inline void vector##_fold(vector *r, uint32_t distance) {                                                  \
        vector other[NETWORK_ROWS];                                                                                   \
        _Pragma("GCC unroll 8") for (uint32_t i = 0; i < NETWORK_ROWS; i++)                                           \
            other[i] = vector##_exchange(r[i], distance);                                                             \
        vector##_merge(r, other);                                                                                     \
    }

DEFINE_NETWORK(block)
DEFINE_NETWORK(keys)

/* The eight largest of the columns of sorted blocks, in any order. */
static inline block block_largest(block *r) {
    block_fold(r, 4);
    block_fold(r, 2);
    /* The last two columns need no more order: the best of each pair, once from either side. */
    for (uint32_t i = 0; i < 4; i++) r[i] = block_max(r[i], block_exchange(r[NETWORK_ROWS - 1 - i], 1));
    return block_gather_pairs(r);
}

static inline void network_load_keys(const float *scores, uint32_t first, keys *r) {
    for (uint32_t b = 0; b < NETWORK_KEYS / 8; b++)
        block_keys(block_load(scores + first + b * 8), first + b * 8, r + b * (8 / KEY_LANES));
    keys_sort(r);
}

/* The eight best of `count` scores, finite or -inf, best first. Padded with -inf to a multiple of NETWORK_KEYS. */
static inline void network_select_keys(const float *scores, uint32_t count, int32_t *ids) {
    keys best[NETWORK_ROWS], other[NETWORK_ROWS];
    network_load_keys(scores, 0, best);
    for (uint32_t first = NETWORK_KEYS; first < count; first += NETWORK_KEYS) {
        network_load_keys(scores, first, other);
        keys_merge(best, other);
    }
    for (uint32_t distance = KEY_LANES / 2; distance > 0; distance /= 2) keys_fold(best, distance);
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) ids[i] = (int32_t)(~keys_first(best[i]) & 0xFFFFFu);
}

/* Given the eight largest of the scores: their ids, best first. 0 if there are equal scores among those that reach
 * the least of them. */
static inline int network_find_ids(const float *scores, uint32_t count, block largest, int32_t *ids) {
    block least = block_all(block_fold_min(largest));
    int32_t candidates[2 * NETWORK_ROWS];
    uint32_t found = 0, places = 0;
    for (uint32_t first = 0; first < count && found <= NETWORK_ROWS; first += 64) {
        uint64_t bits = 0;
        for (uint32_t b = 0; b < 8; b++)
            bits |= (uint64_t)block_bits(block_at_least(block_load(scores + first + b * 8), least)) << b * 8;
        uint32_t here = (uint32_t)__builtin_popcountll(bits);
        /* Always eight steps: how many bits a word has cannot be predicted. What is too much is overwritten. */
        for (uint32_t i = 0; i < NETWORK_ROWS; i++, bits &= bits - 1)
            candidates[found + i] = (int32_t)(first + (uint32_t)__builtin_ctzll(bits | UINT64_C(1) << 63));
        found += here;
    }
    if (found != NETWORK_ROWS) return 0;
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) {
        block score = block_all(scores[candidates[i]]);
        uint32_t place = (uint32_t)__builtin_popcount(block_bits(block_above(largest, score)));
        places |= UINT32_C(1) << place;
        ids[place] = candidates[i];
    }
    return places == (1 << NETWORK_ROWS) - 1;
}

/* Eight scores need no network: each one's rank is the number of those that beat it. */
static inline void rank_eight(const float *scores, uint32_t k, int32_t *ids) {
    block own = block_load(scores), rank = block_all(0);
    for (uint32_t other = 0; other < 8; other++) {
        block score = block_all(scores[other]), later = block_from_bits(0xFEu << other);
        block beaten = block_or(block_above(score, own), block_and(block_equal(score, own), later));
        rank = block_add(rank, block_and(beaten, block_all(1)));
    }
    for (uint32_t i = 0; i < k; i++)
        ids[i] = (int32_t)__builtin_ctz(block_bits(block_equal(rank, block_all((float)i))));
}

#endif
