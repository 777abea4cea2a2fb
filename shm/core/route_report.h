/* What the cache preference changed in a row, and the probability mass it cost. */
#ifndef HOTSET_ROUTE_REPORT_H
#define HOTSET_ROUTE_REPORT_H

#include "route_row.h"

#define REPORT_OUTSIDERS 63u

static inline int contains(const int32_t *ids, uint32_t count, int32_t id) {
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] == id) return 1;
    return 0;
}

/* `out` belongs to the true top k; `in` took its place. Returns the mass lost. */
static inline float report_exchange(const struct route_tile *tile, const struct route_row *row, uint32_t out, uint32_t in,
                                    struct route_tally *tally) {
    tally->changed++;
    if (!bit_test(tile->snapshot->preferred, out)) bit_set(tally->displaced, out);
    return (row->share[out] - row->share[in]) * row->scale;
}

/* The position of the largest of some keys. */
static inline uint32_t largest_position(const uint64_t *keys, uint32_t count) {
    uint32_t found = 0;
    for (uint32_t i = 1; i < count; i++) found = keys[i] > keys[found] ? i : found;
    return found;
}

/* Given the experts outside of the selection that may belong in it: the best of them that rank above the worst of the
 * selection are in the true top k in their place. */
static inline void report_outsiders(const struct route_tile *tile, const struct route_row *row, const int32_t *outsiders,
                                    uint32_t count, struct route_tally *tally) {
    uint64_t above[REPORT_OUTSIDERS], below[ROUTE_MAX_TOP_K]; /* ranks, those of the selection upside down */
    uint32_t k = tile->rule->top_k;
    float lost = 0;
    for (uint32_t i = 0; i < k; i++) below[i] = ~rank_key(row->logits, (uint32_t)row->ids[i]);
    for (uint32_t i = 0; i < count; i++) above[i] = rank_key(row->logits, (uint32_t)outsiders[i]);
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
static inline void report_against_truth(const struct route_tile *tile, const struct route_row *row, const int32_t *truth,
                                        struct route_tally *tally) {
    uint64_t below[ROUTE_MAX_TOP_K];
    uint32_t k = tile->rule->top_k, count = 0;
    float lost = 0;
    for (uint32_t i = 0; i < k; i++)
        if (!contains(truth, k, row->ids[i])) below[count++] = ~rank_key(row->logits, (uint32_t)row->ids[i]);
    for (uint32_t i = 0; i < k && count; i++) {
        if (contains(row->ids, k, truth[i])) continue;
        uint32_t worst = largest_position(below, count);
        lost += report_exchange(tile, row, (uint32_t)truth[i], rank_id(~below[worst]), tally);
        below[worst] = 0;
    }
    tally->lost_mass += lost;
}

static inline void report_plain(struct route_tile *tile, struct route_row *row, struct route_tally *tally) {
    const struct route_rule *rule = tile->rule;
    int32_t truth[ROUTE_MAX_TOP_K];
    memcpy(row->adjusted, row->logits, rule->num_experts * sizeof *row->logits);
    limit_groups(rule, row->adjusted);
    select_top_k(row->adjusted, rule->num_experts, rule->top_k, truth);
    row_shares(rule, row);
    report_against_truth(tile, row, truth, tally);
}

#if ROUTE_VECTOR
static inline float least_logit(const struct route_row *row, uint32_t k) {
    float least = row->logits[row->ids[0]];
    for (uint32_t i = 1; i < k; i++) {
        float z = row->logits[row->ids[i]];
        least = z < least ? z : least;
    }
    return least;
}

/* Only experts that reach the selection's least logit may belong in it. */
static inline void report_vector(struct route_tile *tile, struct route_row *row, struct route_tally *tally) {
    uint32_t experts = tile->rule->num_experts, k = tile->rule->top_k, count = 0;
    uint64_t bits[ROUTE_WORDS];
    int32_t outsiders[REPORT_OUTSIDERS];
    uint32_t outside = vector_reaching(row->logits, experts, least_logit(row, k), bits) - k;
    if (!outside) return;
    if (outside > REPORT_OUTSIDERS) { /* a bonus far beyond the logits */
        report_plain(tile, row, tally);
        return;
    }
    row_shares(tile->rule, row);
    for (uint32_t i = 0; i < k; i++) bits[row->ids[i] / 64] &= ~(UINT64_C(1) << (row->ids[i] % 64));
    for (uint32_t word = 0; word * 64 < experts; word++)
        for (uint64_t left = bits[word]; left; left &= left - 1)
            outsiders[count++] = (int32_t)(word * 64 + (uint32_t)__builtin_ctzll(left));
    report_outsiders(tile, row, outsiders, count, tally);
}
#endif

static inline void tile_report(struct route_tile *tile, struct route_tally *tally) {
    for (uint32_t r = 0; r < tile->rows; r++) {
#if ROUTE_VECTOR
        if (tile->row[r].vector) {
            report_vector(tile, &tile->row[r], tally);
            continue;
        }
#endif
        if (tile->row[r].statistics.finite) report_plain(tile, &tile->row[r], tally);
    }
}

#endif
