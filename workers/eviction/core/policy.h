/* Eviction policies: how much each expert is worth keeping, from the demands that the policy has been shown.
 *
 * A policy is fed demand records (shm/core/demands.h) and keeps `value` current: whoever needs a slot takes it from
 * the resident expert of least value. The pager and the replay use the same policies.
 *
 *   LRU       when it was used last
 *   LFU       how often it was used
 *   ADAPTIVE  LFU while the most used expert of a layer has 3 times the uses of the least, else LRU
 *   AFFINITY  an exponential moving average of its use, 1/32 per step of the layer
 *   TD        a learned estimate of how soon it is used again (td.h), with the affinity as a guard
 *
 * The first three can be blended with affinity: (1 - weight) * base + weight * affinity, each from 0 to 1.
 *
 * One pool for all layers. Where values mean the same in every layer (TD's a discounted probability, LRU's a time), a
 * layer may fall to a quarter of its share of the slots before it stops losing experts to others; where they do not,
 * only what is beyond its whole share is up for comparison: on gpt-oss at 25 % affinity hits 69.2 % so, 67.8 with a
 * quarter. TD's estimates are of the layer's last step; since then its next has come nearer, which is a discount less:
 * 74.0 %, 73.8 without.
 *
 * Admission. A missed expert has to be read for its step in any case. ALWAYS keeps it and evicts another; BYPASS
 * lets it go at once when it is worth less than every resident one. AUTO bypasses for calibrated values (TD), and
 * for the others when a layer's steps need more than POLICY_CROWDED of its share of the slots. */
#ifndef HOTSET_POLICY_H
#define HOTSET_POLICY_H

#include "demands.h"
#include "pool.h"
#include "td.h"

_Static_assert(TD_MAX_EXPERTS <= POOL_MAX_EXPERTS, "a pool holds a layer's experts");

#define POLICY_DECAY (31 / 32.)
#define POLICY_LEAST_UNIT 1e-30 /* see policy_decay */
#define POLICY_NEVER 1e-100     /* affinities below are 0: processors are slow with numbers that are much smaller */
#define POLICY_ADAPTIVE_RATIO 3
#define POLICY_FLOOR 0.25       /* of a layer's share of the slots, where values can be compared between layers */
#define POLICY_CROWDED 0.55     /* distinct experts per step / slots per layer */
#define POLICY_CROWD_RATE 256.  /* steps over which that is averaged */
#define POLICY_IDLE_STEPS 8u    /* a stream that a layer has not seen for so many steps wants nothing any more */
#define GUARD_LAYERS 4u         /* that are simulated at most, and ... */
#define GUARD_EVERY 4u          /* ... at most every fourth: all of them would cost more than learning does */
#define GUARD_STEPS 2048.       /* of the guarded layers, over which their hit rates are averaged */
#define GUARD_MARGIN 0.002      /* by which the other must be ahead to take over */

enum policy_base { POLICY_LRU, POLICY_LFU, POLICY_ADAPTIVE, POLICY_AFFINITY, POLICY_TD, POLICY_BASES };
enum policy_admission { ADMIT_AUTO, ADMIT_ALWAYS, ADMIT_BYPASS, ADMISSIONS };

/* Two caches of a layer's share of the slots, one kept by TD and one by affinity: which of the two hits more? */
struct guard {
    uint32_t every; /* layers 0, every, 2 * every ... are simulated */
    uint32_t count;
    struct pool td[GUARD_LAYERS], affinity[GUARD_LAYERS];
    double steps, td_rate, affinity_rate;
    int td_leads;
};

struct policy {
    uint32_t num_layers, num_experts, num_streams;
    enum policy_base base;
    enum policy_admission admission;
    double affinity_weight;
    double slots_per_layer;
    uint64_t steps;       /* demands seen, of all layers */
    double distinct;      /* running mean of the experts per demand */
    uint64_t *layer_steps;/* [layers] */
    const double *value;  /* [layers][experts]; what the resident experts are compared by: one of the next three */
    double *blend;        /* [layers][experts]; of the bases that have no values of their own below */
    double *affinity;     /* [layers][experts], in units of ... */
    double *affinity_unit;/* [layers] */
    double *td_value;     /* [layers][experts]; if base is TD. Of layers with a demand that nobody asked about yet, ... */
    uint8_t *stale;       /* [layers]: ... it is still of an earlier one: see policy_fresh */
    uint64_t *last_used;  /* [layers][experts]: `steps` then */
    double *uses;         /* [layers][experts] */
    uint64_t *stream_seen;/* [streams][layers]: layer_steps then */
    uint16_t *live;       /* [streams]: those that want something of the layer that is valued */
    /* The latest demand. */
    uint32_t layer, count;
    uint16_t experts[TD_MAX_EXPERTS]; /* distinct */
    uint8_t *member;                  /* [experts] */
    struct td_kernels kernels;        /* for this processor */
    struct td td;                     /* if base is TD */
    uint32_t batch;                   /* tokens of the latest step */
    struct guard guard;
};

