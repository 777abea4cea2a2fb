/* What tiles of route_eight.h chose, added up while it is in registers. Only with AVX-512, whose masks say it in a few
 * instructions; elsewhere nothing is counted here, and tally_selections() does it all. */
#ifndef HOTSET_ROUTE_EIGHT_SUMS_H
#define HOTSET_ROUTE_EIGHT_SUMS_H

#include "route_row.h"

struct eight_sums {
#if ROUTE_AVX512
    const uint64_t *by_age; /* as in route_boosts */
    __m512i of[8];          /* by expert, in the units of the tally; each lane its own rows */
#endif
    uint32_t rows;    /* of the call */
    uint32_t counted; /* how many of them, from the first one on without a gap */
    int wanted;
};

static inline void eight_sums_begin(struct eight_sums *sums, const struct route_boosts *boosts, uint32_t rows) {
    sums->rows = rows;
    sums->counted = 0;
    sums->wanted = ROUTE_AVX512 && boosts->keep == UINT64_MAX;
#if ROUTE_AVX512
    sums->by_age = boosts->by_age;
    for (uint32_t e = 0; e < 8; e++) sums->of[e] = _mm512_setzero_si512();
#endif
}

/* A whole tile of rows: the two experts `chosen` in each. `left`: rows of the call from its first one on. */
static inline void eight_sums_add(struct eight_sums *sums, const block *chosen, uint32_t left) {
#if ROUTE_AVX512
    const __m512i backwards = _mm512_setr_epi64(7, 6, 5, 4, 3, 2, 1, 0), one = _mm512_set1_epi64(1);
    __m512i worth[2] = {one, one}, first = _mm512_castps_si512(chosen[0]), second = _mm512_castps_si512(chosen[1]);
    if (!sums->wanted || sums->counted != sums->rows - left) return;
    sums->counted += BLOCK_LANES;
    for (uint32_t half = 0; half < 2 && sums->by_age; half++) { /* row after row one less follows */
        __m512i by_age = _mm512_loadu_si512(sums->by_age + left - 8 * (half + 1));
        worth[half] = _mm512_or_si512(_mm512_slli_epi64(_mm512_permutexvar_epi64(backwards, by_age), ROUTE_COUNT_BITS), one);
    }
#pragma GCC unroll 8
    for (uint32_t e = 0; e < 8; e++) {
        __m512i id = _mm512_set1_epi32((int32_t)e);
        uint32_t rows = mask_bits(mask_or(_mm512_cmpeq_epi32_mask(first, id), _mm512_cmpeq_epi32_mask(second, id)));
        sums->of[e] = _mm512_mask_add_epi64(sums->of[e], (__mmask8)rows, sums->of[e], worth[0]);
        sums->of[e] = _mm512_mask_add_epi64(sums->of[e], (__mmask8)(rows >> 8), sums->of[e], worth[1]);
    }
#else
    (void)sums, (void)chosen, (void)left;
#endif
}

/* Hands the sums to the tally; of how many rows, from the first one on. */
static inline uint32_t eight_sums_finish(const struct eight_sums *sums, struct route_tally *tally) {
#if ROUTE_AVX512
    for (uint32_t e = 0; e < 8 && sums->counted; e++)
        tally->selections[e] += (uint64_t)_mm512_reduce_add_epi64(sums->of[e]);
#else
    (void)tally;
#endif
    return sums->counted;
}

#endif
