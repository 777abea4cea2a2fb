/* One row: the policies and gates, over the steps of route_plain.h and, where a kernel has lanes, route_vector.h.
 * ROUTE_VECTOR is 0 or 1, as the including kernel defines it. */
#ifndef HOTSET_ROUTE_ROW_H
#define HOTSET_ROUTE_ROW_H

#include "route_plain.h"
#if ROUTE_VECTOR
#include "route_vector.h"
#define ROUTE_PADDING NETWORK_SCORES
#else
#define ROUTE_PADDING 1u
#endif

#define ROUTE_ROW_SPACE (ROUTE_MAX_EXPERTS + 64)

/* Of one row; on the caller's stack, so that nothing is allocated. */
struct route_scratch {
    _Alignas(64) float padded[ROUTE_ROW_SPACE];   /* the logits, if their number is no multiple of eight */
    _Alignas(64) float adjusted[ROUTE_ROW_SPACE]; /* scores to select from; padded with -inf */
    _Alignas(64) float share[ROUTE_ROW_SPACE];    /* gate probability times a factor common to the row */
};

/* A row on its way. */
struct route_row {
    const struct route_rule *rule;
    struct route_scratch *scratch;
    const float *logits;
    struct row_statistics statistics;
    int vector;  /* whether the vector steps apply */
    float scale; /* of scratch->share; 0 = not computed yet */
};

static inline void route_scratch_begin(struct route_scratch *scratch, const struct route_rule *rule) {
    uint32_t padded = (rule->num_experts + ROUTE_PADDING - 1) / ROUTE_PADDING * ROUTE_PADDING;
    for (uint32_t e = rule->num_experts & ~7u; e < padded; e++) scratch->adjusted[e] = scratch->padded[e] = -INFINITY;
}

static inline void row_begin(struct route_row *row, const struct route_rule *rule, struct route_scratch *scratch,
                             const float *logits) {
    *row = (struct route_row){.rule = rule, .scratch = scratch, .logits = logits};
#if ROUTE_VECTOR
    row->vector = vector_statistics(logits, rule->num_experts, &row->statistics) && rule->gating != GATING_SIGMOID;
    if (row->vector && rule->num_experts % 8) {
        memcpy(scratch->padded, logits, rule->num_experts * sizeof *logits);
        row->logits = scratch->padded;
    }
    if (row->vector) return;
#endif
    row->statistics = plain_statistics(logits, rule->num_experts);
}

/* The factor that makes scratch->share probabilities, which are computed when they are first needed. */
static inline float row_shares(struct route_row *row) {
    if (row->scale != 0) return row->scale;
#if ROUTE_VECTOR
    if (row->vector)
        return row->scale = vector_shares(row->logits, row->rule->num_experts, row->statistics.max, row->scratch->share);
#endif
    return row->scale = plain_shares(row->rule, row->logits, &row->statistics, row->scratch->share);
}

static inline void row_select(const struct route_row *row, int32_t *ids) {
    const struct route_rule *rule = row->rule;
#if ROUTE_VECTOR
    if (row->vector && rule->top_k <= NETWORK_ROWS) {
        network_select(row->scratch->adjusted, rule->num_experts, rule->top_k, ids);
        return;
    }
#endif
    limit_groups(rule, row->scratch->adjusted);
    select_top_k(row->scratch->adjusted, rule->num_experts, rule->top_k, ids);
}

static inline void row_true_top_k(const struct route_row *row, int32_t *ids) {
#if ROUTE_VECTOR
    if (row->vector) vector_copy(row->logits, row->rule->num_experts, row->scratch->adjusted);
    else
#endif
        memcpy(row->scratch->adjusted, row->logits, row->rule->num_experts * sizeof *row->logits);
    row_select(row, ids);
}

static inline void row_adjusted_top_k(const struct route_row *row, const uint64_t *preferred, float bonus, int32_t *ids) {
#if ROUTE_VECTOR
    if (row->vector) vector_adjust(row->logits, row->rule->num_experts, preferred, bonus, row->scratch->adjusted);
    else
#endif
        plain_adjust(row->logits, row->rule->num_experts, preferred, bonus, row->scratch->adjusted);
    row_select(row, ids);
}

/* The best preferred experts; where there are fewer than top_k, others follow. With groups, of the groups that the
 * row's own scores select. */
