/* One row in plain C: the oracle of the vector kernels, and the path of everything that is rare: rows with NaN or
 * infinities, top-k above 8, sigmoid gates. */
#ifndef HOTSET_ROUTE_ROW_H
#define HOTSET_ROUTE_ROW_H

#include "route_softmax.h"

#include <math.h>

/* Of one row; kept by the caller so that nothing is allocated. */
struct route_scratch {
    _Alignas(64) float adjusted[ROUTE_MAX_EXPERTS];
    _Alignas(64) float share[ROUTE_MAX_EXPERTS]; /* gate probability times a factor common to the row */
};

struct row_statistics {
    float max, min; /* of the finite logits */
    uint32_t finite, positive_infinite, nan;
};

static inline struct row_statistics row_statistics(const float *logits, uint32_t count) {
    struct row_statistics s = {-INFINITY, INFINITY, 0, 0, 0};
    for (uint32_t e = 0; e < count; e++) {
        float z = logits[e];
        if (isfinite(z)) {
            s.max = z > s.max ? z : s.max;
            s.min = z < s.min ? z : s.min;
            s.finite++;
        } else if (isnan(z)) s.nan++;
        else s.positive_infinite += z > 0;
    }
    return s;
}

/* Fills `share`; the factor that makes it probabilities over all experts. NaN and -inf have none; beside +inf
 * nothing else has. */
static inline float row_shares(const struct route_rule *rule, const float *logits, const struct row_statistics *s,
                               float *share) {
    for (uint32_t e = 0; e < rule->num_experts; e++) {
        float z = logits[e];
        if (isnan(z) || z == -INFINITY) share[e] = 0;
        else if (rule->gating == GATING_SIGMOID) share[e] = sigmoid(z);
        else if (s->positive_infinite) share[e] = z == INFINITY;
        else share[e] = softmax_exp(z - s->max);
    }
    return 1.0f / canonical_sum(share, rule->num_experts);
}

/* Group limit (DeepSeek): only the `top_groups` groups with the largest sum of their two best sigmoid scores take
 * part; the scores of the others become NaN, which ranks last. */
static inline void limit_groups(const struct route_rule *rule, float *scores) {
    if (rule->gating != GATING_SIGMOID || rule->top_groups >= rule->num_groups) return;
    float group_score[ROUTE_MAX_GROUPS];
    int32_t chosen[ROUTE_MAX_GROUPS];
    uint32_t size = rule->num_experts / rule->num_groups;
    for (uint32_t g = 0; g < rule->num_groups; g++) {
        float best = 0, second = 0;
        for (uint32_t e = g * size; e < (g + 1) * size; e++) {
            float score = isnan(scores[e]) ? 0 : sigmoid(scores[e]);
            if (score > best) second = best, best = score;
            else if (score > second) second = score;
        }
        group_score[g] = best + second;
    }

    select_top_k(group_score, rule->num_groups, rule->top_groups, chosen);
    uint64_t allowed = 0;
    for (uint32_t i = 0; i < rule->top_groups; i++) allowed |= UINT64_C(1) << chosen[i];
    for (uint32_t g = 0; g < rule->num_groups; g++)
        if (!(allowed >> g & 1))
            for (uint32_t e = g * size; e < (g + 1) * size; e++) scores[e] = NAN;
}

static inline void row_true_top_k(const struct route_rule *rule, const float *logits, struct route_scratch *scratch,
                                  int32_t *ids) {
    memcpy(scratch->adjusted, logits, rule->num_experts * sizeof(float));
    limit_groups(rule, scratch->adjusted);
    select_top_k(scratch->adjusted, rule->num_experts, rule->top_k, ids);
}

static inline void row_adjusted_top_k(const struct route_rule *rule, const float *logits, const uint64_t *preferred,
                                      float bonus, struct route_scratch *scratch, int32_t *ids) {
    for (uint32_t e = 0; e < rule->num_experts; e++)
        scratch->adjusted[e] = logits[e] + (bit_test(preferred, e) ? bonus : 0.0f);
    limit_groups(rule, scratch->adjusted);
    select_top_k(scratch->adjusted, rule->num_experts, rule->top_k, ids);
}

