/* Scores and selection, for all rows of a tile step by step. */
#ifndef HOTSET_ROUTE_TILE_H
#define HOTSET_ROUTE_TILE_H

#include "route_row.h"

/* Fills row->adjusted with the logits, amounts[r] added to the preferred experts. In plain C, NaN then marks the experts
 * of groups that are left out. */
static inline void tile_adjust(struct route_tile *tile, const float *amounts) {
    const struct route_rule *rule = tile->rule;
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
#if ROUTE_VECTOR
        if (row->vector) {
            vector_adjust(row->logits, tile->preferred, amounts[r], tile->stride, row->adjusted);
            continue;
        }
#endif
        plain_adjust(row->logits, rule->num_experts, tile->snapshot->preferred, amounts[r], row->adjusted);
        limit_groups(rule, row->adjusted);
    }
}

/* Fills row->adjusted with the logits of the preferred experts, and -inf. */
static inline void tile_restrict(struct route_tile *tile) {
    const struct route_rule *rule = tile->rule;
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
#if ROUTE_VECTOR
        if (row->vector) {
            vector_adjust(row->logits, tile->others, -INFINITY, tile->stride, row->adjusted);
            continue;
        }
#endif
        plain_adjust(row->logits, rule->num_experts, tile->snapshot->preferred, 0, row->adjusted);
        limit_groups(rule, row->adjusted);
        plain_restrict(row->adjusted, rule->num_experts, tile->snapshot->preferred, row->adjusted);
    }
}

/* Selects from row->adjusted: into row->truth, or into row->ids. */
static inline void tile_select(struct route_tile *tile, int into_truth) {
    const struct route_rule *rule = tile->rule;
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

#endif