static inline void row_preferred_top_k(const struct route_row *row, const uint64_t *preferred, int32_t *ids) {
    const struct route_rule *rule = row->rule;
    float *adjusted = row->scratch->adjusted;
#if ROUTE_VECTOR
    if (row->vector) {
        vector_restrict(row->logits, rule->num_experts, preferred, adjusted);
        row_select(row, ids);
        return;
    }
#endif
    plain_adjust(row->logits, rule->num_experts, preferred, 0, adjusted);
    limit_groups(rule, adjusted);
    plain_restrict(adjusted, rule->num_experts, preferred, adjusted);
    select_top_k(adjusted, rule->num_experts, rule->top_k, ids);
}

static inline int contains(const int32_t *ids, uint32_t count, int32_t id) {
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] == id) return 1;
    return 0;
}

/* POLICY_MASS: preferred experts, best first, take the places of those in the true top k that are not, worst first,
 * while the mass lost in all stays within `budget`. No other exchange of as many experts loses less. Those that stay
 * keep their order and the substitutes follow, for none of them ranks higher. */
static inline void row_mass_top_k(struct route_row *row, const uint64_t *preferred, float budget, const int32_t *truth,
                                  int32_t *ids) {
    int32_t substitutes[ROUTE_MAX_TOP_K], taken[ROUTE_MAX_TOP_K];
    uint32_t k = row->rule->top_k, count = 0, next = 0, kept = 0, removed = 0 /* bits of positions in truth */;
    float scale = row_shares(row), lost = 0;
    const float *share = row->scratch->share;
    row_preferred_top_k(row, preferred, substitutes);
    for (uint32_t i = k; i-- > 0;) {
        if (bit_test(preferred, (uint32_t)truth[i])) continue;
        while (next < k && contains(truth, k, substitutes[next])) next++;
        if (next == k || !bit_test(preferred, (uint32_t)substitutes[next])) break;
        if (isnan(row->scratch->adjusted[substitutes[next]])) break; /* in a group that is not selected */
        lost += (share[truth[i]] - share[substitutes[next]]) * scale;
        if (!(lost <= budget)) break;
        taken[count++] = substitutes[next++];
        removed |= UINT32_C(1) << i;
    }
    for (uint32_t i = 0; i < k; i++)
        if (!(removed >> i & 1)) ids[kept++] = truth[i];
    for (uint32_t i = 0; i < count; i++) ids[kept + i] = taken[i];
}

/* Mixing weights of the selected experts, from the unmodified logits. */
static inline void row_weights(struct route_row *row, const int32_t *ids, float *weights) {
    const struct route_rule *rule = row->rule;
    uint32_t k = rule->top_k;
    float scale;
    if (!rule->renormalize) {
        scale = row_shares(row);
        for (uint32_t i = 0; i < k; i++) weights[i] = row->scratch->share[ids[i]];
    } else {
        float max = -INFINITY;
        int finite = rule->gating != GATING_SIGMOID;
        for (uint32_t i = 0; i < k; i++) {
            float z = row->logits[ids[i]];
            weights[i] = z;
            max = z > max ? z : max;
            finite &= isfinite(z) != 0;
        }
        /* Relative to the largest selected logit, not to the row's: the selection may leave that one out. */
        for (uint32_t i = 0; i < k && finite; i++) weights[i] = softmax_exp(weights[i] - max);
        if (!finite) {
            row_shares(row);
            for (uint32_t i = 0; i < k; i++) weights[i] = row->scratch->share[ids[i]];
        }
        scale = 1.0f / canonical_sum(weights, k);
    }
    scale *= rule->weight_scale;
    for (uint32_t i = 0; i < k; i++) weights[i] *= scale;
}

/* Whether `ids` is the true top k without having computed that: nothing but it reaches its least logit. A tie there
 * says no, and the selection is compared in full. */
static inline int row_is_true_top_k(const struct route_row *row, const int32_t *ids) {
    const struct route_rule *rule = row->rule;
    if (rule->gating == GATING_SIGMOID) return 0;
    float least = INFINITY;
    for (uint32_t i = 0; i < rule->top_k; i++) {
        float z = row->logits[ids[i]];
        if (!(z > -INFINITY)) return 0;
        least = z < least ? z : least;
    }
#if ROUTE_VECTOR
    if (row->vector) return vector_count_at_least(row->logits, rule->num_experts, least) == rule->top_k;
#endif
    return plain_count_at_least(row->logits, rule->num_experts, least) == rule->top_k;
}

