/* The rows of a call; each kernel (route_*.c) compiles this for its instruction set. */
#ifndef HOTSET_ROUTE_ROWS_H
#define HOTSET_ROUTE_ROWS_H

#include "route_kernel.h"
#include "route_policy.h"
#include "route_report.h"
#include "route_weights.h"

static inline void row_prefetch(struct route_tile *tile, struct route_row *row, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    float scale = row_scale(tile, row);
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
    _Alignas(64) float strengths[TILE_ROWS] = {0};
#if ROUTE_VECTOR
    if (columns_apply(rule, call, rows)) columns_prepare(&tile);
#endif
    for (uint32_t first = 0; first < rows; first += room) {
        int32_t *tile_ids = ids + (size_t)first * k;
        tile.rows = rows - first < room ? rows - first : room;
        for (uint32_t r = 0; r < tile.rows; r++)
            strengths[r] = call->strengths ? call->strengths[first + r] : call->strength;
        tile_load(&tile, call, logits + (size_t)first * rule->num_experts, tile_ids);
        tile_apply_policy(&tile, call->policy, strengths, tally);
#if ROUTE_VECTOR
        if (tile.transposed) columns_gather(&tile);
        if (tile.transposed && !rule->renormalize) columns_scale(&tile);
#endif
        if (call->policy != POLICY_OFF) tile_report(&tile, call->policy, strengths, tally);
        tile_weights(&tile, weights + (size_t)first * k, tally);
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
