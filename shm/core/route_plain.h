/* The steps of one row in plain C: the oracle of the vector kernels, and the path of everything that is rare: rows with
 * NaN or infinities, sigmoid gates, top-k above 8. */
#ifndef HOTSET_ROUTE_PLAIN_H
#define HOTSET_ROUTE_PLAIN_H

#include "route_softmax.h"

#include <float.h>
#include <math.h>

struct row_statistics {
    float max, min; /* of the finite logits */
    uint32_t finite, positive_infinite, nan;
};

static inline struct row_statistics plain_statistics(const float *logits, uint32_t count) {
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

/* Fills `share`; returns the factor that makes it probabilities over all experts. NaN and -inf have none; beside +inf
 * nothing else has. */
static inline float plain_shares(const struct route_rule *rule, const float *logits, const struct row_statistics *s,
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

/* The logits, `bonus` added to the experts of `mask`. */
static inline void plain_adjust(const float *logits, uint32_t count, const uint64_t *mask, float bonus, float *adjusted) {
    for (uint32_t e = 0; e < count; e++) adjusted[e] = logits[e] + (bit_test(mask, e) ? bonus : 0.0f);
}

/* The logits of the experts of `mask`, -inf elsewhere. */
static inline void plain_restrict(const float *logits, uint32_t count, const uint64_t *mask, float *adjusted) {
    for (uint32_t e = 0; e < count; e++) adjusted[e] = bit_test(mask, e) ? logits[e] : -INFINITY;
}

/* Group limit (DeepSeek): only the `top_groups` groups with the largest sum of their two best sigmoid scores take
 * part; the scores of the others become NaN, which ranks last. */
static inline void limit_groups(const struct route_rule *rule, float *scores) {
    if (rule->gating != GATING_SIGMOID || rule->top_groups >= rule->num_groups) return;
    float group_score[ROUTE_MAX_GROUPS];
    int32_t chosen[ROUTE_MAX_TOP_K];
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

#endif
