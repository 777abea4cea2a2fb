/* The steps from logits to a selection, for all rows of a tile. */
#ifndef HOTSET_ROUTE_TILE_H
#define HOTSET_ROUTE_TILE_H

#include "route_row.h"
#if ROUTE_VECTOR
#include "route_preference.h"
#endif

/* Takes up tile->rows rows, whose selections go to `ids`. */
static inline void tile_load(struct route_tile *tile, const struct route_call *call, const float *logits, int32_t *ids) {
    tile->transposed = 0;
#if ROUTE_VECTOR
    tile->transposed = columns_apply(tile->rule, call, tile->rows) && columns_begin(tile, logits, call->policy == POLICY_RANGE);
    if (tile->transposed && columns_go_by_row(tile, call->policy)) columns_rows(tile, ids);
#else
    (void)call;
#endif
    for (uint32_t r = 0; r < tile->rows && !tile->transposed; r++) {
        row_begin(tile, r, logits);
        tile->row[r].ids = ids + r * tile->rule->top_k;
    }
}

/* Fills row->adjusted with the scores, amounts[r] added to the logits of the preferred experts. */
static inline void tile_adjust(struct route_tile *tile, const float *amounts) {
    const struct route_rule *rule = tile->rule;
#if ROUTE_VECTOR
    if (tile->transposed) {
        columns_adjust(tile, tile->preferred, block_load(amounts));
        return;
    }
#endif
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
#if ROUTE_VECTOR
        if (row->vector) {
            vector_adjust(row->logits, tile->preferred, amounts[r], tile->stride, row->adjusted);
            continue;
        }
#endif
        plain_adjust(rule, tile->selection_bias, row->logits, tile->snapshot->preferred, amounts[r], row->adjusted);
    }
}

/* Fills row->adjusted with the scores of the preferred experts, and -inf. Not for columns: see route_exchange.h. */
static inline void tile_restrict(struct route_tile *tile) {
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
#if ROUTE_VECTOR
        if (row->vector) {
            vector_adjust(row->logits, tile->others, -INFINITY, tile->stride, row->adjusted);
            continue;
        }
#endif
        plain_restrict(row->scores, tile->rule->num_experts, tile->snapshot->preferred, row->adjusted);
    }
}

#if ROUTE_VECTOR
/* Columns of selections into row->truth, or into row->ids. */
static inline void tile_take(struct route_tile *tile, int into_truth) {
    for (uint32_t r = 0; r < tile->rows; r++) {
        int32_t *ids = into_truth ? tile->row[r].truth : tile->row[r].ids;
        for (uint32_t i = 0; i < tile->rule->top_k; i++) ids[i] = tile->columns.chosen[i][r];
    }
}
#endif

/* Selects from row->adjusted: into row->truth, or into row->ids. */
static inline void tile_select(struct route_tile *tile, int into_truth) {
    const struct route_rule *rule = tile->rule;
#if ROUTE_VECTOR
    if (tile->transposed) {
        columns_select(tile, tile->adjusted, tile->columns.chosen);
        tile_take(tile, into_truth);
        return;
    }
#endif
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
        int32_t *ids = into_truth ? row->truth : row->ids;
#if ROUTE_VECTOR
        if (row->vector && rule->top_k <= NETWORK_ROWS) {
            vector_select(row->adjusted, rule->num_experts, rule->top_k, ids);
            continue;
        }
#endif
        select_top_k(row->adjusted, rule->num_experts, rule->top_k, ids);
    }
}

/* The factor that makes row_share() probabilities; computes what it needs when it is first called. */
static inline float row_scale(struct route_tile *tile, struct route_row *row) {
#if ROUTE_VECTOR
    if (tile->transposed) {
        columns_shares(tile);
        return *row->scale;
    }
#endif
    if (*row->scale != 0) return *row->scale;
#if ROUTE_VECTOR
    if (row->vector)
        return *row->scale = vector_shares(row->logits, tile->rule->num_experts, row->statistics.max, row->share);
#endif
    return *row->scale = plain_shares(tile->rule, row->logits, &row->statistics, row->share);
}

#endif
