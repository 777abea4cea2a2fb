/* What the cache preference changed in a row, and the probability mass it cost. */
#ifndef HOTSET_ROUTE_REPORT_H
#define HOTSET_ROUTE_REPORT_H

#include "route_tile.h"

/* `out` belongs to the true top k; `in` took its place. Returns the mass lost. */
static inline float report_exchange(struct route_tile *tile, struct route_row *row, uint32_t out, uint32_t in,
                                    struct route_tally *tally) {
    float scale = row_scale(tile, row);
    tally->changed++;
    tally->displaced[out / 64] |= ~tile->snapshot->preferred[out / 64] & UINT64_C(1) << (out % 64);
    return (row_share(row, (int32_t)out) - row_share(row, (int32_t)in)) * scale;
}

/* The position of the largest of some keys. */
static inline uint32_t largest_position(const uint64_t *keys, uint32_t count) {
    uint32_t found = 0;
    for (uint32_t i = 1; i < count; i++) found = keys[i] > keys[found] ? i : found;
    return found;
}

/* Given the experts outside of the selection that may belong in it: the best of them that rank above the worst of the
 * selection are in the true top k in their place. Returns the mass lost, as all that follow do. */
static inline float report_outsiders(struct route_tile *tile, struct route_row *row, const int32_t *outsiders,
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
    return lost;
}

/* The same by comparison with the true top k, where groups may be left out. */
static inline float report_against_truth(struct route_tile *tile, struct route_row *row, const int32_t *truth,
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
    return lost;
}

/* The same with the true top k of `scores`. */
static inline float report_scores(struct route_tile *tile, struct route_row *row, const float *scores,
                                  struct route_tally *tally) {
    select_top_k(scores, tile->rule->num_experts, tile->rule->top_k, row->truth);
    return report_against_truth(tile, row, row->truth, tally);
}

#if ROUTE_VECTOR
/* The one expert outside of the selection that reaches its least logit. Without branches: which one of the selection is
 * the worst would often be mispredicted. */
static inline float report_outsider(struct route_tile *tile, struct route_row *row, float least, int32_t outsider,
                                   struct route_tally *tally) {
    int32_t worst = 0;
    for (uint32_t i = 0; i < tile->rule->top_k; i++) {
        int32_t id = row->ids[i] & -(int32_t)(row_logit(row, row->ids[i]) == least); /* of equal ones the last */
        worst = id > worst ? id : worst;
    }
    if ((outsider > worst) & (row_logit(row, outsider) == least)) return 0;
    return report_exchange(tile, row, (uint32_t)outsider, (uint32_t)worst, tally);
}

/* Only experts that reach the selection's least logit may belong in it. */
static inline float report_vector(struct route_tile *tile, struct route_row *row, float least, struct route_tally *tally) {
    uint32_t experts = tile->rule->num_experts, count = 0, last = 0;
    uint64_t bits[ROUTE_WORDS];
    vector_reaching(row->given, experts, least, bits);
    for (uint32_t i = 0; i < tile->rule->top_k; i++) bits[row->ids[i] / 64] &= ~(UINT64_C(1) << (row->ids[i] % 64));
    for (uint32_t word = 0; word * 64 < experts; word++) {
        count += (uint32_t)__builtin_popcountll(bits[word]);
        last = bits[word] ? word : last;
    }
    if (count == 0) return 0;
    if (count == 1) return report_outsider(tile, row, least, (int32_t)(last * 64) + __builtin_ctzll(bits[last]), tally);
    int32_t outsiders[ROUTE_MAX_EXPERTS];
    count = 0;
    for (uint32_t word = 0; word * 64 < experts; word++)
        for (uint64_t left = bits[word]; left; left &= left - 1)
            outsiders[count++] = (int32_t)(word * 64 + (uint32_t)__builtin_ctzll(left));
    return report_outsiders(tile, row, outsiders, count, tally);
}

/* A row of columns, by comparison with its true top k. */
static inline float columns_report_row(struct route_tile *tile, uint32_t r, struct route_tally *tally) {
    int32_t ids[NETWORK_ROWS];
    struct route_row row = {.scores = tile->logits + r, .share = tile->share + r, .scale = &tile->scale[r],
                            .step = BLOCK_LANES, .vector = 1, .ids = ids};
    for (uint32_t i = 0; i < tile->rule->top_k; i++) ids[i] = tile->columns.chosen[i][r];
    return report_scores(tile, &row, tile->given + (size_t)r * tile->rule->num_experts, tally);
}

/* Pair by pair of route_preference.h: each row's exchanges are in the same order as above. */
static inline void columns_report(struct route_tile *tile, struct route_tally *tally) {
    const struct route_columns *columns = &tile->columns;
    uint32_t rows = tile_all_rows(tile), sure = rows & ~columns->unsure;
    uint64_t counted = sure | (uint64_t)sure << BLOCK_LANES;
    double lost_mass = tally->lost_mass;
    float lost[TILE_ROWS] = {0};
    for (uint32_t shift = 2 * BLOCK_LANES; shift < 64; shift *= 2) counted |= counted << shift;
    columns_shares(tile);
    for (uint32_t word = 0; word < COLUMN_WORDS; word++) {
        uint64_t left = columns->changed[word] & counted;
        tally->changed += (uint32_t)__builtin_popcountll(left);
        for (; left; left &= left - 1) { /* one loop over many pairs: each end of a loop is mispredicted */
            uint32_t at = word * 64 + (uint32_t)__builtin_ctzll(left), r = at % BLOCK_LANES;
            uint32_t in = (uint32_t)(columns->in[at / BLOCK_LANES][r] & columns->id_mask);
            uint32_t out = (uint32_t)(columns->out[at / BLOCK_LANES][r] & columns->id_mask);
            bit_set(tally->displaced, out);
            lost[r] += (tile->share[out * BLOCK_LANES + r] - tile->share[in * BLOCK_LANES + r]) * tile->scale[r];
        }
    }
    for (uint32_t left = rows & columns->unsure; left; left &= left - 1) {
        uint32_t r = (uint32_t)__builtin_ctz(left);
        lost[r] = columns_report_row(tile, r, tally);
    }
    for (uint32_t r = 0; r < tile->rows; r++) lost_mass += lost[r];
    tally->lost_mass = lost_mass;
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

static inline void tile_report(struct route_tile *tile, uint32_t policy, struct route_tally *tally) {
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
        if (!row->statistics.finite) continue;
        if (policy != POLICY_BONUS) tally->lost_mass += report_against_truth(tile, row, row->truth, tally);
#if ROUTE_VECTOR
        else if (row->vector) tally->lost_mass += report_vector(tile, row, least_logit(row, tile->rule->top_k), tally);
#endif
        else tally->lost_mass += report_scores(tile, row, row->scores, tally);
    }
}

#endif