static inline int contains(const int32_t *ids, uint32_t count, int32_t id) {
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] == id) return 1;
    return 0;
}

/* POLICY_MASS: `ids` holds the true top k. `substitutes`, the best preferred experts, take the places of the least
 * probable that are not preferred, best against least, while the mass lost in all stays within the budget. No other
 * exchange of as many experts loses less. Kept experts stay in order, substitutes follow: none of them ranks higher. */
static inline void substitute_within_mass(const struct route_rule *rule, const uint64_t *preferred, const float *share,
                                          float scale, float budget, const int32_t *substitutes, uint32_t available,
                                          int32_t *ids) {
    int32_t taken[ROUTE_MAX_TOP_K];
    uint32_t count = 0, next = 0, kept = 0, k = rule->top_k;
    float lost = 0;
    uint32_t removed = 0; /* bits of positions in ids */
    for (uint32_t i = k; i-- > 0;) {
        if (bit_test(preferred, (uint32_t)ids[i])) continue;
        while (next < available && contains(ids, k, substitutes[next])) next++;
        if (next == available) break;
        lost += (share[ids[i]] - share[substitutes[next]]) * scale;
        if (!(lost <= budget)) break;
        taken[count++] = substitutes[next++];
        removed |= UINT32_C(1) << i;
    }
    for (uint32_t i = 0; i < k; i++)
        if (!(removed >> i & 1)) ids[kept++] = ids[i];
    for (uint32_t i = 0; i < count; i++) ids[kept + i] = taken[i];
}

static inline void row_mass_top_k(const struct route_rule *rule, const uint64_t *preferred,
                                  float budget, const float *share, float scale, struct route_scratch *scratch,
                                  int32_t *ids) {
    int32_t substitutes[ROUTE_MAX_TOP_K];
    uint32_t available = 0;
    /* scratch->adjusted holds the logits as row_true_top_k() left them, with the excluded groups NaN */
    for (uint32_t e = 0; e < rule->num_experts; e++) {
        if (!bit_test(preferred, e)) scratch->adjusted[e] = NAN;
        else available += !isnan(scratch->adjusted[e]);
    }
    select_top_k(scratch->adjusted, rule->num_experts, rule->top_k, substitutes);
    substitute_within_mass(rule, preferred, share, scale, budget, substitutes,
                           available < rule->top_k ? available : rule->top_k, ids);
}

/* Mixing weights of the selected experts, from the unmodified logits. */
static inline void row_weights(const struct route_rule *rule, const float *logits, const int32_t *ids,
                               const float *share, float scale, float *weights) {
    uint32_t k = rule->top_k;
    for (uint32_t i = 0; i < k; i++) weights[i] = share[ids[i]];
    if (rule->renormalize) {
        if (rule->gating != GATING_SIGMOID) {
            /* Relative to the largest selected logit, not to the row's: the selection may leave that one out. */
            float max = -INFINITY;
            int finite = 1;
            for (uint32_t i = 0; i < k; i++) {
                max = logits[ids[i]] > max ? logits[ids[i]] : max;
                finite &= isfinite(logits[ids[i]]) != 0;
            }
            for (uint32_t i = 0; finite && i < k; i++) weights[i] = softmax_exp(logits[ids[i]] - max);
        }
        scale = 1.0f / canonical_sum(weights, k);
    }
    scale *= rule->weight_scale;
    for (uint32_t i = 0; i < k; i++) weights[i] *= scale;
}

/* Moves the running mean of max - min by one row. The first row seeds it. */
static inline void range_update(struct route_tally *tally, float spread) {
    if (!(spread <= 3.402823466e38f)) return;
    int seeds = tally->range == 0;
    float rate = seeds ? 1.0f : ROUTE_RANGE_RATE;
    tally->range = seeds ? spread : tally->range + rate * (spread - tally->range);
    tally->range_gain *= 1.0f - rate;
    tally->range_shift = tally->range_shift * (1.0f - rate) + rate * spread;
    tally->range_updates++;
}

