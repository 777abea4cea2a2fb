/* Mixing weights of the selected experts, from the unmodified logits. */
#ifndef HOTSET_ROUTE_WEIGHTS_H
#define HOTSET_ROUTE_WEIGHTS_H

#include "route_tile.h"

/* A row without any finite logit: the order still holds (+inf first), but there is nothing to weigh. */
static inline void row_without_finite(const struct route_rule *rule, struct route_row *row, float *weights) {
    int ordered = row->statistics.positive_infinite > 0;
    if (ordered) select_top_k(row->logits, rule->num_experts, rule->top_k, row->ids);
    for (uint32_t i = 0; i < rule->top_k; i++) {
        if (!ordered) row->ids[i] = (int32_t)i;
        weights[i] = rule->weight_scale / (float)rule->top_k;
    }
}

static inline void row_weights(struct route_tile *tile, struct route_row *row, float *weights) {
    const struct route_rule *rule = tile->rule;
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
        scale = row_scale(tile, row);
        for (uint32_t i = 0; i < k; i++) weights[i] = row->share[row->ids[i]];
        if (rule->renormalize) scale = 1.0f / canonical_sum(weights, k);
        else if (rule->gating == GATING_SIGMOID) scale = 1;
    }
    scale *= rule->weight_scale;
    for (uint32_t i = 0; i < k; i++) weights[i] *= scale;
}

/* Of all rows of a tile. */
static inline void tile_weights(struct route_tile *tile, float *weights, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    uint32_t k = rule->top_k;
    for (uint32_t r = 0; r < tile->rows; r++, weights += k) {
        struct route_row *row = &tile->row[r];
        tally->nan_logits += row->statistics.nan;
        if (!row->statistics.finite) {
            tally->rows_without_finite++;
            row_without_finite(rule, row, weights);
            continue;
        }
#if ROUTE_VECTOR
        if (row->vector && rule->renormalize && k <= 8) {
            vector_softmax(vector_selected(row->logits, row->ids, k), k, rule->weight_scale, weights);
            continue;
        }
#endif
        row_weights(tile, row, weights);
    }
}

#endif
