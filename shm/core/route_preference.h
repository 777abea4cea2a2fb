/* POLICY_BONUS in columns.
 *
 * The preferred experts and the others are ranked apart. Merging the two rankings with the bonus gives the selection,
 * and without it the true top k: so what the preference changed costs no second selection. Of two rankings, the top k
 * are the better ones of each pair (i of one, k - 1 - i of the other); where the bonus decides a pair, the preferred
 * expert took the other's place.
 *
 * The bonus may round two scores to the same one, and put them in another order than their logits: such tiles are
 * compared with the true top k row by row. */
#ifndef HOTSET_ROUTE_PREFERENCE_H
#define HOTSET_ROUTE_PREFERENCE_H

#include "route_columns.h"

/* Selects with amounts[r] added to the preferred experts: chosen[i][r] is the one of rank i. */
static inline void columns_prefer(struct route_tile *tile, const float *amounts, int32_t (*chosen)[BLOCK_LANES]) {
    struct route_columns *columns = &tile->columns;
    block none = block_all(-INFINITY);
    int some = columns->num_preferred > 0, all = columns->num_preferred == columns->num_all;
    for (uint32_t part = 0; part < COLUMN_PARTS; part++) {
        keys missing = column_keys(block_ordered(none), key_tag(tile->rule->num_experts), part);
        for (uint32_t i = 0; i < NETWORK_ROWS; i++) columns->preferred[part][i] = columns->others[part][i] = missing;
    }
    if (some) columns_best(tile, tile->logits, 0, columns->num_preferred, block_load(amounts), columns->preferred);
    if (!all)
        columns_best(tile, tile->logits, columns->num_preferred, columns->num_all, block_all(0), columns->others);
    keys best[COLUMN_PARTS][NETWORK_ROWS];
    for (uint32_t part = 0; part < COLUMN_PARTS; part++) {
        for (uint32_t i = 0; i < NETWORK_ROWS; i++) best[part][i] = columns->preferred[part][i];
        keys_merge(best[part], columns->others[part]);
    }
    columns_ids(best, tile->rule->top_k, chosen);
}

/* Whether some row has more than eight preferred experts whose score reaches `eighth`. */
static inline int columns_ninth_ties(const struct route_tile *tile, block eighth, block amounts) {
    block count = block_all(0);
    for (uint32_t i = 0; i < tile->columns.num_preferred; i++) {
        block score = block_add(column(tile, tile->columns.order[i]), amounts);
        count = block_add(count, block_where(block_at_least(score, eighth), block_all(1)));
    }
    return mask_bits(block_above(count, block_all(NETWORK_ROWS))) != 0;
}

/* Whether a ninth preferred expert may matter: if the eighth is selected, or has the score of the last that may be. */
static inline int columns_ninth_matters(const struct route_tile *tile, block last, block eighth) {
    const struct route_columns *columns = &tile->columns;
    if (columns->num_preferred <= NETWORK_ROWS) return 0;
    if (tile->rule->top_k < NETWORK_ROWS) return mask_bits(block_equal(last, eighth)) != 0;
    int selected = 0;
    for (uint32_t part = 0; part < COLUMN_PARTS; part++)
        selected |= keys_any_below(columns->others[part][0], columns->preferred[part][NETWORK_ROWS - 1]);
    return selected;
}

/* The preferred experts' ranking by their logits alone. 0 if it may be another one than with the bonus. */
static inline int columns_unbiased(struct route_tile *tile, const float *amounts, keys (*ranking)[NETWORK_ROWS]) {
    struct route_columns *columns = &tile->columns;
    _Alignas(64) int32_t ids[NETWORK_ROWS][BLOCK_LANES];
    _Alignas(64) float logits[NETWORK_ROWS][BLOCK_LANES];
    int unsorted = 0;
    columns_ids(columns->preferred, NETWORK_ROWS, ids);
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) /* all before the first is loaded, which waits for its last lane's store */
        for (uint32_t r = 0; r < BLOCK_LANES; r++) logits[i][r] = tile->logits[(uint32_t)ids[i][r] * BLOCK_LANES + r];
    for (uint32_t i = 0; i < NETWORK_ROWS; i++) {
        ordered_block ordered = block_ordered(block_add(block_load(logits[i]), block_all(0))); /* -0 + 0 is +0 */
        for (uint32_t part = 0; part < COLUMN_PARTS; part++) {
            ranking[part][i] = column_rescored(ordered, columns->preferred[part][i], part);
            if (i > 0) unsorted |= keys_any_below(ranking[part][i - 1], ranking[part][i]);
        }
    }
    block bonus = block_load(amounts), eighth = block_add(block_load(logits[NETWORK_ROWS - 1]), bonus);
    block last = block_add(block_load(logits[tile->rule->top_k - 1]), bonus);
    return !unsorted && !(columns_ninth_matters(tile, last, eighth) && columns_ninth_ties(tile, eighth, bonus));
}

#endif
