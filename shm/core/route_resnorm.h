/* POLICY_RESNORM: s_e = p_e + strength * p_1 * [e preferred], the top k of s. p_1 is the row's largest probability; with
 * p as shares, exp(z_e - max z), which is p_e / p_1, that is s_e = share_e + strength * [e preferred]. For a sigmoid gate
 * p_e is the score that it selects by and p_1 the largest sigmoid; within the groups that the gate itself takes.
 *
 * What a wrong expert can do to the residual x is small where |x| is large beside what experts add to it: callers give
 * strength = tau * |x| / (mean norm of the layer's expert outputs).
 *
 * The preferred experts and the others are ranked apart, by their logits, and the two rankings are merged by s. Ties of
 * s go to the larger logit. So nothing that the exponential rounds to the same share changes places without need, and
 * strength 0 is the true top k exactly. */
#ifndef HOTSET_ROUTE_RESNORM_H
#define HOTSET_ROUTE_RESNORM_H

#include "route_tile.h"

struct ranking {
    uint32_t count; /* at most top_k */
    int32_t ids[ROUTE_MAX_TOP_K];
};

/* How many come before the first that is not of the kind. */
static inline uint32_t count_of_kind(const int32_t *ids, uint32_t k, const uint64_t *mask, int bit) {
    uint32_t count = 0;
    while (count < k && bit_test(mask, (uint32_t)ids[count]) == bit) count++;
    return count;
}

/* Of every row, the best preferred experts (`bit` 1) or the best others (0). */
static inline void tile_rank_kind(struct route_tile *tile, int bit, struct ranking *rankings) {
    const uint64_t *preferred = tile->snapshot->preferred;
    uint32_t experts = tile->rule->num_experts, k = tile->rule->top_k;
#if ROUTE_VECTOR
    /* Here all logits are finite: -inf puts the other kind last. */
    const float *excluded = bit ? tile->others : tile->preferred;
#endif
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
#if ROUTE_VECTOR
        if (row->vector && k <= NETWORK_ROWS) {
            vector_adjust(row->logits, excluded, -INFINITY, tile->stride, row->adjusted);
            vector_select(row->adjusted, experts, k, rankings[r].ids);
            rankings[r].count = count_of_kind(rankings[r].ids, k, preferred, bit);
            continue;
        }
#endif
        rankings[r].count = select_of_kind(row->scores, experts, k, preferred, bit, rankings[r].ids);
    }
}

/* Whether the preferred expert comes before the other one; `amount` 0: by their scores. NaN and -inf gain nothing. */
static inline int row_comes_first(const struct route_row *row, int sigmoid_gate, int32_t preferred, int32_t other,
                                  float amount) {
    if (row_rank(row, preferred) > row_rank(row, other)) return 1;
    if (!(amount > 0 && row_score(row, preferred) > -INFINITY)) return 0;
    return sigmoid_gate ? row_score(row, preferred) + amount > row_score(row, other)
                        : row_share(row, preferred) + amount > row_share(row, other);
}

/* The top k of both rankings together, best first. */
static inline void row_merge(const struct route_row *row, const struct route_rule *rule, const struct ranking *preferred,
                             const struct ranking *others, float amount, int32_t *ids) {
    int sigmoid_gate = rule->gating == GATING_SIGMOID;
    uint32_t p = 0, o = 0;
    for (uint32_t i = 0; i < rule->top_k; i++) {
        int first = o == others->count || (p < preferred->count && row_comes_first(row, sigmoid_gate, preferred->ids[p],
                                                                                   others->ids[o], amount));
        ids[i] = first ? preferred->ids[p++] : others->ids[o++];
    }
}

/* Selects into row->ids, and the true top k into row->truth. */
static inline void tile_resnorm(struct route_tile *tile, const float *strengths) {
    struct ranking preferred[TILE_ROWS], others[TILE_ROWS];
    const struct route_rule *rule = tile->rule;
    tile_rank_kind(tile, 1, preferred);
    tile_rank_kind(tile, 0, others);
    for (uint32_t r = 0; r < tile->rows; r++) {
        struct route_row *row = &tile->row[r];
        if (!row->statistics.finite) continue;
        row_scale(tile, row); /* fills the shares */
        float largest = rule->gating == GATING_SIGMOID ? sigmoid(row->statistics.max) : 1.0f;
        row_merge(row, rule, &preferred[r], &others[r], strengths[r] * largest, row->ids);
        row_merge(row, rule, &preferred[r], &others[r], 0, row->truth);
    }
}

#endif
