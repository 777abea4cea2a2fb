/* A tile of columns: transposed, so that a block is one expert of as many rows as it has lanes, and every step does all
 * rows at once. The same operations on each number in the same order as for single rows, so the results are the same
 * bits. */
#ifndef HOTSET_ROUTE_COLUMNS_H
#define HOTSET_ROUTE_COLUMNS_H

#include "route_row.h"

/* Whether a tile of so many rows is worth transposing, and can be. */
static inline int columns_apply(const struct route_rule *rule, const struct route_call *call, uint32_t rows) {
    return rows > BLOCK_LANES / 4 && rule->gating != GATING_SIGMOID && rule->top_k <= NETWORK_ROWS &&
           rule->num_experts <= COLUMN_EXPERTS && !call->want_prefetch;
}

/* A bit for each row of the tile. */
static inline uint32_t tile_all_rows(const struct route_tile *tile) { return (uint32_t)((UINT64_C(1) << tile->rows) - 1); }

/* Appends the experts whose bit in `mask` is `bit` to the order. */
static inline void columns_order(struct route_columns *columns, const uint64_t *mask, int bit, uint32_t experts) {
    uint32_t count = columns->num_all;
    for (uint32_t e = 0; e < experts; e++) {
        columns->order[count] = (struct ordered_column){e * BLOCK_LANES, e};
        count += bit_test(mask, e) == bit;
    }
    while (count % NETWORK_ROWS) columns->order[count++] = (struct ordered_column){experts * BLOCK_LANES, 0};
    columns->num_all = count;
}

/* Once for a call: what all its tiles have in common. */
static inline void columns_prepare(struct route_tile *tile) {
    struct route_columns *columns = &tile->columns;
    const uint64_t *preferred = tile->snapshot->preferred;
    uint32_t experts = tile->rule->num_experts, ids = 1;
    while (ids < experts) ids *= 2;
    columns->kept = float_from_bits(~(ids - 1));
    columns->resolution = (float)ids / (1 << 23);
    columns->num_all = 0;
    columns_order(columns, preferred, 1, experts);
    columns->num_preferred = columns->num_all;
    columns_order(columns, preferred, 0, experts);
    block_store(tile->logits + experts * BLOCK_LANES, block_all(-INFINITY));
    block_store(tile->adjusted + experts * BLOCK_LANES, block_all(-INFINITY));
}

static inline block column(const struct route_tile *tile, uint32_t expert) {
    return block_load(tile->logits + (size_t)expert * BLOCK_LANES);
}

/* Rows of eight logits from `first` on, for the last experts: missing ones repeat the first. */
static inline void columns_pad(const float **rows, uint32_t first, uint32_t count, float (*padded)[8]) {
    for (uint32_t r = 0; r < BLOCK_LANES; r++) {
        for (uint32_t e = 0; e < 8; e++) padded[r][e] = rows[r][first + (e < count ? e : 0)];
        rows[r] = padded[r] - first;
    }
}

/* The rows as the steps for single rows see them. Not again before a tile of rows has come in between. */
static inline void columns_rows(struct route_tile *tile) {
    if (tile->row[0].step == BLOCK_LANES) return;
    for (uint32_t r = 0; r < BLOCK_LANES; r++)
        tile->row[r] = (struct route_row){.ids = tile->row[r].ids,
                                          .logits = tile->logits + r,
                                          .adjusted = tile->adjusted + r,
                                          .step = BLOCK_LANES,
                                          .vector = 1,
                                          .share = tile->share + r,
                                          .scale = &tile->scale[r],
                                          .statistics.finite = tile->rule->num_experts};
}

/* Eight columns reduced to one. */
#define COLUMNS_TREE(op, c)                                                                                          \
    op(op(op((c)[0], (c)[1]), op((c)[2], (c)[3])), op(op((c)[4], (c)[5]), op((c)[6], (c)[7])))

