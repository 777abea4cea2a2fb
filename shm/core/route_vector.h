/* The steps of one row on blocks of floats; included after the lanes of an instruction set. The same operations
 * in the same order as route_plain.h, so the results are the same bits. Logits are finite; arrays that a block may
 * overrun are padded with -inf. */
#ifndef HOTSET_ROUTE_VECTOR_H
#define HOTSET_ROUTE_VECTOR_H

#include "route_network.h"
#include "route_plain.h"

/* max and min of the logits; 0 if one of them is not finite, and then nothing is known. Does not overrun. */
static inline int vector_statistics(const float *logits, uint32_t count, struct row_statistics *s) {
    block max = block_all(-INFINITY), min = block_all(INFINITY), odd = block_all(0);
    for (uint32_t e = 0; e < count; e += BLOCK_LANES) {
        uint32_t left = count - e;
        block z = left >= BLOCK_LANES ? block_load(logits + e) : block_load_padded(logits + e, left, logits[e]);
        max = block_max(z, max);
        min = block_min(z, min);
        odd = block_or(odd, block_sub(z, z)); /* +0 if finite, else NaN */
    }
    *s = (struct row_statistics){block_fold_max(max), block_fold_min(min), count, 0, 0};
    return block_is_zero(odd);
}

/* The largest logit; 0 if one of them is not finite, and then nothing is known. Does not overrun. */
static inline int vector_max(const float *logits, uint32_t count, float *max) {
    block most = block_all(-INFINITY), odd = block_all(0);
    uint32_t e = 0;
    for (; e + 4 * BLOCK_LANES <= count; e += 4 * BLOCK_LANES) { /* four at once, for each waits for the one before it */
        block z[4];
        for (uint32_t i = 0; i < 4; i++) z[i] = block_load(logits + e + i * BLOCK_LANES);
        most = block_max(block_max(block_max(z[0], z[1]), block_max(z[2], z[3])), most);
        for (uint32_t i = 0; i < 4; i++) z[i] = block_sub(z[i], z[i]); /* +0 if finite, else NaN */
        odd = block_or(block_or(block_or(z[0], z[1]), block_or(z[2], z[3])), odd);
    }
    for (; e < count; e += BLOCK_LANES) {
        uint32_t left = count - e;
        block z = left >= BLOCK_LANES ? block_load(logits + e) : block_load_padded(logits + e, left, logits[e]);
        most = block_max(z, most);
        odd = block_or(odd, block_sub(z, z));
    }
    *max = block_fold_max(most);
    return block_is_zero(odd);
}

/* Copies `count` logits and pads them with -inf to `padded` floats. */
static inline void vector_pad(const float *logits, uint32_t count, float *to, uint32_t padded) {
    for (uint32_t e = 0; e < padded; e += BLOCK_LANES)
        block_store(to + e, e + BLOCK_LANES <= count ? block_load(logits + e)
                            : e < count              ? block_load_padded(logits + e, count - e, -INFINITY)
                                                     : block_all(-INFINITY));
}

#define SUM_BLOCKS (SUM_LANES / BLOCK_LANES)
#define EXP_BLOCKS 4u /* taken side by side: one alone waits for its own results most of the time */

/* softmax_exp() on each lane. */
static inline block block_exp(block x) {
    block t = block_max(block_mul(x, block_all(SOFTMAX_LOG2E)), block_all(SOFTMAX_LOWEST));
    block whole, r = block_fraction(t, &whole);
    block square = block_mul(r, r);
    block c54 = block_add(block_mul(block_all(SOFTMAX_C5), r), block_all(SOFTMAX_C4));
    block c32 = block_add(block_mul(block_all(SOFTMAX_C3), r), block_all(SOFTMAX_C2));
    block c10 = block_add(block_mul(block_all(SOFTMAX_C1), r), block_all(1.0f));
    block p = block_add(block_mul(block_add(block_mul(c54, square), c32), square), c10);
    return block_scale(p, whole);
}

/* e^(logit - top) of EXP_BLOCKS blocks of logits from `first` on: added to `sums`, and into `share` unless it is NULL. */
static inline void vector_exps(const float *logits, uint32_t first, block top, float *share, block *sums) {
    block x[EXP_BLOCKS];
    for (uint32_t i = 0; i < EXP_BLOCKS; i++) x[i] = block_sub(block_load(logits + first + i * BLOCK_LANES), top);
    for (uint32_t i = 0; i < EXP_BLOCKS; i++) x[i] = block_exp(x[i]);
    for (uint32_t i = 0; i < EXP_BLOCKS; i++) {
        if (share) block_store(share + first + i * BLOCK_LANES, x[i]);
        sums[i % SUM_BLOCKS] = block_add(sums[i % SUM_BLOCKS], x[i]);
    }
}

