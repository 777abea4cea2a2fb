/* The rows of a call; each kernel (route_*.c) compiles this for its instruction set. */
#ifndef HOTSET_ROUTE_ROWS_H
#define HOTSET_ROUTE_ROWS_H

#include "route_kernel.h"
#include "route_policy.h"
#include "route_report.h"
#include "route_weights.h"
#if ROUTE_VECTOR
#include "route_alone.h"
#include "route_eight.h"
#include "route_exchange.h"
#endif

static inline void row_prefetch(struct route_tile *tile, struct route_row *row, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    float scale = row_scale(tile, row);
    for (uint32_t e = 0; e < rule->num_experts; e++)
        if (row->share[e] * scale >= rule->prefetch_threshold && !bit_test(tile->snapshot->resident, e) &&
            !contains(row->ids, rule->top_k, (int32_t)e))
            bit_set(tally->prefetch, e);
}

#if ROUTE_VECTOR
/* One array of ranks, row after row; only its own ranks count. */
static inline void columns_write(const block *by_rank, uint32_t k, float *rows) {
    if (k == 1) block_store(rows, by_rank[0]);
    else if (k == 2) block_store_pairs(by_rank[0], by_rank[1], rows);
    else block_store_rows(by_rank, k > 4 ? 8 : 4, rows, k);
}