/* Makes columns of tile->rows rows. 0 if a logit is not finite, or their sum: then row after row is the way. */
static inline int columns_begin(struct route_tile *tile, const float *logits, int want_min) {
    uint32_t experts = tile->rule->num_experts;
    const float *rows[BLOCK_LANES], *next = logits + (size_t)tile->rows * experts;
    float padded[BLOCK_LANES][8];
    block max = block_all(-INFINITY), min = block_all(INFINITY), sum = block_all(0);
    for (uint32_t r = 0; r < BLOCK_LANES; r++) /* lanes without a row repeat the last one */
        rows[r] = logits + (size_t)(r < tile->rows ? r : tile->rows - 1) * experts;
    for (uint32_t first = 0; first < experts; first += 8) {
        block columns[8];
        if (experts - first < 8) columns_pad(rows, first, experts - first, padded);
        block_transpose(rows, first, columns);
        for (uint32_t r = 0; r < BLOCK_LANES; r += 2) /* the next tile's, a line of 16 logits each */
            __builtin_prefetch(next + (size_t)first * BLOCK_LANES + r * 8);
#pragma GCC unroll 8
        for (uint32_t i = 0; i < 8; i++) block_store(tile->logits + (first + i) * BLOCK_LANES, columns[i]);
        max = block_max(COLUMNS_TREE(block_max, columns), max);
        if (want_min) min = block_min(COLUMNS_TREE(block_min, columns), min);
        sum = block_add(COLUMNS_TREE(block_add, columns), sum); /* NaN and infinities stay in it */
    }
    if (!block_is_zero(block_sub(sum, sum))) return 0;
    if (experts % 8) block_store(tile->logits + experts * BLOCK_LANES, block_all(-INFINITY));
    columns_rows(tile);
    tile->given = logits;
    tile->shared = 0;
    block_store(tile->columns.max, max);
    if (!want_min) return 1;
    block_store(tile->columns.min, min);
    for (uint32_t r = 0; r < tile->rows; r++) {
        tile->row[r].statistics.max = tile->columns.max[r];
        tile->row[r].statistics.min = tile->columns.min[r];
    }
    return 1;
}

/* The logits, amounts[r] added for the experts of `lanes`. */
static inline void columns_adjust(struct route_tile *tile, const float *lanes, block amounts) {
    for (uint32_t e = 0; e < tile->rule->num_experts; e++)
        block_store(tile->adjusted + e * BLOCK_LANES,
                    block_add(column(tile, e), block_and(block_all(lanes[e]), amounts)));
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

/* Fills the shares, and each row's factor that makes them probabilities. */
static inline void columns_shares(struct route_tile *tile) {
    block sums[SUM_LANES], max = block_load(tile->columns.max);
    uint32_t experts = tile->rule->num_experts, lanes = experts < SUM_LANES ? experts : SUM_LANES;
    if (tile->shared) return;
    for (uint32_t i = 0; i < lanes; i++) {
        for (uint32_t e = i; e < experts; e += SUM_LANES) {
            block share = block_exp(block_sub(column(tile, e), max));
            block_store(tile->share + e * BLOCK_LANES, share);
            sums[i] = e == i ? share : block_add(sums[i], share);
        }
    }
    block_store(tile->scale, block_div(block_all(1), columns_fold(sums, lanes)));
    tile->shared = 1;
}

/* Mixing weights of the experts `chosen`: weights[i] are those of rank i. */
static inline void columns_weights(struct route_tile *tile, int32_t (*chosen)[BLOCK_LANES], block *weights) {
    uint32_t k = tile->rule->top_k;
    block scale;
    if (tile->rule->renormalize) {
        block max = block_all(-INFINITY), parts[SUM_LANES];
        for (uint32_t i = 0; i < k; i++) max = block_max(weights[i] = column_gather(tile->logits, chosen[i]), max);
        for (uint32_t i = 0; i < k; i++) parts[i] = weights[i] = block_exp(block_sub(weights[i], max));
        scale = block_div(block_all(1), columns_fold(parts, k));
    } else {
        columns_shares(tile);
        for (uint32_t i = 0; i < k; i++) weights[i] = column_gather(tile->share, chosen[i]);
        scale = block_load(tile->scale);
    }
    scale = block_mul(scale, block_all(tile->rule->weight_scale));
    for (uint32_t i = 0; i < k; i++) weights[i] = block_mul(weights[i], scale);
}

#endif
