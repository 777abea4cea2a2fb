/* The steps of a tile of columns. The same operations in the same order as for single rows, so the results are the
 * same bits. */
#ifndef HOTSET_ROUTE_COLUMNS_H
#define HOTSET_ROUTE_COLUMNS_H

#include "route_row.h"

/* Whether a tile of so many rows is worth transposing, and can be. */
static inline int columns_apply(const struct route_rule *rule, const struct route_call *call, uint32_t rows) {
    return rows > BLOCK_LANES / 4 && rule->gating != GATING_SIGMOID && rule->top_k <= NETWORK_ROWS &&
           rule->num_experts <= COLUMN_EXPERTS && !call->want_prefetch;
}

/* Appends the experts of a kind to the order. */
static inline void columns_order(struct route_columns *columns, const uint64_t *mask, uint64_t flipped, uint32_t experts) {
    uint32_t count = columns->num_all;
    for (uint32_t e = 0; e < experts; e++) {
        columns->order[count] = e;
        count += (mask[e / 64] ^ flipped) >> (e % 64) & 1;
    }
    while (count % 8) columns->order[count++] = experts;
    columns->num_all = count;
}

/* Once for a call. */
static inline void columns_prepare(struct route_tile *tile) {
    struct route_columns *columns = &tile->columns;
    const uint64_t *preferred = tile->snapshot->preferred;
    columns->num_all = 0;
    columns_order(columns, preferred, 0, tile->rule->num_experts);
    columns->num_preferred = columns->num_all;
    columns_order(columns, preferred, UINT64_MAX, tile->rule->num_experts);
    for (uint32_t i = 0; i < columns->num_all; i++) columns->tags[i] = key_tag(columns->order[i]);
}

static inline block column(const struct route_tile *tile, uint32_t expert) {
    return block_load(tile->logits + (size_t)expert * BLOCK_LANES);
}

/* Rows of eight logits from `first` on, for the last experts: missing ones are -inf. */
static inline void columns_pad(const float **rows, uint32_t first, uint32_t count, float (*padded)[8]) {
    for (uint32_t r = 0; r < BLOCK_LANES; r++) {
        for (uint32_t e = 0; e < 8; e++) padded[r][e] = e < count ? rows[r][first + e] : -INFINITY;
        rows[r] = padded[r] - first;
    }
}

/* What the rows of all tiles of columns have in common; not again before a tile of rows has come in between. */
static inline void columns_rows(struct route_tile *tile) {
    if (tile->row[0].step == BLOCK_LANES) return;
    for (uint32_t r = 0; r < BLOCK_LANES; r++) {
        struct route_row *row = &tile->row[r];
        row->logits = tile->logits + r;
        row->adjusted = tile->adjusted + r;
        row->step = BLOCK_LANES;
        row->vector = 1;
        row->share = NULL;
        row->scale = &tile->scale[r];
        row->max = &tile->columns.max[r];
        row->statistics = (struct row_statistics){.finite = tile->rule->num_experts};
    }
}

/* Makes columns of tile->rows rows. 0 if a logit is not finite: then row after row is the way. */
static inline int columns_begin(struct route_tile *tile, const float *logits) {
    uint32_t experts = tile->rule->num_experts;
    const float *rows[BLOCK_LANES], *next = logits + (size_t)tile->rows * experts;
    float padded[BLOCK_LANES][8];
    block max = block_all(-INFINITY), min = block_all(INFINITY), odd = block_all(0);
    for (uint32_t r = 0; r < BLOCK_LANES; r++) /* lanes without a row repeat the last one */
        rows[r] = logits + (size_t)(r < tile->rows ? r : tile->rows - 1) * experts;
    for (uint32_t r = 0; r < tile->rows; r++) tile->row[r].given = rows[r];
    for (uint32_t first = 0; first < experts; first += 8) {
        block columns[8];
        if (experts - first < 8) columns_pad(rows, first, experts - first, padded);
        block_transpose(rows, first, columns);
        for (uint32_t r = 0; r < BLOCK_LANES; r += 2) /* the next tile's, a line of 16 logits each */
            __builtin_prefetch(next + (size_t)first * BLOCK_LANES + r * 8);
#pragma GCC unroll 8
        for (uint32_t i = 0; i < 8; i++) {
            block_store(tile->logits + (first + i) * BLOCK_LANES, columns[i]);
            block z = first + i < experts ? columns[i] : columns[0];
            max = block_max(z, max);
            min = block_min(z, min);
            odd = block_or(odd, block_sub(z, z)); /* +0 if finite, else NaN */
        }
    }
    if (!block_is_zero(odd)) return 0;
    block_store(tile->logits + experts * BLOCK_LANES, block_all(-INFINITY));
    block_store(tile->columns.max, max);
    block_store(tile->columns.min, min);
    block_store(tile->scale, block_all(0));
    columns_rows(tile);
    return 1;
}

/* The logits, amounts[r] added for the experts of `lanes`. */
static inline void columns_adjust(struct route_tile *tile, const float *lanes, block amounts) {
    uint32_t experts = tile->rule->num_experts;
    for (uint32_t e = 0; e < experts; e++)
        block_store(tile->adjusted + e * BLOCK_LANES,
                    block_add(column(tile, e), block_and(block_all(lanes[e]), amounts)));
    block_store(tile->adjusted + experts * BLOCK_LANES, block_all(-INFINITY));
}

