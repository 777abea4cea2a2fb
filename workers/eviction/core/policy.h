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
#include "guard.h"
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

enum policy_base { POLICY_LRU, POLICY_LFU, POLICY_ADAPTIVE, POLICY_AFFINITY, POLICY_TD, POLICY_BASES };
enum policy_admission { ADMIT_AUTO, ADMIT_ALWAYS, ADMIT_BYPASS, ADMISSIONS };

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
    guard_free(&policy->guard);
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

#endif
