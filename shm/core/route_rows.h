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

#if ROUTE_VECTOR
/* Ids and weights of a tile of columns, row after row. `exactly`: nothing may be written beyond them, to be overwritten. */
static inline void columns_write(struct route_tile *tile, int exactly, int32_t *ids, float *weights) {
    uint32_t k = tile->rule->top_k, count = tile->rows * k, ranks = k > 4 ? 8 : 4;
    block by_rank[2][NETWORK_ROWS];
    float whole[2][(TILE_ROWS + 1) * NETWORK_ROWS];
    columns_weights(tile, tile->columns.chosen, by_rank[1]);
    for (uint32_t i = 0; i < k; i++) by_rank[0][i] = block_load((const float *)tile->columns.chosen[i]);
    for (uint32_t i = k; i < ranks; i++) by_rank[0][i] = by_rank[1][i] = block_all(0);
    block_store_rows(by_rank[0], ranks, exactly ? whole[0] : (float *)ids, k);
    block_store_rows(by_rank[1], ranks, exactly ? whole[1] : weights, k);
    if (!exactly) return;
    memcpy(ids, whole[0], count * sizeof *ids);
    memcpy(weights, whole[1], count * sizeof *weights);
}

/* Fills columns->chosen from the rows' selections. */
static inline void columns_collect(struct route_tile *tile) {
    for (uint32_t r = 0; r < BLOCK_LANES; r++)
        for (uint32_t i = 0; i < tile->rule->top_k; i++)
            tile->columns.chosen[i][r] = tile->row[r < tile->rows ? r : tile->rows - 1].ids[i];
}
#endif

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
        if (tile.transposed && call->policy != POLICY_BONUS && call->policy != POLICY_OFF) columns_collect(&tile);
#endif
        if (call->policy != POLICY_OFF) tile_report(&tile, call->policy, tally);
#if ROUTE_VECTOR
        uint32_t after = (rows - first - tile.rows) * k;
        if (tile.transposed) columns_write(&tile, after < NETWORK_ROWS, tile_ids, weights + (size_t)first * k);
        else
#endif
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