/* What the cache preference changed in this row. */
static inline void row_report(struct route_row *row, const uint64_t *preferred, const int32_t *truth, const int32_t *ids,
                              struct route_tally *tally) {
    uint32_t k = row->rule->top_k;
    float scale = row_shares(row), lost = 0;
    const float *share = row->scratch->share;
    for (uint32_t i = 0; i < k; i++) {
        if (contains(ids, k, truth[i])) continue;
        lost += share[truth[i]] * scale;
        tally->changed++;
        if (!bit_test(preferred, (uint32_t)truth[i])) bit_set(tally->displaced, (uint32_t)truth[i]);
    }
    for (uint32_t i = 0; i < k; i++)
        if (!contains(truth, k, ids[i])) lost -= share[ids[i]] * scale;
    tally->lost_mass += lost;
}

static inline void row_prefetch(struct route_row *row, const uint64_t *resident, const int32_t *ids,
                                struct route_tally *tally) {
    const struct route_rule *rule = row->rule;
    float scale = row_shares(row);
    for (uint32_t e = 0; e < rule->num_experts; e++)
        if (row->scratch->share[e] * scale >= rule->prefetch_threshold && !bit_test(resident, e) &&
            !contains(ids, rule->top_k, (int32_t)e))
            bit_set(tally->prefetch, e);
}

/* Moves the running mean of max - min by one row. The first row seeds it. */
static inline void range_update(struct route_tally *tally, float spread) {
    if (!isfinite(spread)) return;
    int seeds = tally->range == 0;
    float rate = seeds ? 1.0f : ROUTE_RANGE_RATE;
    tally->range = seeds ? spread : tally->range + rate * (spread - tally->range);
    tally->range_gain *= 1.0f - rate;
    tally->range_shift = tally->range_shift * (1.0f - rate) + rate * spread;
    tally->range_updates++;
}

/* A row without any finite logit: the order still holds (+inf first), but there is nothing to weigh. */
static inline void row_without_finite(const struct route_row *row, int32_t *ids, float *weights) {
    const struct route_rule *rule = row->rule;
    int ordered = row->statistics.positive_infinite > 0;
    if (ordered) select_top_k(row->logits, rule->num_experts, rule->top_k, ids);
    for (uint32_t i = 0; i < rule->top_k; i++) {
        if (!ordered) ids[i] = (int32_t)i;
        weights[i] = rule->weight_scale / (float)rule->top_k;
    }
}

static inline void route_row(const struct route_rule *rule, const struct route_call *call,
                             const struct route_snapshot *snapshot, struct route_scratch *scratch, const float *logits,
                             float strength, int32_t *ids, float *weights, struct route_tally *tally) {
    const uint64_t *preferred = snapshot->preferred;
    int32_t truth[ROUTE_MAX_TOP_K];
    struct route_row row;
    row_begin(&row, rule, scratch, logits);
    tally->nan_logits += row.statistics.nan;
    if (!row.statistics.finite) {
        tally->rows_without_finite++;
        row_without_finite(&row, ids, weights);
        return;
    }
    switch (call->policy) {
    case POLICY_BONUS:
        row_adjusted_top_k(&row, preferred, strength, ids);
        if (!row_is_true_top_k(&row, ids)) {
            row_true_top_k(&row, truth);
            row_report(&row, preferred, truth, ids, tally);
        }
        break;
    case POLICY_RANGE: {
        uint64_t favoured[ROUTE_WORDS];
        memcpy(favoured, preferred, sizeof favoured);
        row_true_top_k(&row, truth);
        for (uint32_t i = 0; i < rule->keep_top; i++) bit_set(favoured, (uint32_t)truth[i]);
        range_update(tally, row.statistics.max - row.statistics.min);
        row_adjusted_top_k(&row, favoured, strength * tally->range, ids);
        row_report(&row, preferred, truth, ids, tally);
        break;
    }
    case POLICY_MASS:
        row_true_top_k(&row, truth);
        row_mass_top_k(&row, preferred, strength, truth, ids);
        row_report(&row, preferred, truth, ids, tally);
        break;
    default:
        row_true_top_k(&row, ids);
    }
    row_weights(&row, ids, weights);
    if (call->want_prefetch) row_prefetch(&row, snapshot->resident, ids, tally);
}

#endif