/* Ids and weights of a tile of columns. `exactly`: nothing may be written beyond them, to be overwritten. */
static inline void columns_finish(struct route_tile *tile, int exactly, int32_t *ids, float *weights) {
    uint32_t k = tile->rule->top_k, count = tile->rows * k;
    block by_rank[2][NETWORK_ROWS];
    float whole[2][(TILE_ROWS + 1) * NETWORK_ROWS];
    for (uint32_t i = 2; i < NETWORK_ROWS; i++) by_rank[0][i] = by_rank[1][i] = block_all(0);
    for (uint32_t i = 0; i < k; i++) by_rank[0][i] = block_load((const float *)tile->columns.chosen[i]);
    columns_weights(tile, tile->columns.chosen, by_rank[1]);
    columns_write(by_rank[0], k, exactly ? whole[0] : (float *)ids);
    columns_write(by_rank[1], k, exactly ? whole[1] : weights);
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

/* All steps of a tile of columns but the last. */
static inline void columns_route(struct route_tile *tile, uint32_t policy, const float *strengths, struct route_tally *tally) {
    const float none[TILE_ROWS] = {0};
    if (columns_go_by_row(tile, policy)) {
        tile_apply_policy(tile, policy, strengths, tally);
        columns_collect(tile);
        tile_report(tile, policy, tally);
    } else if (policy >= POLICY_MASS && columns_are_mixed(&tile->columns)) {
        columns_exchange(tile, policy, strengths);
        columns_report(tile, tally);
    } else {
        columns_prefer(tile, policy == POLICY_BONUS ? strengths : none);
        if (policy == POLICY_BONUS) columns_report(tile, tally);
    }
}
#endif

/* All steps of a tile of single rows. */
static inline void rows_route(struct route_tile *tile, const struct route_call *call, const float *strengths, float *weights,
                              struct route_tally *tally) {
    tile_apply_policy(tile, call->policy, strengths, tally);
    if (call->policy != POLICY_OFF) tile_report(tile, call->policy, tally);
    tile_weights(tile, weights, tally);
    for (uint32_t r = 0; r < tile->rows && call->want_prefetch; r++)
        if (tile->row[r].statistics.finite) row_prefetch(tile, &tile->row[r], tally);
}

/* Adds up what the rows selected. Inlined, because callers know common `k` as constants. */
static inline __attribute__((always_inline)) void tally_rows(const struct route_boosts *boosts, uint32_t rows, uint32_t k,
                                                             const int32_t *ids, struct route_tally *tally) {
    for (uint32_t r = rows; r-- > 0; ids += k) {
        uint64_t worth = (boosts->by_age ? boosts->by_age[r] << ROUTE_COUNT_BITS : 0) + 1;
        for (uint32_t i = 0; i < k; i++) tally->selections[ids[i]] += worth;
    }
}

static inline void tally_selections(const struct route_boosts *boosts, uint32_t rows, uint32_t k, const int32_t *ids,
                                    struct route_tally *tally) {
    if (boosts->keep != UINT64_MAX) {
        for (uint32_t r = rows; r-- > 0; ids += k)
            for (uint32_t i = 0; i < k; i++)
                tally->selections[ids[i]] =
                    (tally->selections[ids[i]] & boosts->keep) + (boosts->by_age[r] << ROUTE_COUNT_BITS) + 1;
    } else if (k == 2) tally_rows(boosts, rows, 2, ids, tally);
    else if (k == 4) tally_rows(boosts, rows, 4, ids, tally);
    else if (k == 6) tally_rows(boosts, rows, 6, ids, tally);
    else if (k == 8) tally_rows(boosts, rows, 8, ids, tally);
    else tally_rows(boosts, rows, k, ids, tally);
}

static __attribute__((noinline)) void route_tiles(const struct route_rule *rule, const struct route_call *call,
                       const struct route_snapshot *snapshot, const struct route_boosts *boosts, const float *logits,
                       uint32_t rows, int32_t *ids, float *weights, struct route_tally *tally) {
    struct route_tile tile;
    uint32_t k = rule->top_k, room = tile_begin(&tile, rule, call, snapshot);
    const float *by_row = call->policy == POLICY_OFF ? NULL : call->strengths;
    _Alignas(64) float strengths[TILE_ROWS];
    for (uint32_t r = 0; r < TILE_ROWS; r++) strengths[r] = call->policy == POLICY_OFF ? 0 : call->strength;
#if ROUTE_VECTOR
    int eight = eight_applies(rule, call);
    struct eight_sums sums = {.counted = 0};
    if (eight) eight_sums_begin(&sums, boosts, rows);
    if (columns_apply(rule, call, rows)) columns_prepare(&tile, call->policy);
#endif
    for (uint32_t first = 0, done; first < rows; first += done) {
        const float *given = logits + (size_t)first * rule->num_experts;
        uint32_t left = rows - first;
        int32_t *row_ids = ids + (size_t)first * k;
        float *row_weights = weights + (size_t)first * k;
#if ROUTE_VECTOR
        done = !eight ? 0 : eight_route(&tile, call, by_row ? by_row + first : NULL, given, left, row_ids, row_weights,
                                          &sums, tally);
        if (done) continue;
#endif
        done = tile.rows = left < room ? left : room;
        for (uint32_t r = 0; r < tile.rows && by_row; r++) strengths[r] = by_row[first + r];
        tile_load(&tile, call, given, row_ids);
#if ROUTE_VECTOR
        if (tile.transposed) {
            columns_route(&tile, call->policy, strengths, tally);
            columns_finish(&tile, (left - tile.rows) * k < NETWORK_ROWS, row_ids, row_weights);
            continue;
        }
#endif
        rows_route(&tile, call, strengths, row_weights, tally);
    }
    /* After all tiles: a tile's loads and stores of single words would keep the next tile waiting in the processor. */
#if ROUTE_VECTOR
    uint32_t counted = eight ? eight_sums_finish(&sums, tally) : 0;
#else
    uint32_t counted = 0;
#endif
    if (rows > 1) tally_selections(boosts, rows - counted, k, ids + (size_t)counted * k, tally);
}

/* A single row's ids are its tally. */
static void route_rows(const struct route_rule *rule, const struct route_call *call,
                       const struct route_snapshot *snapshot, const struct route_boosts *boosts, const float *logits,
                       uint32_t rows, int32_t *ids, float *weights, struct route_tally *tally) {
#if ROUTE_VECTOR
    if (rows == 1 && alone_applies(rule, call)) {
        struct route_tile tile;
        if (route_alone(&tile, rule, call, snapshot, logits, ids, weights, tally)) return;
    }
#endif
    route_tiles(rule, call, snapshot, boosts, logits, rows, ids, weights, tally);
}

#endif
