/* Replays demand records through a cache, event by event: a layer's whole set is looked up against one snapshot, and
 * only then does the cache change. One by one would count misses that no step ever has. */
#ifndef HOTSET_REPLAY_H
#define HOTSET_REPLAY_H

#include "policy_observe.h"

struct replay_result {
    uint64_t events, hits, misses; /* of sets that belong to streams */
};

/* The caches of a replay: one of all layers, or one each. */
struct replay_pools {
    uint32_t count;
    struct pool *pools;
    double *worth; /* [layers][experts] */
};

static inline int replay_pools_init(struct replay_pools *all, const struct policy *policy, uint32_t slots,
                                    int global) {
    all->count = global ? 1 : policy->num_layers;
    all->pools = calloc(all->count, sizeof *all->pools);
    all->worth = calloc((size_t)policy->num_layers * policy->num_experts, sizeof *all->worth);
    if (!all->pools || !all->worth) return 0;
    for (uint32_t i = 0; i < all->count; i++)
        if (!pool_init(&all->pools[i], global ? policy->num_layers : 1, policy->num_experts, slots))
            return 0;
    return 1;
}

static inline void replay_pools_free(struct replay_pools *all) {
    for (uint32_t i = 0; all->pools && i < all->count; i++) pool_free(&all->pools[i]);
    free(all->pools);
    free(all->worth);
}

static inline int replay_is_shared(const struct replay_pools *all) { return all->pools->num_layers > 1; }

/* What a step used, distinct. */
struct used_set {
    const uint16_t *experts;
    uint32_t count;
};

static inline struct used_set policy_used(const struct policy *policy) {
    return (struct used_set){policy->experts, policy->count};
}

/* Counts the hits and misses of what the step of the latest demand used, then lets it in. A set of no stream is a
 * prefill's: it moves the cache, but is not counted. */
static inline void replay_step(struct replay_pools *all, const struct policy *policy, const uint16_t *record,
                               struct used_set used, const double *value, const uint8_t *kept,
                               struct replay_result *result) {
    int global = replay_is_shared(all);
    struct pool *pool = &all->pools[all->count > 1 ? policy->layer : 0];
    uint32_t layer = global ? policy->layer : 0;
    size_t first = global ? 0 : (size_t)policy->layer * policy->num_experts;
    uint32_t hits = pool_hits(pool, layer, used.experts, used.count);
    if (used.count && record[DEMAND_HEADER_WORDS] != DEMAND_NO_STREAM) {
        result->events++;
        result->hits += hits;
        result->misses += used.count - hits;
    }
    const struct pool_order order = {value + first, policy->last_used + first};
    pool_admit(pool, layer, used.experts, used.count, order, kept);
}

/* The policy learns from one record, by which the latest demand is what the gate chose. `used`: what the step then used
 * in its place, or NULL where nobody preferred anything. */
static inline void replay_record(struct policy *policy, const uint16_t *record, const uint16_t *next,
                                 const struct used_set *used, struct replay_pools *pools,
                                 struct replay_result *result) {
    policy_observe(policy, record, next);
    policy_fresh(policy, policy->layer);
    const double *value = policy->value; /* which are comparable within a layer */
    if (replay_is_shared(pools)) {
        policy_worth(policy, pools->worth);
        pools->pools->floor = policy_floor(policy);
        value = pools->worth;
    }
    replay_step(pools, policy, record, used ? *used : policy_used(policy), value,
                policy_kept(policy, policy_td_leads(policy)), result);
}

static inline void replay_policy(struct policy *policy, const uint16_t *records, size_t words,
                                 struct replay_pools *pools, struct replay_result *result) {
    for (size_t at = 0, end; at < words; at = end) {
        end = at + records[at + DEMAND_LENGTH];
        replay_record(policy, records + at, end < words ? records + end : NULL, NULL, pools, result);
    }
}

/* Belady's MIN: who is needed last goes first, and who is needed later than every resident one does not come in.
 * `policy` only collects the sets. 0 when there is not enough memory. */
static inline int replay_min(struct policy *policy, const uint16_t *records, size_t words, struct replay_pools *pools,
                             struct replay_result *result) {
    const size_t places = (size_t)policy->num_layers * policy->num_experts;
    size_t num_records = 0, num_uses = 0;
    for (size_t at = 0; at < words; at += records[at + DEMAND_LENGTH], num_records++)
        num_uses += (size_t)records[at + DEMAND_ROWS] * records[at + DEMAND_EXPERTS];
    size_t *starts = malloc((num_records + 1) * sizeof *starts);
    double *next = malloc((num_uses + 1) * sizeof *next), *value = malloc(places * sizeof *value);
    if (starts && next && value) {
        size_t record = 0, use = num_uses;
        for (size_t at = 0; at < words; at += records[at + DEMAND_LENGTH]) starts[record++] = at;
        /* Backwards: at every use of an expert, minus the number of the record that uses it next. */
        for (size_t id = 0; id < places; id++) value[id] = -(double)num_records;
        while (record-- > 0) {
            policy_collect(policy, records + starts[record]);
            const double *row = value + (size_t)policy->layer * policy->num_experts;
            for (uint32_t i = policy->count; i-- > 0;) next[--use] = row[policy->experts[i]];
            for (uint32_t i = 0; i < policy->count; i++)
                value[(size_t)policy->layer * policy->num_experts + policy->experts[i]] = -(double)record;
        }
        /* Forwards: between its uses an expert's next use does not change. */
        for (record = 0; record < num_records; record++) {
            policy_collect(policy, records + starts[record]);
            for (uint32_t i = 0; i < policy->count; i++)
                value[(size_t)policy->layer * policy->num_experts + policy->experts[i]] = next[use++];
            replay_step(pools, policy, records + starts[record], policy_used(policy), value, NULL, result);
        }
    }
    int done = starts && next && value;
    free(starts);
    free(next);
    free(value);
    return done;
}

#endif
