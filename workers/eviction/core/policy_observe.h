/* How a policy learns from demand records: who was used, what td makes of it, and whether its guard lets it decide. */
#ifndef HOTSET_POLICY_OBSERVE_H
#define HOTSET_POLICY_OBSERVE_H

#include "policy_values.h"

/* The distinct experts of a record become the latest demand. */
static inline void policy_collect(struct policy *policy, const uint16_t *record) {
    for (uint32_t i = 0; i < policy->count; i++) policy->member[policy->experts[i]] = 0;
    policy->count = 0;
    policy->layer = record[DEMAND_LAYER];
    uint32_t width = record[DEMAND_EXPERTS] + 1u;
    const uint16_t *row = record + DEMAND_HEADER_WORDS;
    for (uint32_t i = 0; i < record[DEMAND_ROWS]; i++, row += width)
        for (uint32_t j = 1; j < width; j++)
            if (!policy->member[row[j]]) {
                policy->member[row[j]] = 1;
                policy->experts[policy->count++] = row[j];
            }
}

/* ---- the guard */

static inline double guard_hit_rate(struct policy *policy, struct pool *pool, const double *value, int calibrated,
                                    double rate) {
    size_t first = (size_t)policy->layer * policy->num_experts;
    uint32_t hits = pool_hits(pool, 0, policy->experts, policy->count);
    const struct pool_order order = {value + first, policy->last_used + first};
    pool_admit(pool, 0, policy->experts, policy->count, order, policy_kept(policy, calibrated));
    return rate + ((double)hits / policy->count - rate) / policy->guard.steps;
}

/* Whether what TD learned decides, from now on. Weights that came from an earlier run lead at once if they did then, until
 * the guard sees that they should not. */
static inline void policy_lead(struct policy *policy, int td_leads) {
    policy->guard.td_leads = td_leads;
    policy->value = policy_values(policy);
}

/* Before TD learns from the demand the shadows are asked whether they have its experts. */
static inline void policy_guard(struct policy *policy) {
    struct guard *guard = &policy->guard;
    if (policy->layer % guard->every || !policy->count) return;
    uint32_t index = policy->layer / guard->every;
    policy_value_td(policy, policy->layer);
    if (guard->steps < GUARD_STEPS) guard->steps++;
    guard->td_rate = guard_hit_rate(policy, &guard->td[index], policy->td_value, 1, guard->td_rate);
    guard->affinity_rate = guard_hit_rate(policy, &guard->affinity[index], policy->affinity, 0, guard->affinity_rate);
    double ahead = guard->td_rate - guard->affinity_rate;
    int leads = guard->td_leads ? ahead > -GUARD_MARGIN : ahead > GUARD_MARGIN;
    if (leads != guard->td_leads) policy_lead(policy, leads);
}

/* ---- what is fed */

/* The token that TD learns from after row number `i` of a record; 0 if it learns from none then. `next`: the record that
 * comes next, or NULL if that is not known; then the next layer's is expected. */
static inline int policy_next_token(const struct policy *policy, const uint16_t *record, uint32_t i,
                                    const uint16_t *next, struct td_token *token) {
    const uint32_t count = record[DEMAND_EXPERTS];
    const uint16_t *row = record + DEMAND_HEADER_WORDS + i * (count + 1u);
    if (i + 1 < record[DEMAND_ROWS]) {
        row += count + 1u;
        *token = (struct td_token){row[0], record[DEMAND_LAYER], count, row + 1};
    } else if (next && next[DEMAND_ROWS]) {
        row = next + DEMAND_HEADER_WORDS;
        *token = (struct td_token){row[0], next[DEMAND_LAYER], next[DEMAND_EXPERTS], row + 1};
    } else {
        *token = (struct td_token){row[0], (record[DEMAND_LAYER] + 1u) % policy->num_layers, 0, row + 1};
    }
    return token->stream < policy->num_streams && token->count <= TD_MAX_TOP_K;
}

static inline void policy_learn(struct policy *policy, const uint16_t *record, const uint16_t *next) {
    uint32_t layer = policy->layer, count = record[DEMAND_EXPERTS];
    const uint16_t *row = record + DEMAND_HEADER_WORDS;
    for (uint32_t i = 0; i < record[DEMAND_ROWS]; i++, row += count + 1u) {
        if (row[0] >= policy->num_streams || count > TD_MAX_TOP_K) continue; /* a set, not one token's choice */
        struct td_token token;
        const int follows = policy_next_token(policy, record, i, next, &token);
        policy->stream_seen[(size_t)row[0] * policy->num_layers + layer] = policy->layer_steps[layer];
        policy->batch = record[DEMAND_ROWS];
        policy->kernels.observe(&policy->td, row[0], layer, row + 1, count, record[DEMAND_ROWS],
                                follows ? &token : NULL);
    }
    policy->stale[layer] = 1;
    policy_guard(policy);
}

/* Shows the policy one record, which has been checked (demand_problem), as has the `next` one, unless NULL. */
static inline void policy_observe(struct policy *policy, const uint16_t *record, const uint16_t *next) {
    policy_collect(policy, record);
    uint32_t layer = policy->layer;
    size_t first = (size_t)layer * policy->num_experts;
    policy->steps++;
    policy->layer_steps[layer]++;
    double seen = policy->steps < POLICY_CROWD_RATE ? (double)policy->steps : POLICY_CROWD_RATE;
    policy->distinct += ((double)policy->count - policy->distinct) / seen;
    policy_decay(policy, layer);
    const double boost = (1 - POLICY_DECAY) / policy->affinity_unit[layer];
    for (uint32_t i = 0; i < policy->count; i++) {
        const size_t id = first + policy->experts[i];
        policy->affinity[id] += boost;
        policy->last_used[id] = policy->steps;
    }
    if (policy->base == POLICY_LFU || policy->base == POLICY_ADAPTIVE)
        for (uint32_t i = 0; i < policy->count; i++) policy->uses[first + policy->experts[i]]++;
    if (policy->base == POLICY_TD) policy_learn(policy, record, next);
    policy_value(policy);
}

#endif
