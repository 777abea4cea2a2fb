/* What the cache preference changed in a row, and the probability mass it cost. */
#ifndef HOTSET_ROUTE_REPORT_H
#define HOTSET_ROUTE_REPORT_H

#include "route_tile.h"

/* `out` belongs to the true top k; `in` took its place. Returns the mass lost. */
static inline float report_exchange(struct route_tile *tile, struct route_row *row, uint32_t out, uint32_t in,
                                    struct route_tally *tally) {
    float scale = row_scale(tile, row);
    tally->changed++;
    if (!bit_test(tile->snapshot->preferred, out)) bit_set(tally->displaced, out);
    return (row_share(row, (int32_t)out) - row_share(row, (int32_t)in)) * scale;
}

/* The position of the largest of some keys. */
static inline uint32_t largest_position(const uint64_t *keys, uint32_t count) {
    uint32_t found = 0;
    for (uint32_t i = 1; i < count; i++) found = keys[i] > keys[found] ? i : found;
    return found;
}

/* Given the experts outside of the selection that may belong in it: the best of them that rank above the worst of the
 * selection are in the true top k in their place. */
static inline void report_outsiders(struct route_tile *tile, struct route_row *row, const int32_t *outsiders,
                                    uint32_t count, struct route_tally *tally) {
    uint64_t above[ROUTE_MAX_EXPERTS], below[ROUTE_MAX_TOP_K]; /* ranks, those of the selection upside down */
    uint32_t k = tile->rule->top_k;
    float lost = 0;
    for (uint32_t i = 0; i < k; i++) below[i] = ~row_rank(row, row->ids[i]);
    for (uint32_t i = 0; i < count; i++) above[i] = row_rank(row, outsiders[i]);
    for (uint32_t exchanges = 0; exchanges < count && exchanges < k; exchanges++) {
        uint32_t best = largest_position(above, count), worst = largest_position(below, k);
        if (above[best] < ~below[worst]) break;
        lost += report_exchange(tile, row, rank_id(above[best]), rank_id(~below[worst]), tally);
        above[best] = 0;
        below[worst] = 0;
    }
    tally->lost_mass += lost;
}

/* The same by comparison with the true top k, where groups may be left out. */
static inline void report_against_truth(struct route_tile *tile, struct route_row *row, const int32_t *truth,
                                        struct route_tally *tally) {
    uint64_t below[ROUTE_MAX_TOP_K];
    uint32_t k = tile->rule->top_k, count = 0;
    float lost = 0;
    for (uint32_t i = 0; i < k; i++)
        if (!contains(truth, k, row->ids[i])) below[count++] = ~row_rank(row, row->ids[i]);
    for (uint32_t i = 0; i < k && count; i++) {
        if (contains(row->ids, k, truth[i])) continue;
        uint32_t worst = largest_position(below, count);
        lost += report_exchange(tile, row, (uint32_t)truth[i], rank_id(~below[worst]), tally);
        below[worst] = 0;
    }
    tally->lost_mass += lost;
}

/* The same with the true top k of the row's logits. */
static inline void report_given(struct route_tile *tile, struct route_row *row, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    float limited[ROUTE_MAX_EXPERTS];
    memcpy(limited, row->given, rule->num_experts * sizeof *limited);
    limit_groups(rule, limited);
    select_top_k(limited, rule->num_experts, rule->top_k, row->truth);
    report_against_truth(tile, row, row->truth, tally);
}

#if ROUTE_VECTOR
/* Only experts that reach the selection's least logit may belong in it. */
static inline void report_vector(struct route_tile *tile, struct route_row *row, float least, struct route_tally *tally) {
    uint32_t experts = tile->rule->num_experts, count = 0;
    uint64_t bits[ROUTE_WORDS];
    int32_t outsiders[ROUTE_MAX_EXPERTS];
    vector_reaching(row->given, experts, least, bits);
    for (uint32_t i = 0; i < tile->rule->top_k; i++) bits[row->ids[i] / 64] &= ~(UINT64_C(1) << (row->ids[i] % 64));
    for (uint32_t word = 0; word * 64 < experts; word++)
        for (uint64_t left = bits[word]; left; left &= left - 1)
            outsiders[count++] = (int32_t)(word * 64 + (uint32_t)__builtin_ctzll(left));
    if (count) report_outsiders(tile, row, outsiders, count, tally);
}

/* Slot by slot of route_preference.h: from the last one on, so that each row's exchanges are in the same order as above. */
static inline void columns_report(struct route_tile *tile, const float *amounts, struct route_tally *tally) {
    struct route_columns *columns = &tile->columns;
    uint32_t k = tile->rule->top_k, rows = (uint32_t)((UINT64_C(1) << tile->rows) - 1);
    keys unbiased[COLUMN_PARTS][NETWORK_ROWS];
    float lost[TILE_ROWS] = {0};
    if (!columns_unbiased(tile, amounts, unbiased)) {
        for (uint32_t r = 0; r < tile->rows; r++) report_given(tile, &tile->row[r], tally);
        return;
    }
    _Alignas(64) int32_t in[NETWORK_ROWS][TILE_ROWS], out[NETWORK_ROWS][TILE_ROWS];
    uint64_t changed[2] = {0, 0}; /* a bit per slot and row: one loop over all, for each end of a loop is mispredicted */
    for (uint32_t at = 0; at < k; at++) {
        keys selected[COLUMN_PARTS], truth[COLUMN_PARTS];
        uint32_t slot = k - 1 - at;
        for (uint32_t part = 0; part < COLUMN_PARTS; part++) {
            keys other = columns->others[part][at];
            selected[part] = keys_max(columns->preferred[part][slot], other);
            truth[part] = keys_max(unbiased[part][slot], other);
        }
        column_ids(selected, in[at]);
        column_ids(truth, out[at]);
        changed[at * TILE_ROWS / 64] |= (uint64_t)(ids_differ(in[at], out[at]) & rows) << (at * TILE_ROWS % 64);
    }
    for (uint32_t word = 0; word < 2; word++)
        for (uint64_t left = changed[word]; left; left &= left - 1) {
            uint32_t bit = word * 64 + (uint32_t)__builtin_ctzll(left), at = bit / TILE_ROWS, r = bit % TILE_ROWS;
            lost[r] += report_exchange(tile, &tile->row[r], (uint32_t)out[at][r], (uint32_t)in[at][r], tally);
        }
    for (uint32_t r = 0; r < tile->rows; r++) tally->lost_mass += lost[r];
}

static inline float least_logit(const struct route_row *row, uint32_t k) {
    float least = row_logit(row, row->ids[0]);
    for (uint32_t i = 1; i < k; i++) {
        float z = row_logit(row, row->ids[i]);
        least = z < least ? z : least;
    }
    return least;
}
#endif

/* `amounts`: what POLICY_BONUS added. */
static inline void tile_report(struct route_tile *tile, uint32_t policy, const float *amounts, struct route_tally *tally) {
#if ROUTE_VECTOR
    if (tile->transposed && policy == POLICY_BONUS) {
        columns_report(tile, amounts, tally);
        return;
    }
#else
    (void)amounts;
#endif
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
        if (!row->statistics.finite) continue;
        if (policy != POLICY_BONUS) report_against_truth(tile, row, row->truth, tally);
#if ROUTE_VECTOR
        else if (row->vector) report_vector(tile, row, least_logit(row, tile->rule->top_k), tally);
#endif
        else report_given(tile, row, tally);
    }
}

#endif
