/* POLICY_SUBSTITUTE: chosen experts that are neither in memory nor on their way are replaced, the least weight first, while
 * a replacement changes the residual by less than a given share of it.
 *
 * The outputs f, g of two experts are nearly orthogonal and, times weight_scale, about as long as any expert's, n. So where
 * weight p goes and q comes, the layer's output changes by |q g - p f| = sqrt(p^2 + q^2) n. Callers give strength =
 * limit * |x| / n, as for POLICY_RESNORM. That is least where q is least, so those that come are the resident experts of
 * least weight: what is missing is all but left out. The best resident experts would stand in for it no better, and add
 * what the gate left out: they cost a fifth more divergence at as many hits.
 *
 * Weights rise with the logits. A gate that selects by other scores (with a bias) may so rank an expert last that has not
 * the least weight: here the logits decide. */
#ifndef HOTSET_ROUTE_SUBSTITUTE_H
#define HOTSET_ROUTE_SUBSTITUTE_H

#include "route_tile.h"

/* Mixing weights are shares times this, and weight_scale; where they are made to sum to one, those of the true top k. */
static inline float row_weight_scale(struct route_tile *tile, struct route_row *row) {
    float scale = row_scale(tile, row), shares[ROUTE_MAX_TOP_K];
    if (!tile->rule->renormalize) return tile->rule->gating == GATING_SIGMOID ? 1 : scale;
    for (uint32_t i = 0; i < tile->rule->top_k; i++) shares[i] = row_share(row, row->truth[i]);
    return 1.0f / canonical_sum(shares, tile->rule->top_k);
}

/* The `most` resident experts of least weight outside of the true top k, the least one first. Returns how many there are. */
static inline uint32_t row_last_residents(const struct route_tile *tile, const struct route_row *row, uint32_t most,
                                          int32_t *ids) {
    uint64_t last[ROUTE_MAX_TOP_K];
    uint32_t held = 0;
    for (uint32_t word = 0; word * 64 < tile->rule->num_experts; word++)
        for (uint64_t left = tile->snapshot->resident[word]; left; left &= left - 1) {
            uint32_t expert = word * 64 + (uint32_t)__builtin_ctzll(left);
            if (!(row->adjusted[expert * row->step] > -INFINITY)) continue; /* NaN, masked out, or in a group left out */
            uint64_t key = rank_key(row_logit(row, (int32_t)expert), expert);
            if ((held == most && key > last[most - 1]) || contains(row->truth, tile->rule->top_k, (int32_t)expert)) continue;
            uint32_t at = held < most ? held++ : most - 1;
            for (; at > 0 && last[at - 1] > key; at--) last[at] = last[at - 1];
            last[at] = key;
        }
    for (uint32_t i = 0; i < held; i++) ids[i] = (int32_t)rank_id(last[i]);
    return held;
}

/* Positions in the true top k, which a bias has ordered: the least weight first. */
static inline void row_sort_by_weight(const struct route_row *row, uint32_t *positions, uint32_t count) {
    uint64_t keys[ROUTE_MAX_TOP_K];
    for (uint32_t i = 0; i < count; i++) {
        uint32_t position = positions[i], at = i;
        int32_t expert = row->truth[position];
        uint64_t key = rank_key(row_logit(row, expert), (uint32_t)expert);
        for (; at > 0 && keys[at - 1] > key; at--) keys[at] = keys[at - 1], positions[at] = positions[at - 1];
        keys[at] = key, positions[at] = position;
    }
}

/* One row, whose true top k has been selected. Who stays keeps the order, who comes ranks below. */
static inline void row_substitute(struct route_tile *tile, struct route_row *row, float limit) {
    uint32_t k = tile->rule->top_k, missing = 0, exchanged = 0, kept = 0, removed = 0 /* bits of positions in truth */;
    uint32_t out[ROUTE_MAX_TOP_K]; /* positions, least weight first */
    int32_t in[ROUTE_MAX_TOP_K];
    memcpy(row->ids, row->truth, k * sizeof *row->ids);
    for (uint32_t i = k; i-- > 0;)
        if (!bit_test(tile->snapshot->preferred, (uint32_t)row->truth[i])) out[missing++] = i;
    if (!missing || !(limit > 0)) return;
    if (tile->selection_bias) row_sort_by_weight(row, out, missing);
    float scale = row_weight_scale(tile, row);
    uint32_t most = row_last_residents(tile, row, missing, in);
    for (; exchanged < most; exchanged++) {
        float p = row_share(row, row->truth[out[exchanged]]) * scale, q = row_share(row, in[exchanged]) * scale;
        if (!(p * p + q * q < limit * limit)) break;
        removed |= UINT32_C(1) << out[exchanged];
    }
    for (uint32_t i = 0; i < k; i++)
        if (!(removed >> i & 1)) row->ids[kept++] = row->truth[i];
    for (uint32_t i = exchanged; i-- > 0;) row->ids[kept++] = in[i];
}

#endif