static inline void policy_free(struct policy *policy) {
    free(policy->layer_steps);
    free(policy->blend);
    free(policy->last_used);
    free(policy->uses);
    free(policy->affinity);
    free(policy->affinity_unit);
    free(policy->stream_seen);
    free(policy->live);
    free(policy->member);
    free(policy->td_value);
    free(policy->stale);
    td_free(&policy->td);
    for (uint32_t i = 0; i < GUARD_LAYERS; i++) {
        pool_free(&policy->guard.td[i]);
        pool_free(&policy->guard.affinity[i]);
    }
}

static inline int guard_init(struct guard *guard, uint32_t num_layers, uint32_t num_experts, double slots_per_layer) {
    uint32_t slots = slots_per_layer < 1 ? 1 : (uint32_t)(slots_per_layer + 0.5);
    uint32_t apart = (num_layers + GUARD_LAYERS - 1) / GUARD_LAYERS;
    guard->every = apart < GUARD_EVERY ? GUARD_EVERY : apart;
    guard->count = (num_layers + guard->every - 1) / guard->every;
    for (uint32_t i = 0; i < guard->count; i++)
        if (!pool_init(&guard->td[i], 1, num_experts, slots) ||
            !pool_init(&guard->affinity[i], 1, num_experts, slots))
            return 0;
    return 1;
}

static inline int policy_td_leads(const struct policy *policy) {
    return policy->base == POLICY_TD && policy->guard.td_leads;
}

/* Which values count now. */
static inline const double *policy_values(const struct policy *policy) {
    if (policy_td_leads(policy)) return policy->td_value;
    int is_affinity = policy->base == POLICY_TD || policy->base == POLICY_AFFINITY;
    return is_affinity ? policy->affinity : policy->blend;
}

/* 0 when there is not enough memory. The caller has set the numbers and the choices; everything else is zero. */
static inline int policy_init(struct policy *policy) {
    size_t places = (size_t)policy->num_layers * policy->num_experts;
    policy->kernels = td_best_kernels();
    policy->layer_steps = calloc(policy->num_layers, sizeof(uint64_t));
    policy->blend = calloc(places, sizeof(double));
    policy->last_used = calloc(places, sizeof(uint64_t));
    policy->uses = calloc(places, sizeof(double));
    policy->affinity = calloc(places, sizeof(double));
    policy->affinity_unit = malloc(policy->num_layers * sizeof(double));
    policy->stream_seen = calloc((size_t)policy->num_streams * policy->num_layers, sizeof(uint64_t));
    policy->live = calloc(policy->num_streams, sizeof(uint16_t));
    policy->member = calloc(policy->num_experts, 1);
    policy->td_value = calloc(places, sizeof(double));
    policy->stale = calloc(policy->num_layers, 1);
    policy->value = policy_values(policy);
    if (!(policy->layer_steps && policy->blend && policy->last_used && policy->uses && policy->affinity &&
          policy->affinity_unit && policy->stream_seen && policy->live && policy->member && policy->td_value &&
          policy->stale))
        return 0;
    for (uint32_t layer = 0; layer < policy->num_layers; layer++) policy->affinity_unit[layer] = 1;
    if (policy->base != POLICY_TD) return 1;
    return td_init(&policy->td, policy->num_layers, policy->num_experts, policy->num_streams) &&
           guard_init(&policy->guard, policy->num_layers, policy->num_experts, policy->slots_per_layer);
}

/* Distinct experts per step, as a share of a layer's slots. */
static inline double policy_crowd(const struct policy *policy) { return policy->distinct / policy->slots_per_layer; }

static inline int policy_bypasses(const struct policy *policy, int calibrated) {
    if (policy->admission != ADMIT_AUTO) return policy->admission == ADMIT_BYPASS;
    return calibrated || policy_crowd(policy) > POLICY_CROWDED;
}

/* The members of the latest demand, which stay while others go; NULL when they may be bypassed. */
static inline const uint8_t *policy_kept(const struct policy *policy, int calibrated) {
    return policy_bypasses(policy, calibrated) ? NULL : policy->member;
}

/* Experts that a layer keeps of one pool for all layers, as long as others have more. */
static inline uint32_t policy_floor(const struct policy *policy) {
    int comparable = policy_td_leads(policy) || (policy->base == POLICY_LRU && !(policy->affinity_weight > 0));
    return (uint32_t)(policy->slots_per_layer * (comparable ? POLICY_FLOOR : 1));
}

/* By what a layer's values are multiplied after the latest demand to be compared with those of others: see above. */
static inline double policy_nearness(const struct policy *policy, uint32_t layer) {
    if (policy->value == policy->affinity) return policy->affinity_unit[layer];
    if (!policy_td_leads(policy)) return 1;
    uint32_t since = (policy->layer + policy->num_layers - layer) % policy->num_layers;
    return pow(td_discount(policy->batch), -(double)since / policy->num_layers);
}

/* ---- the distinct experts of a record */

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

/* ---- values of one layer */

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
