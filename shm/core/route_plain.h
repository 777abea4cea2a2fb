/* The steps of one row in plain C: the oracle of the vector kernels, and the path of everything that is rare: rows with
 * NaN or infinities, sigmoid gates, groups, top-k above 8. */
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

/* What selection ranks an expert by whose logit is `z`: that, or its biased sigmoid. NaN and -inf stay what they are. */
static inline float plain_score(const struct route_rule *rule, const float *selection_bias, uint32_t expert, float z) {
    if (rule->gating != GATING_SIGMOID || isnan(z) || z == -INFINITY) return z;
    return sigmoid(z) + (selection_bias ? selection_bias[expert] : 0.0f);
}

/* The scores of the experts of `mask`, -inf elsewhere. */
static inline void plain_restrict(const float *scores, uint32_t count, const uint64_t *mask, float *adjusted) {
    for (uint32_t e = 0; e < count; e++) adjusted[e] = bit_test(mask, e) ? scores[e] : -INFINITY;
}

/* Group limit (DeepSeek): only the best `top_groups` groups take part; the scores of the others become NaN, which ranks
 * last. A group is as good as its best score (V2); of a sigmoid gate, as the sum of its two best (V3). */
static inline void limit_groups(const struct route_rule *rule, float *scores) {
    if (rule->top_groups >= rule->num_groups) return;
    float group_score[ROUTE_MAX_GROUPS];
    int32_t chosen[ROUTE_MAX_TOP_K];
    uint32_t size = rule->num_experts / rule->num_groups;
    for (uint32_t g = 0; g < rule->num_groups; g++) {
        float best = -INFINITY, second = -INFINITY;
        for (uint32_t e = g * size; e < (g + 1) * size; e++) {
            if (scores[e] > best) second = best, best = scores[e];
            else if (scores[e] > second) second = scores[e];
        }
        group_score[g] = rule->gating == GATING_SIGMOID && second > -INFINITY ? best + second : best;
    }
    select_top_k(group_score, rule->num_groups, rule->top_groups, chosen);
    uint64_t allowed = 0;
    for (uint32_t i = 0; i < rule->top_groups; i++) allowed |= UINT64_C(1) << chosen[i];
    for (uint32_t g = 0; g < rule->num_groups; g++)
        if (!(allowed >> g & 1))
            for (uint32_t e = g * size; e < (g + 1) * size; e++) scores[e] = NAN;
}

/* The scores, those of the experts of `mask` as if their logits were larger by `bonus`, within the best groups. */
static inline void plain_adjust(const struct route_rule *rule, const float *selection_bias, const float *logits,
                                const uint64_t *mask, float bonus, float *adjusted) {
    for (uint32_t e = 0; e < rule->num_experts; e++)
        adjusted[e] = plain_score(rule, selection_bias, e, logits[e] + (bit_test(mask, e) ? bonus : 0.0f));
    limit_groups(rule, adjusted);
}

#endif
