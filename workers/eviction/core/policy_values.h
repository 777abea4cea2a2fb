/* What a policy's experts are worth: values of one layer, and what experts of all layers are compared by. */
#ifndef HOTSET_POLICY_VALUES_H
#define HOTSET_POLICY_VALUES_H

#include "policy.h"

static inline int policy_prefers_frequency(const struct policy *policy, const double *uses) {
    if (policy->base != POLICY_ADAPTIVE) return policy->base == POLICY_LFU;
    double least = uses[0], most = uses[0];
    for (uint32_t e = 1; e < policy->num_experts; e++) {
        least = uses[e] < least ? uses[e] : least;
        most = uses[e] > most ? uses[e] : most;
    }
    return most >= POLICY_ADAPTIVE_RATIO * least;
}

/* Bases that are compared with each other, or blended, are brought to 0 ... 1 first. */
static inline void policy_value_blend(struct policy *policy, uint32_t layer) {
    size_t first = (size_t)layer * policy->num_experts;
    const double *uses = policy->uses + first;
    int frequency = policy_prefers_frequency(policy, uses);
    const uint64_t *last_used = policy->last_used + first;
    double most = 1, weight = policy->affinity_weight, unit = policy->affinity_unit[layer];
    uint64_t oldest = policy->steps;
    for (uint32_t e = 0; e < policy->num_experts; e++) {
        most = uses[e] > most ? uses[e] : most;
        oldest = last_used[e] < oldest ? last_used[e] : oldest;
    }
    double longest = policy->steps > oldest ? (double)(policy->steps - oldest) : 1;
    for (uint32_t e = 0; e < policy->num_experts; e++) {
        double base = frequency ? uses[e] / most : (double)(last_used[e] - oldest) / longest;
        policy->blend[first + e] = (1 - weight) * base + weight * unit * policy->affinity[first + e];
    }
}

/* What the streams that the layer has seen lately want, together. */
static inline void policy_value_td(const struct policy *policy, uint32_t layer) {
    uint32_t count = 0;
    for (uint32_t s = 0; s < policy->num_streams; s++) {
        uint64_t seen = policy->stream_seen[(size_t)s * policy->num_layers + layer];
        if (seen && policy->layer_steps[layer] - seen < POLICY_IDLE_STEPS) policy->live[count++] = (uint16_t)s;
    }
    policy->kernels.combine(&policy->td, layer, policy->live, count,
                            policy->td_value + (size_t)layer * policy->num_experts);
    policy->stale[layer] = 0;
}

/* To be called before `value` of a layer is looked at: TD's are computed only when they count. */
static inline void policy_fresh(const struct policy *policy, uint32_t layer) {
    if (policy->stale[layer] && policy->value == policy->td_value) policy_value_td(policy, layer);
}

/* What experts of all layers are compared by, [layers][experts]. */
static inline void policy_worth(const struct policy *policy, double *worth) {
    for (uint32_t layer = 0; layer < policy->num_layers; layer++) {
        const size_t first = (size_t)layer * policy->num_experts;
        const double nearness = policy_nearness(policy, layer);
        policy_fresh(policy, layer);
        for (size_t e = first; e < first + policy->num_experts; e++) worth[e] = policy->value[e] * nearness;
    }
}

static inline int policy_is_blend(const struct policy *policy) {
    return policy->value == policy->blend && (policy->base == POLICY_ADAPTIVE || policy->affinity_weight > 0);
}

/* After a demand. */
static inline void policy_value(struct policy *policy) {
    if (policy->value != policy->blend) return;
    if (policy_is_blend(policy)) {
        policy_value_blend(policy, policy->layer);
        return;
    }
    const size_t first = (size_t)policy->layer * policy->num_experts;
    for (uint32_t i = 0; i < policy->count; i++) {
        const size_t id = first + policy->experts[i];
        policy->blend[id] = policy->base == POLICY_LRU ? (double)policy->last_used[id] : policy->uses[id];
    }
}

/* ---- affinity */

/* All of a layer's affinities decay when their unit does, so that a step touches those of its own experts only. Before
 * the unit is too small the affinities are brought back to 1. */
static inline void policy_decay(struct policy *policy, uint32_t layer) {
    double *unit = policy->affinity_unit + layer, *affinity = policy->affinity + (size_t)layer * policy->num_experts;
    *unit *= POLICY_DECAY;
    if (*unit > POLICY_LEAST_UNIT) return;
    for (uint32_t e = 0; e < policy->num_experts; e++)
        affinity[e] = affinity[e] * *unit > POLICY_NEVER ? affinity[e] * *unit : 0;
    *unit = 1;
}

/* [layers][experts]: what an earlier run knew. */
static inline void policy_seed_affinity(struct policy *policy, const double *affinity) {
    memcpy(policy->affinity, affinity, sizeof(double) * policy->num_layers * policy->num_experts);
    for (uint32_t layer = 0; layer < policy->num_layers; layer++) {
        policy->affinity_unit[layer] = 1;
        if (policy_is_blend(policy)) policy_value_blend(policy, layer);
    }
}

#endif
