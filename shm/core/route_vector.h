/* The steps of one row on blocks of eight floats; included after the lanes of an instruction set. The same operations
 * in the same order as route_plain.h, so the results are the same bits. Logits are finite; arrays that a block may
 * overrun are padded with -inf. */
#ifndef HOTSET_ROUTE_VECTOR_H
#define HOTSET_ROUTE_VECTOR_H

#include "route_network.h"
#include "route_plain.h"

/* max and min of the logits; 0 if one of them is not finite, and then nothing is known. Does not overrun. */
static inline int vector_statistics(const float *logits, uint32_t count, struct row_statistics *s) {
    block max = block_all(-INFINITY), min = block_all(INFINITY), odd = block_all(0);
    uint32_t e = 0;
    for (; e + 8 <= count; e += 8) {
        block z = block_load(logits + e);
        max = block_max(z, max);
        min = block_min(z, min);
        odd = block_or(odd, block_sub(z, z)); /* +0 if finite, else NaN */
    }
    *s = (struct row_statistics){block_fold_max(max), block_fold_min(min), count, 0, 0};
    for (; e < count; e++) {
        if (!isfinite(logits[e])) return 0;
        s->max = logits[e] > s->max ? logits[e] : s->max;
        s->min = logits[e] < s->min ? logits[e] : s->min;
    }
    return block_is_zero(odd);
}

#define EXP_BLOCKS 4u /* taken side by side: one alone waits for its own results most of the time */

/* softmax_exp() on each lane. */
static inline block block_exp(block x) {
    block t = block_max(block_mul(x, block_all(SOFTMAX_LOG2E)), block_all(SOFTMAX_LOWEST));
    block rounded = block_add(t, block_all(SOFTMAX_ROUNDER));
    block r = block_sub(t, block_sub(rounded, block_all(SOFTMAX_ROUNDER)));
    block square = block_mul(r, r);
    block c54 = block_add(block_mul(block_all(SOFTMAX_C5), r), block_all(SOFTMAX_C4));
    block c32 = block_add(block_mul(block_all(SOFTMAX_C3), r), block_all(SOFTMAX_C2));
    block c10 = block_add(block_mul(block_all(SOFTMAX_C1), r), block_all(1.0f));
    block p = block_add(block_mul(block_add(block_mul(c54, square), c32), square), c10);
    return block_scale(p, rounded);
}

/* e^(logit - top) of EXP_BLOCKS blocks of logits from `first` on into `share`; added to `sum`. */
static inline block vector_exps(const float *logits, uint32_t first, block top, float *share, block sum) {
    block x[EXP_BLOCKS];
    for (uint32_t i = 0; i < EXP_BLOCKS; i++) x[i] = block_sub(block_load(logits + first + i * 8), top);
    for (uint32_t i = 0; i < EXP_BLOCKS; i++) x[i] = block_exp(x[i]);
    for (uint32_t i = 0; i < EXP_BLOCKS; i++) {
        block_store(share + first + i * 8, x[i]);
        sum = block_add(sum, x[i]);
    }
    return sum;
}

/* Padding adds 2^-126 each, which does not reach the sum: that is at least 1. */
static inline float vector_shares(const float *logits, uint32_t count, float max, float *share) {
    block sum = block_all(0), top = block_all(max);
    if (count <= 8) {
        sum = block_exp(block_sub(block_load(logits), top));
        block_store(share, sum);
        return 1.0f / block_fold_sum(sum);
    }
    for (uint32_t e = 0; e < count; e += EXP_BLOCKS * 8) sum = vector_exps(logits, e, top, share, sum);
    return 1.0f / block_fold_sum(sum);
}

/* The scores to select from: the logits, `amount` added where a lane of `lanes` is set. Adding +0 elsewhere turns -0 into
 * +0, so that they tie as they should. */
static inline void vector_adjust(const float *logits, const float *lanes, float amount, uint32_t count, float *adjusted) {
    block added = block_all(amount);
    for (uint32_t e = 0; e < count; e += 8)
        block_store(adjusted + e, block_add(block_load(logits + e), block_and(block_load(lanes + e), added)));
}

/* The eight largest of `count` scores, in any order. */
static inline block vector_largest(const float *scores, uint32_t count) {
    block best[NETWORK_ROWS], other[NETWORK_ROWS];
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) best[i] = block_load(scores + i * 8);
    block_sort(best);
    for (uint32_t first = NETWORK_SCORES; first < count; first += NETWORK_SCORES) {
        for (uint32_t i = 0; i < NETWORK_ROWS; i++) other[i] = block_load(scores + first + i * 8);
        block_sort(other);
        block_merge(best, other);
    }
    return block_largest(best);
}

/* softmax over eight logits, in place; -inf where there are fewer. The factor that makes the results sum to 1. */
static inline float vector_softmax(float *logits) {
    block z = block_load(logits), p = block_exp(block_sub(z, block_all(block_fold_max(z))));
    block_store(logits, p);
    return 1.0f / block_fold_sum(p);
}

/* A float of all ones where `mask` has a bit, of zeros elsewhere. */
static inline void vector_lanes(const uint64_t *mask, uint32_t count, float *lanes) {
    for (uint32_t e = 0; e < count; e += 8) block_store(lanes + e, block_from_bits((uint32_t)(mask[e / 64] >> (e % 64))));
}

/* How many logits reach `bound`, which is finite. */
static inline uint32_t vector_count_reaching(const float *logits, uint32_t count, float bound) {
    block least = block_all(bound);
    counts found = counts_none();
    for (uint32_t e = 0; e < count; e += 8) found = counts_add(found, block_at_least(block_load(logits + e), least));
    return counts_sum(found);
}

/* Which: sets bits up to the next multiple of 64. */
static inline void vector_reaching(const float *logits, uint32_t count, float bound, uint64_t *bits) {
    block least = block_all(bound);
    for (uint32_t e = 0; e < count; e += 8) {
        if (e % 64 == 0) bits[e / 64] = 0;
        bits[e / 64] |= (uint64_t)block_bits(block_at_least(block_load(logits + e), least)) << (e % 64);
    }
}

#endif