/* The eight best of each row among the experts from position `first` of the order up to `end`, more than none, `added`
 * to their scores. */
static inline void columns_best(const struct route_tile *tile, const float *scores, uint32_t first, uint32_t end, block added,
                                keys (*best)[NETWORK_ROWS]) {
    const uint32_t *order = tile->columns.order;
    const uint64_t *tags = tile->columns.tags;
    for (uint32_t at = first; at < end; at += NETWORK_ROWS) {
        ordered_block ordered[NETWORK_ROWS];
#pragma GCC unroll 8
        for (uint32_t i = 0; i < NETWORK_ROWS; i++)
            ordered[i] = block_ordered(block_add(block_load(scores + (size_t)order[at + i] * BLOCK_LANES), added));
#pragma GCC unroll 4
        for (uint32_t part = 0; part < COLUMN_PARTS; part++) {
            keys r[NETWORK_ROWS];
#pragma GCC unroll 8
            for (uint32_t i = 0; i < NETWORK_ROWS; i++) r[i] = column_keys(ordered[i], tags[at + i], part);
            keys_sort(r);
            if (at > first) keys_merge(r, best[part]);
#pragma GCC unroll 8
            for (uint32_t i = 0; i < NETWORK_ROWS; i++) best[part][i] = r[i];
        }
    }
}

/* The ids of the `k` best. */
static inline void columns_ids(keys (*best)[NETWORK_ROWS], uint32_t k, int32_t (*ids)[BLOCK_LANES]) {
    for (uint32_t i = 0; i < k; i++) {
        keys parts[COLUMN_PARTS];
        for (uint32_t part = 0; part < COLUMN_PARTS; part++) parts[part] = best[part][i];
        column_ids(parts, ids[i]);
    }
}

/* The best of each row by tile->adjusted: chosen[i][r] is the one of rank i. */
static inline void columns_select(const struct route_tile *tile, int32_t (*chosen)[BLOCK_LANES]) {
    keys best[COLUMN_PARTS][NETWORK_ROWS];
    columns_best(tile, tile->adjusted, 0, tile->columns.num_all, block_all(0), best);
    columns_ids(best, tile->rule->top_k, chosen);
}

/* canonical_sum() of `count` blocks; `sums` is used up. */
static inline block columns_fold(block *sums, uint32_t count) {
    for (uint32_t i = count; i < SUM_LANES; i++) sums[i] = block_all(0);
#pragma GCC unroll 4
    for (uint32_t step = SUM_LANES / 2; step > 0; step /= 2)
#pragma GCC unroll 8
        for (uint32_t i = 0; i < step; i++) sums[i] = block_add(sums[i], sums[i + step]);
    return sums[0];
}

/* Each row's factor that makes softmax_exp(logit - max) probabilities. */
static inline void columns_scale(struct route_tile *tile) {
    block sums[SUM_LANES], max = block_load(tile->columns.max);
    uint32_t experts = tile->rule->num_experts, lanes = experts < SUM_LANES ? experts : SUM_LANES;
    for (uint32_t i = 0; i < lanes; i++) {
        sums[i] = block_exp(block_sub(column(tile, i), max));
        for (uint32_t e = i + SUM_LANES; e < experts; e += SUM_LANES)
            sums[i] = block_add(sums[i], block_exp(block_sub(column(tile, e), max)));
    }
    block_store(tile->scale, block_div(block_all(1), columns_fold(sums, lanes)));
}

/* Each row's statistics, which POLICY_RANGE looks at. */
static inline void columns_statistics(struct route_tile *tile) {
    for (uint32_t r = 0; r < tile->rows; r++) {
        tile->row[r].statistics.max = tile->columns.max[r];
        tile->row[r].statistics.min = tile->columns.min[r];
    }
}

/* Fills tile->columns.chosen from the rows' selections. */
static inline void columns_gather(struct route_tile *tile) {
    for (uint32_t r = 0; r < BLOCK_LANES; r++) {
        const struct route_row *row = &tile->row[r < tile->rows ? r : tile->rows - 1];
        for (uint32_t i = 0; i < tile->rule->top_k; i++) tile->columns.chosen[i][r] = row_logit(row, row->ids[i]);
    }
}

/* Of the experts in tile->columns.chosen: weights[i][r]. */
static inline void columns_weights(const struct route_tile *tile, float (*weights)[BLOCK_LANES]) {
    uint32_t k = tile->rule->top_k;
    block max = block_load(tile->columns.chosen[0]), scale, parts[SUM_LANES];
    if (tile->rule->renormalize)
        for (uint32_t i = 1; i < k; i++) max = block_max(block_load(tile->columns.chosen[i]), max);
    else max = block_load(tile->columns.max);
    for (uint32_t i = 0; i < k; i++) {
        parts[i] = block_exp(block_sub(block_load(tile->columns.chosen[i]), max));
        block_store(weights[i], parts[i]);
    }
    scale = tile->rule->renormalize ? block_div(block_all(1), columns_fold(parts, k)) : block_load(tile->scale);
    scale = block_mul(scale, block_all(tile->rule->weight_scale));
    for (uint32_t i = 0; i < k; i++) block_store(weights[i], block_mul(block_load(weights[i]), scale));
}

#endif
