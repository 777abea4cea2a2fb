/* Mixing weights of the selected experts, from the unmodified logits. */
#ifndef HOTSET_ROUTE_WEIGHTS_H
#define HOTSET_ROUTE_WEIGHTS_H

#include "route_row.h"

/* A row without any finite logit: the order still holds (+inf first), but there is nothing to weigh. */
static inline void row_without_finite(const struct route_rule *rule, struct route_row *row, float *weights) {
    int ordered = row->statistics.positive_infinite > 0;
    if (ordered) select_top_k(row->logits, rule->num_experts, rule->top_k, row->ids);
    for (uint32_t i = 0; i < rule->top_k; i++) {
        if (!ordered) row->ids[i] = (int32_t)i;
        weights[i] = rule->weight_scale / (float)rule->top_k;
    }
}

static inline void row_weights(const struct route_rule *rule, struct route_row *row, float *weights) {
    uint32_t k = rule->top_k;
    float scale = 0, max = -INFINITY;
    int finite = rule->renormalize && rule->gating != GATING_SIGMOID;
    for (uint32_t i = 0; i < k && finite; i++) {
        weights[i] = row->logits[row->ids[i]];
        max = weights[i] > max ? weights[i] : max;
        finite = isfinite(weights[i]);
    }
    if (finite) {
        /* Relative to the largest selected logit, not to the row's: the selection may leave that one out. */
        for (uint32_t i = 0; i < k; i++) weights[i] = softmax_exp(weights[i] - max);
        scale = 1.0f / canonical_sum(weights, k);
    } else {
        scale = row_shares(rule, row);
        for (uint32_t i = 0; i < k; i++) weights[i] = row->share[row->ids[i]];
        if (rule->renormalize) scale = 1.0f / canonical_sum(weights, k);
    }
    scale *= rule->weight_scale;
    for (uint32_t i = 0; i < k; i++) weights[i] *= scale;
}

/* Of all rows of a tile: ids and weights to `ids` and `weights`. */
static inline void tile_finish(struct route_tile *tile, int32_t *ids, float *weights, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    uint32_t k = rule->top_k;
#if ROUTE_VECTOR
    _Alignas(64) float selected[TILE_ROWS][BLOCK_LANES];
    int renormalize = rule->renormalize && k <= BLOCK_LANES;
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
        if (!row->vector) continue;
        if (!rule->renormalize) row_shares(rule, row);
        else if (renormalize) {
            block_store(selected[r], block_all(-INFINITY));
            for (uint32_t i = 0; i < k; i++) selected[r][i] = row->logits[row->ids[i]];
        }
    }
    float scale[TILE_ROWS];
    for (uint32_t r = 0; r < tile->rows && renormalize; r++)
        if (tile->row[r].vector) scale[r] = vector_softmax(selected[r]) * rule->weight_scale;
#endif
    for (uint32_t r = 0; r < tile->rows; r++, ids += k, weights += k) {
        struct route_row *row = &tile->row[r];
        tally->nan_logits += row->statistics.nan;
        if (!row->statistics.finite) {
            tally->rows_without_finite++;
            row_without_finite(rule, row, weights);
        }
#if ROUTE_VECTOR
        else if (row->vector && renormalize)
            for (uint32_t i = 0; i < k; i++) weights[i] = selected[r][i] * scale[r];
#endif
        else row_weights(rule, row, weights);
        for (uint32_t i = 0; i < k; i++) ids[i] = row->ids[i];
    }
}

#endif
