/* The rows of a call; each kernel (route_*.c) compiles this for its instruction set. */
#ifndef HOTSET_ROUTE_ROWS_H
#define HOTSET_ROUTE_ROWS_H

#include "route_kernel.h"
#include "route_policy.h"
#include "route_weights.h"

static inline void row_prefetch(const struct route_tile *tile, struct route_row *row, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    float scale = row_shares(rule, row);
    for (uint32_t e = 0; e < rule->num_experts; e++)
        if (row->share[e] * scale >= rule->prefetch_threshold && !bit_test(tile->snapshot->resident, e) &&
            !contains(row->ids, rule->top_k, (int32_t)e))
            bit_set(tally->prefetch, e);
}

static void route_rows(const struct route_rule *rule, const struct route_call *call,
                       const struct route_snapshot *snapshot, const struct route_boosts *boosts, const float *logits,
                       uint32_t rows, int32_t *ids, float *weights, struct route_tally *tally) {
    struct route_tile tile;
    uint32_t k = rule->top_k, room = tile_begin(&tile, rule, call, snapshot);
    float strengths[TILE_ROWS];
    for (uint32_t first = 0; first < rows; first += room) {
        tile.rows = rows - first < room ? rows - first : room;
        for (uint32_t r = 0; r < tile.rows; r++) {
            strengths[r] = call->strengths ? call->strengths[first + r] : call->strength;
            row_begin(&tile, r, logits + (size_t)(first + r) * rule->num_experts);
        }
        tile_apply_policy(&tile, call->policy, strengths, tally);
        int32_t *tile_ids = ids + (size_t)first * k;
        tile_finish(&tile, tile_ids, weights + (size_t)first * k, tally);
        for (uint32_t r = 0; r < tile.rows && call->want_prefetch; r++)
            if (tile.row[r].statistics.finite) row_prefetch(&tile, &tile.row[r], tally);
        if (rows == 1) return; /* its ids are its tally */
        for (uint32_t r = 0; r < tile.rows; r++, tile_ids += k) {
            uint64_t boost = boosts->by_age ? boosts->by_age[rows - 1 - first - r] << ROUTE_COUNT_BITS : 0;
            for (uint32_t i = 0; i < k; i++)
                tally->selections[tile_ids[i]] = (tally->selections[tile_ids[i]] & boosts->keep) + boost + 1;
        }
    }
}

#endif
