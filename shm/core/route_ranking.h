/* The best eight of each row of a tile of columns.
 *
 * A key is a score whose lowest bits give way to the expert's id: minimum and maximum of floats then sort scores and ids
 * at once, half as many vectors as keys of doubles need (route_keys.h). Scores that differ in the lost bits only are not
 * told apart. So a ranking is believed where neighbours differ in the bits that were kept; the few rows in which they
 * do not (`unsure`) are ranked again, exactly. Equal scores, +0 and -0 among them, are such neighbours: ties need no case
 * of their own. Scores are finite, or -inf where there is no expert. */
#ifndef HOTSET_ROUTE_RANKING_H
#define HOTSET_ROUTE_RANKING_H

#include "route_columns.h"

struct column_ranking {
    block best[NETWORK_ROWS];
    block ninth; /* only known where it is asked for: it tells whether the eighth is sure */
};

static inline void ranking_merge(struct column_ranking *ranking, const struct column_ranking *other, int want_ninth) {
    if (want_ninth) { /* the largest of those that the merge drops */
        block dropped[NETWORK_ROWS];
#pragma GCC unroll 8
        for (uint32_t i = 0; i < NETWORK_ROWS; i++)
            dropped[i] = block_min(ranking->best[i], other->best[NETWORK_ROWS - 1 - i]);
#pragma GCC unroll 3
        for (uint32_t step = 4; step > 0; step /= 2)
#pragma GCC unroll 4
            for (uint32_t i = 0; i < step; i++) dropped[i] = block_max(dropped[i], dropped[i + step]);
        ranking->ninth = block_max(block_max(ranking->ninth, other->ninth), dropped[0]);
    }
    block_merge(ranking->best, other->best);
}

/* How scores come from columns; what is NULL or 0 is left out. */
struct ranking_scores {
    const block *flipped; /* bits, at first */
    const block *added;
    int clamped; /* infinite scores count as the largest finite ones, with which they tie */
};

/* Keys of the first `count` experts of `order`, sorted. */
static inline void ranking_begin(const struct route_tile *tile, const float *columns, const struct ordered_column *order,
                                 uint32_t count, struct ranking_scores how, struct column_ranking *ranking) {
    block kept = block_all(tile->columns.kept);
    ranking->ninth = block_all(-INFINITY);
#pragma GCC unroll 8
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) {
        block score = i < count ? block_load(columns + order[i].at) : block_all(-INFINITY);
        if (how.flipped) score = block_xor(score, *how.flipped);
        if (how.added) score = block_add(score, *how.added);
        if (how.clamped) score = block_min(block_max(score, block_all(-FLT_MAX)), block_all(FLT_MAX));
        ranking->best[i] = i < count ? block_tagged(score, block_all(order[i].tag), kept) : score;
    }
    if (count > 4) block_sort(ranking->best);
    else block_sort_four(ranking->best);
}

/* Ranks the experts from position `first` of the order up to `end`, more than none. */
static inline void ranking_of(const struct route_tile *tile, const float *columns, uint32_t first, uint32_t end,
                              struct ranking_scores how, int want_ninth, struct column_ranking *ranking) {
    const struct ordered_column *order = tile->columns.order;
    struct column_ranking next;
    if (first + NETWORK_ROWS == end && order[first + 4].at == tile->rule->num_experts * BLOCK_LANES) { /* at most four */
        ranking_begin(tile, columns, order + first, 4, how, ranking);
        return;
    }
    ranking_begin(tile, columns, order + first, NETWORK_ROWS, how, ranking);
    for (uint32_t at = first + NETWORK_ROWS; at < end; at += NETWORK_ROWS) {
        ranking_begin(tile, columns, order + at, NETWORK_ROWS, how, &next);
        ranking_merge(ranking, &next, want_ninth);
    }
}

/* The score of rank `i`, without the bits that are lost. */
static inline block ranking_kept(const struct route_tile *tile, const struct column_ranking *ranking, uint32_t i) {
    return block_and(i < NETWORK_ROWS ? ranking->best[i] : ranking->ninth, block_all(tile->columns.kept));
}

/* The rows, a bit each, whose `k` best are not certain. */
static inline uint32_t ranking_unsure(const struct route_tile *tile, const struct column_ranking *ranking) {
    block rank = ranking_kept(tile, ranking, 1);
    lane_mask sure = block_above(ranking_kept(tile, ranking, 0), rank);
    for (uint32_t i = 1; i < tile->rule->top_k; i++) {
        block next = ranking_kept(tile, ranking, i + 1);
        sure = mask_and(sure, block_above(rank, next));
        rank = next;
    }
    return ~mask_bits(sure) & tile_all_rows(tile);
}

/* The ids of the best, and of the rows in `unsure` those of an exact selection: of the scores in `columns`, `amounts[r]`
 * added to the preferred experts if it is given. chosen[i][r] is the one of rank i. */
static inline void ranking_ids(const struct route_tile *tile, const struct column_ranking *ranking, uint32_t unsure,
                               const float *columns, const float *amounts, int32_t (*chosen)[BLOCK_LANES]) {
    uint32_t k = tile->rule->top_k, experts = tile->rule->num_experts;
    for (uint32_t i = 0; i < k; i++)
        block_store((float *)chosen[i], block_tags(ranking->best[i], block_all(tile->columns.kept)));
    for (; unsure; unsure &= unsure - 1) {
        uint32_t r = (uint32_t)__builtin_ctz(unsure);
        _Alignas(64) float scores[COLUMN_EXPERTS + NETWORK_KEYS];
        int32_t ids[NETWORK_ROWS];
        for (uint32_t e = 0; e < tile->stride; e++) scores[e] = e < experts ? columns[e * BLOCK_LANES + r] : -INFINITY;
        if (amounts) vector_adjust(scores, tile->preferred, amounts[r], tile->stride, scores);
        vector_select(scores, experts, k, ids);
        for (uint32_t i = 0; i < k; i++) chosen[i][r] = ids[i];
    }
}

/* The best of each row by the scores in `columns`, infinite ones too. */
static inline void columns_select(const struct route_tile *tile, const float *columns, int32_t (*chosen)[BLOCK_LANES]) {
    struct column_ranking ranking;
    int want_ninth = tile->rule->top_k == NETWORK_ROWS;
    ranking_of(tile, columns, 0, tile->columns.num_all, (struct ranking_scores){.clamped = 1}, want_ninth, &ranking);
    ranking_ids(tile, &ranking, ranking_unsure(tile, &ranking), columns, NULL, chosen);
}

#endif
