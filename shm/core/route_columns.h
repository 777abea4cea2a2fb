/* A tile of columns: transposed, so that a block is one expert of as many rows as it has lanes, and every step does all
 * rows at once. The same operations on each number in the same order as for single rows, so the results are the same
 * bits. */
#ifndef HOTSET_ROUTE_COLUMNS_H
#define HOTSET_ROUTE_COLUMNS_H

#include "route_row.h"

/* Whether a tile of so many rows is worth transposing, and can be. */
static inline int columns_apply(const struct route_rule *rule, const struct route_call *call, uint32_t rows) {
    return rows > BLOCK_LANES / 4 && !route_is_plain(rule) && rule->top_k <= NETWORK_ROWS &&
           rule->num_experts <= COLUMN_EXPERTS && !call->want_prefetch;
}

/* Whether a preference can change anything. */
static inline int columns_are_mixed(const struct route_columns *columns) {
    return columns->num_preferred > 0 && columns->num_preferred < columns->num_all;
}

/* Policies that choose row by row among what columns have ranked. POLICY_SUBSTITUTE only where it would have to know how
 * many of the true top k are resident: their kind tells if they are the preferred ones, and where there are many residents
 * the last eight of them are not in the true top k at all. */
static inline int columns_go_by_row(const struct route_tile *tile, uint32_t policy) {
    const struct route_columns *columns = &tile->columns;
    return policy == POLICY_RANGE ||
           (policy == POLICY_SUBSTITUTE && columns_are_mixed(columns) && columns->some_loading &&
            columns->num_resident < NETWORK_ROWS + tile->rule->top_k);
}

/* A bit for each row of the tile. */
static inline uint32_t tile_all_rows(const struct route_tile *tile) { return (uint32_t)((UINT64_C(1) << tile->rows) - 1); }

/* Appends the experts of a set to the order, which has `count`; returns how many it has then. Column `filling` stands for
 * those that are missing of a multiple of eight. */
static inline uint32_t columns_order(struct route_columns *columns, uint32_t count, const uint64_t *mask, uint64_t flipped,
                                     uint32_t experts, uint32_t filling) {
    for (uint32_t first = 0; first < experts; first += 64) {
        uint64_t left = (mask[first / 64] ^ flipped) & (experts - first < 64 ? (UINT64_C(1) << (experts - first)) - 1 : UINT64_MAX);
        for (; left; left &= left - 1) {
            uint32_t e = first + (uint32_t)__builtin_ctzll(left);
            columns->order[count++] = (struct ordered_column){e * BLOCK_LANES, float_from_bits(e)};
        }
    }
    while (count % NETWORK_ROWS) columns->order[count++] = (struct ordered_column){filling * BLOCK_LANES, 0};
    return count;
}

/* Once for a call: what all its tiles have in common. */
static inline void columns_prepare(struct route_tile *tile, uint32_t policy) {
    struct route_columns *columns = &tile->columns;
    const uint64_t *preferred = tile->snapshot->preferred;
    uint32_t experts = tile->rule->num_experts, ids = 1;
    while (ids < experts) ids *= 2;
    columns->id_mask = (int32_t)ids - 1;
    columns->kept = float_from_bits(~(ids - 1));
    columns->resolution = (float)ids / (1 << 23);
    columns->num_preferred = columns_order(columns, 0, preferred, 0, experts, experts);
    columns->num_all = columns_order(columns, columns->num_preferred, preferred, UINT64_MAX, experts, experts);
    if (policy != POLICY_SUBSTITUTE) return;
    columns->num_resident = 0;
    columns->some_loading = 0;
    for (uint32_t word = 0; word * 64 < experts; word++) {
        columns->num_resident += (uint32_t)__builtin_popcountll(tile->snapshot->resident[word]);
        columns->some_loading |= tile->snapshot->resident[word] != preferred[word];
    }
    columns->end_resident = columns_order(columns, columns->num_all, tile->snapshot->resident, 0, experts, experts + 1);
}

static inline block column(const struct route_tile *tile, uint32_t expert) {
    return block_load(tile->logits + (size_t)expert * BLOCK_LANES);
}