/* Compares the selection with the true top k. */
static inline void row_report(const struct route_rule *rule, const uint64_t *preferred, const float *share, float scale,
                              const int32_t *truth, const int32_t *ids, struct route_tally *tally) {
    float lost = 0;
    for (uint32_t i = 0; i < rule->top_k; i++) {
        if (contains(ids, rule->top_k, truth[i])) continue;
        lost += share[truth[i]] * scale;
        tally->changed++;
        if (!bit_test(preferred, (uint32_t)truth[i])) bit_set(tally->displaced, (uint32_t)truth[i]);
    }
    for (uint32_t i = 0; i < rule->top_k; i++)
        if (!contains(truth, rule->top_k, ids[i])) lost -= share[ids[i]] * scale;
    tally->lost_mass += lost;
}

static inline void row_prefetch(const struct route_rule *rule, const uint64_t *resident, const float *share, float scale,
                                const int32_t *ids, struct route_tally *tally) {
    for (uint32_t e = 0; e < rule->num_experts; e++)
        if (share[e] * scale >= rule->prefetch_threshold && !bit_test(resident, e) &&
            !contains(ids, rule->top_k, (int32_t)e))
            bit_set(tally->prefetch, e);
}

/* A row without any finite logit: the order still holds (+inf first), but there is nothing to weigh. */
static inline void route_row_without_finite(const struct route_rule *rule, const float *logits,
                                            const struct row_statistics *s, int32_t *ids, float *weights) {
    if (s->positive_infinite) select_top_k(logits, rule->num_experts, rule->top_k, ids);
    for (uint32_t i = 0; i < rule->top_k; i++) {
        if (!s->positive_infinite) ids[i] = (int32_t)i;
        weights[i] = rule->weight_scale / (float)rule->top_k;
    }
}

static inline void route_row(const struct route_rule *rule, const struct route_call *call,
                             const struct route_snapshot *snapshot, struct route_scratch *scratch, const float *logits,
                             float strength, int32_t *ids, float *weights, struct route_tally *tally) {
    struct row_statistics s = row_statistics(logits, rule->num_experts);
    tally->nan_logits += s.nan;
    if (!s.finite) {
        tally->rows_without_finite++;
        route_row_without_finite(rule, logits, &s, ids, weights);
        return;
    }
    const uint64_t *preferred = snapshot->preferred;
    float scale = row_shares(rule, logits, &s, scratch->share);
    int32_t truth[ROUTE_MAX_TOP_K];
    row_true_top_k(rule, logits, scratch, truth);
    switch (call->policy) {
    case POLICY_BONUS:
        row_adjusted_top_k(rule, logits, preferred, strength, scratch, ids);
        break;
    case POLICY_RANGE: {
        uint64_t favoured[ROUTE_WORDS];
        memcpy(favoured, preferred, sizeof favoured);
        for (uint32_t i = 0; i < rule->keep_top; i++) bit_set(favoured, (uint32_t)truth[i]);
        range_update(tally, s.max - s.min);
        row_adjusted_top_k(rule, logits, favoured, strength * tally->range, scratch, ids);
        break;
    }
    case POLICY_MASS:
        memcpy(ids, truth, rule->top_k * sizeof *ids);
        row_mass_top_k(rule, preferred, strength, scratch->share, scale, scratch, ids);
        break;
    default:
        memcpy(ids, truth, rule->top_k * sizeof *ids);
    }
    row_weights(rule, logits, ids, scratch->share, scale, weights);
    row_report(rule, preferred, scratch->share, scale, truth, ids, tally);
    if (call->want_prefetch) row_prefetch(rule, snapshot->resident, scratch->share, scale, ids, tally);
}

#endif