/* The factor that makes shares probabilities, and the shares themselves unless `share` is NULL. Padding adds 2^-126 each,
 * which does not reach the sum: that is at least 1. Inlined, so that callers know which of the two they want. */
static inline __attribute__((always_inline)) float vector_shares(const float *logits, uint32_t count, float max, float *share) {
    block sums[SUM_BLOCKS], top = block_all(max);
    if (count <= 8) {
        sums[0] = block_exp(block_sub(block_load(logits), top));
        if (share) block_store(share, sums[0]);
        return 1.0f / block_fold_sum(sums[0]);
    }
    for (uint32_t i = 0; i < SUM_BLOCKS; i++) sums[i] = block_all(0);
    for (uint32_t e = 0; e < count; e += EXP_BLOCKS * BLOCK_LANES) vector_exps(logits, e, top, share, sums);
    return 1.0f / block_fold_sum(SUM_BLOCKS == 2 ? block_add(sums[0], sums[SUM_BLOCKS - 1]) : sums[0]);
}

/* The scores to select from: the logits, `amount` added where a lane of `lanes` is set. Adding +0 elsewhere turns -0 into
 * +0, so that they tie as they should. */
static inline void vector_adjust(const float *logits, const float *lanes, float amount, uint32_t count, float *adjusted) {
    block added = block_all(amount);
    for (uint32_t e = 0; e < count; e += BLOCK_LANES)
        block_store(adjusted + e, block_add(block_load(logits + e), block_and(block_load(lanes + e), added)));
}

/* The same with the experts of `mask`, a bit each. */
static inline void vector_prefer(const float *logits, const uint64_t *mask, float amount, uint32_t count, float *adjusted) {
    block added = block_all(amount);
    for (uint32_t e = 0; e < count; e += BLOCK_LANES) {
        lane_mask lanes = mask_from_bits((uint32_t)(mask[e / 64] >> (e % 64)));
        block_store(adjusted + e, block_add(block_load(logits + e), block_where(lanes, added)));
    }
}

/* The `k` <= 8 best of `count` scores, best first. */
static inline void vector_select(const float *scores, uint32_t count, uint32_t k, int32_t *ids) {
    if (count <= 8) rank_eight(scores, k, ids);
    else if (count <= 2 * NETWORK_KEYS || !network_select_roughly(scores, count, k, ids))
        network_select(scores, count, k, ids);
}

/* The logits of `k` <= 8 experts; the first one stands for those missing of eight. */
static inline block vector_selected(const float *logits, const int32_t *ids, uint32_t k) {
    int32_t eight[8];
    for (uint32_t i = 0; i < 8; i++) eight[i] = ids[i < k ? i : 0];
    return block_eight(logits, eight);
}

/* softmax over the first `k` <= 8 of such logits, times `factor`. */
static inline void vector_softmax(block selected, uint32_t k, float factor, float *weights) {
    lane_mask used = mask_from_bits((1u << k) - 1);
    block p = block_where(used, block_exp(block_sub(selected, block_all(eight_fold_max(selected)))));
    block_store_first(weights, block_mul(p, block_all(1.0f / eight_fold_sum(p) * factor)), k);
}

/* A float of all ones where `mask` has a bit, of zeros elsewhere. */
static inline void vector_lanes(const uint64_t *mask, uint32_t count, float *lanes) {
    for (uint32_t e = 0; e < count; e += BLOCK_LANES)
        block_store(lanes + e, block_from_mask(mask_from_bits((uint32_t)(mask[e / 64] >> (e % 64)))));
}

/* Which logits reach `bound`, which is finite: sets bits up to the next multiple of 64. Does not overrun. */
static inline void vector_reaching(const float *logits, uint32_t count, float bound, uint64_t *bits) {
    block least = block_all(bound);
    for (uint32_t e = 0; e < count; e += BLOCK_LANES) {
        uint32_t left = count - e;
        block z = left >= BLOCK_LANES ? block_load(logits + e) : block_load_padded(logits + e, left, -INFINITY);
        if (e % 64 == 0) bits[e / 64] = 0;
        bits[e / 64] |= (uint64_t)mask_bits(block_at_least(z, least)) << (e % 64);
    }
}

#endif