/* The rows as the steps for single rows see them, their selections at `ids`. */
static inline void columns_rows(struct route_tile *tile, int32_t *ids) {
    for (uint32_t r = 0; r < BLOCK_LANES; r++)
        tile->row[r] = (struct route_row){.logits = tile->logits + r,
                                          .scores = tile->logits + r,
                                          .adjusted = tile->adjusted + r,
                                          .step = BLOCK_LANES,
                                          .vector = 1,
                                          .share = tile->share + r,
                                          .scale = &tile->scale[r],
                                          .ids = ids + r * tile->rule->top_k,
                                          .statistics = {tile->columns.max[r], tile->columns.min[r], tile->rule->num_experts, 0, 0}};
}

/* As many rows as a block has lanes, of at least eight logits: the last row and the first logit stand for missing ones. */
static inline const float *columns_fill(struct route_tile *tile, const float *logits, uint32_t stride) {
    uint32_t experts = tile->rule->num_experts;
    float *row = tile->adjusted;
    for (uint32_t r = 0; r < BLOCK_LANES; r++, row += stride) {
        const float *given = logits + (size_t)(r < tile->rows ? r : tile->rows - 1) * experts;
        memcpy(row, given, experts * sizeof *row);
        for (uint32_t e = experts; e < stride; e++) row[e] = given[0];
    }
    return tile->adjusted;
}

/* Makes columns of tile->rows rows. 0 if a logit is not finite, or their sum: then row after row is the way. */
static inline int columns_begin(struct route_tile *tile, const float *logits, int want_min) {
    uint32_t experts = tile->rule->num_experts, stride = experts < 8 ? 8 : experts;
    const float *rows = logits;
    block max = block_all(-INFINITY), min = block_all(INFINITY), sum = block_all(0);
    if (tile->rows < BLOCK_LANES || experts < 8) rows = columns_fill(tile, logits, stride);
    for (uint32_t done = 0; done < experts; done += 8) {
        uint32_t first = done + 8 <= stride ? done : stride - 8; /* the last eight, of which some may be done already */
        block columns[8];
        block_transpose(rows + first, stride, columns);
#pragma GCC unroll 8
        for (uint32_t i = 0; i < 8; i++) block_store(tile->logits + (first + i) * BLOCK_LANES, columns[i]);
        max = block_max(BLOCK_TREE(block_max, columns), max);
        if (want_min) min = block_min(BLOCK_TREE(block_min, columns), min);
        sum = block_add(BLOCK_TREE(block_add, columns), sum); /* NaN and infinities stay in it */
    }
    if (!block_is_zero(block_sub(sum, sum))) return 0;
    block_store(tile->logits + experts * BLOCK_LANES, block_all(-INFINITY)); /* see columns_order() */
    block_store(tile->logits + (experts + 1) * BLOCK_LANES, block_all(INFINITY));
    block_store(tile->columns.max, max);
    block_store(tile->columns.min, min);
    tile->given = logits;
    tile->shared = 0;
    return 1;
}

/* The logits, amounts[r] added for the experts of `lanes`. */
static inline void columns_adjust(struct route_tile *tile, const float *lanes, block amounts) {
    for (uint32_t e = 0; e < tile->rule->num_experts; e++)
        block_store(tile->adjusted + e * BLOCK_LANES,
                    block_add(column(tile, e), block_and(block_all(lanes[e]), amounts)));
    block_store(tile->adjusted + tile->rule->num_experts * BLOCK_LANES, block_all(-INFINITY));
}

/* canonical_sum() of `count` blocks; `sums` is used up. */
static inline block columns_fold(block *sums, uint32_t count) {
    if (count > 8)
        for (uint32_t i = 0; i < 8; i++) sums[i] = i + 8 < count ? block_add(sums[i], sums[i + 8]) : sums[i];
    else /* what is missing adds nothing */
        for (uint32_t i = count; i < 8; i++) sums[i] = block_all(0);
    return BLOCK_TREE(block_add, sums);
}

/* Fills the shares, and each row's factor that makes them probabilities. */
static inline void columns_shares(struct route_tile *tile) {
    block sums[SUM_LANES], max = block_load(tile->columns.max);
    uint32_t experts = tile->rule->num_experts, lanes = experts < SUM_LANES ? experts : SUM_LANES;
    const float *next = tile->given + (size_t)experts * BLOCK_LANES; /* the next tile's logits */
    if (tile->shared) return;
    for (uint32_t i = 0; i < lanes; i++) {
        for (uint32_t e = i; e < experts; e += SUM_LANES) {
            if (e * BLOCK_LANES % 16 == 0) __builtin_prefetch(next + e * BLOCK_LANES); /* while the processor computes */
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
