/* The steps of one row on blocks of eight floats; included after the lanes of an instruction set. The same operations
 * in the same order as route_plain.h, so the results are the same bits. Logits are finite; arrays that a block may
 * overrun are padded with -inf. */
#ifndef HOTSET_ROUTE_VECTOR_H
#define HOTSET_ROUTE_VECTOR_H

#include "route_network.h"
#include "route_plain.h"

static inline uint32_t round_up_8(uint32_t count) { return (count + 7) & ~7u; }

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

static inline block block_exp(block x) {
    block t = block_max(block_mul(x, block_all(SOFTMAX_LOG2E)), block_all(SOFTMAX_LOWEST));
    block rounded = block_add(t, block_all(SOFTMAX_ROUNDER));
    block r = block_sub(t, block_sub(rounded, block_all(SOFTMAX_ROUNDER)));
    block p = block_add(block_mul(block_all(SOFTMAX_C5), r), block_all(SOFTMAX_C4));
    p = block_add(block_mul(p, r), block_all(SOFTMAX_C3));
    p = block_add(block_mul(p, r), block_all(SOFTMAX_C2));
    p = block_add(block_mul(p, r), block_all(SOFTMAX_C1));
    p = block_add(block_mul(p, r), block_all(1.0f));
    return block_scale(p, rounded);
}

/* The padding's 2^-126 each does not reach the sum, which is at least 1. */
static inline float vector_shares(const float *logits, uint32_t count, float max, float *share) {
    block sum = block_all(0), top = block_all(max);
    for (uint32_t e = 0; e < count; e += 8) {
        block p = block_exp(block_sub(block_load(logits + e), top));
        block_store(share + e, p);
        sum = block_add(sum, p);
    }
    return 1.0f / block_fold_sum(sum);
}

static inline block mask_block(const uint64_t *mask, uint32_t e) {
    return block_from_bits((uint32_t)(mask[e / 64] >> (e % 64)));
}

static inline void vector_adjust(const float *logits, uint32_t count, const uint64_t *mask, float bonus, float *adjusted) {
    block amount = block_all(bonus);
    for (uint32_t e = 0; e < count; e += 8)
        block_store(adjusted + e, block_add(block_load(logits + e), block_and(mask_block(mask, e), amount)));
}

/* + 0: as everywhere before a selection, it turns -0 into +0. */
static inline void vector_copy(const float *logits, uint32_t count, float *adjusted) {
    for (uint32_t e = 0; e < count; e += 8) block_store(adjusted + e, block_add(block_load(logits + e), block_all(0)));
}

static inline void vector_restrict(const float *logits, uint32_t count, const uint64_t *mask, float *adjusted) {
    for (uint32_t e = 0; e < count; e += 8) {
        block z = block_add(block_load(logits + e), block_all(0));
        block_store(adjusted + e, block_choose(mask_block(mask, e), z, block_all(-INFINITY)));
    }
}

/* The padding is below every finite bound. */
static inline uint32_t vector_count_at_least(const float *logits, uint32_t count, float bound) {
    uint32_t found = 0;
    block least = block_all(bound);
    for (uint32_t e = 0; e < count; e += 8)
        found += (uint32_t)__builtin_popcount(block_bits(block_at_least(block_load(logits + e), least)));
    return found;
}

#endif
