/* POLICY_BONUS in columns, and the true top k.
 *
 * The preferred experts and the others are ranked apart. Merging the two rankings with the bonus gives the selection,
 * and without it the true top k: so what the preference changed costs no second selection. Of two rankings, the top k
 * are the better ones of each pair (i of one, k - 1 - i of the other); where the bonus decides a pair, the preferred
 * expert took the other's place. */
#ifndef HOTSET_ROUTE_PREFERENCE_H
#define HOTSET_ROUTE_PREFERENCE_H

#include "route_ranking.h"

/* Fills in the pairs that the bonus decides. Returns the rows where that is not certain. */
static inline uint32_t columns_compare(struct route_tile *tile, const struct column_ranking *preferred,
                                       const struct column_ranking *others, const struct column_ranking *selected,
                                       block bonus) {
    struct route_columns *columns = &tile->columns;
    uint32_t k = tile->rule->top_k;
    block none = block_all(-INFINITY), kept = ranking_kept(tile, others, 0);
    /* A key is off by less than the scores' magnitude * resolution; twice that for two of them, and again for the sums. */
    block first = selected->best[0], last = selected->best[k - 1];
    block magnitude = block_max(block_max(first, last), block_sub(block_all(0), block_min(first, last)));
    block doubt = block_mul(block_add(magnitude, bonus), block_all(4 * columns->resolution));
    block denied = block_sub(block_all(0), doubt);
    lane_mask any = block_above(none, none), unsure = any, tied = any;
    for (uint32_t i = 0; i < k; i++) {
        block in = preferred->best[k - 1 - i], out = others->best[i], next = ranking_kept(tile, others, i + 1);
        block lead = block_sub(block_sub(in, bonus), out);
        lane_mask changed = mask_and(block_above(in, out), block_above(doubt, lead));
        any = mask_or(any, changed);
        unsure = mask_or(unsure, mask_and(changed, block_above(lead, denied)));
        tied = mask_or(tied, mask_and(block_equal(kept, next), block_above(next, none)));
        kept = next;
        block_store((float *)columns->in[i], in);
        block_store((float *)columns->out[i], out);
        columns->changed[i * BLOCK_LANES / 64] |= (uint64_t)mask_bits(changed) << (i * BLOCK_LANES % 64);
    }
    return mask_bits(mask_or(unsure, mask_and(tied, any)));
}

/* Selects with amounts[r] added to the preferred experts, into columns->chosen. */
static inline void columns_prefer(struct route_tile *tile, const float *amounts) {
    struct route_columns *columns = &tile->columns;
    uint32_t preferred_end = columns->num_preferred, end = columns->num_all, unsure;
    int want_ninth = tile->rule->top_k == NETWORK_ROWS;
    struct column_ranking selected, others;
    block bonus = block_load(amounts);
    if (preferred_end == 0) ranking_of(tile, tile->logits, 0, end, (struct ranking_scores){NULL}, want_ninth, &selected);
    else ranking_of(tile, tile->logits, 0, preferred_end, (struct ranking_scores){.added = &bonus}, want_ninth, &selected);
    columns->unsure = 0;
    for (uint32_t word = 0; word < COLUMN_WORDS; word++) columns->changed[word] = 0;
    if (columns_are_mixed(columns)) {
        struct column_ranking preferred = selected;
        ranking_of(tile, tile->logits, preferred_end, end, (struct ranking_scores){NULL}, want_ninth, &others);
        ranking_merge(&selected, &others, want_ninth);
        columns->unsure = columns_compare(tile, &preferred, &others, &selected, bonus);
    }
    unsure = ranking_unsure(tile, &selected);
    /* Infinite scores make keys that are no numbers. */
    unsure |= ~mask_bits(block_above(block_all(INFINITY), block_add(block_load(columns->max), bonus))) & tile_all_rows(tile);
    if (preferred_end > 0) columns->unsure |= unsure; /* without a preference nothing changes */
    ranking_ids(tile, &selected, unsure, tile->logits, amounts, columns->chosen);
}

#endif
