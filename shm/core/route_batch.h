/* What a call reads from the arena before its rows are routed, and writes there afterwards. */
#ifndef HOTSET_ROUTE_BATCH_H
#define HOTSET_ROUTE_BATCH_H

#include "affinity.h"
#include "counters.h"
#include "route_kernel.h"
#include "route_select.h"

_Static_assert(ROUTE_MAX_TOP_K <= AFFINITY_GROUP, "a row is merged as one group");

enum route_epochs {
    EPOCH_PER_TOKEN = 0, /* a batch equals the sequence of single calls */
    EPOCH_PER_CALL = 1,  /* one epoch; each expert is boosted once, however many rows selected it */
    EPOCH_NONE = 2,      /* the same within the current epoch: a further call of the same step */
};

/* One read of each word: all rows of the call see the same residency. acquire pairs with the pager's stores, so
 * that an expert seen resident is. */
static inline void route_snapshot_take(struct route_snapshot *snapshot, const struct arena *arena, uint32_t layer,
                                       int prefer_loading) {
    for (uint32_t word = 0; word < arena->mask_words; word++) {
        size_t at = (size_t)layer * arena->mask_stride + word;
        uint64_t resident = load_acquire(arena->resident_mask + at);
        snapshot->resident[word] = resident;
        snapshot->preferred[word] = resident | (prefer_loading ? load_acquire(arena->loading_mask + at) : 0);
    }
    snapshot->range = float_from_bits(load_relaxed(&arena->layers[layer].logit_range));
}

static inline void route_tally_begin(struct route_tally *tally, const struct arena *arena,
                                     const struct route_snapshot *snapshot) {
    for (uint32_t word = 0; word < arena->mask_words; word++)
        tally->missing[word] = tally->displaced[word] = tally->prefetch[word] = 0;
    tally->nan_logits = tally->rows_without_finite = tally->changed = 0;
    tally->lost_mass = 0;
    tally->range = snapshot->range;
    tally->range_updates = 0;
    tally->range_gain = 1;
    tally->range_shift = 0;
}

/* The rows' effect on the running mean. If nobody else moved it, exactly what single calls would have left. */
static inline void route_account_range(const struct arena *arena, uint32_t layer, const struct route_snapshot *snapshot,
                                       const struct route_tally *tally) {
    if (!tally->range_updates) return;
    atomic_u32 *word = &arena->layers[layer].logit_range;
    uint32_t old = bits_from_float(snapshot->range), moved = bits_from_float(tally->range);
    while (!atomic_compare_exchange_weak_explicit(word, &old, moved, memory_order_relaxed, memory_order_relaxed))
        moved = old == bits_from_float(snapshot->range)
                    ? bits_from_float(tally->range)
                    : bits_from_float(tally->range_gain * float_from_bits(old) + tally->range_shift);
}

/* On whose behalf rows are routed, and under which rules. */
struct route_context {
    const struct arena *arena;
    uint32_t process, layer;
    const struct route_rule *rule;
    const struct affinity_law *law;
    enum route_epochs epochs;
};

static inline struct route_boosts route_boosts(const struct route_context *context) {
    int per_token = context->epochs == EPOCH_PER_TOKEN;
    return (struct route_boosts){
        .by_age = per_token ? context->law->weight_q36 : NULL,
        .keep = per_token && context->law->saturating ? (1 << ROUTE_COUNT_BITS) - 1 : UINT64_MAX,
    };
}

/* Counts `count` selections of one expert. Returns how many hit; a miss sets its bit. */
static inline uint64_t route_count_expert(atomic_u64 *activations, const struct route_snapshot *snapshot, uint32_t expert,
                                          uint64_t count, uint64_t *missing) {
    uint64_t hit = (uint64_t)bit_test(snapshot->resident, expert); /* no branch: it would often be mispredicted */
    store_relaxed(activations + expert, load_relaxed(activations + expert) + count); /* single writer: no fetch_add */
    missing[expert / 64] |= (hit ^ 1) << (expert % 64);
    return count * hit;
}

/* The epoch of `rows` rows, of the last one if each has its own. Taken before they are routed: a locked operation between
 * the selection and the merges would keep them from overlapping. */
static inline uint64_t route_epoch(const struct route_context *context, uint32_t rows) {
    if (context->epochs == EPOCH_NONE) return affinity_now(context->arena, context->layer);
    return affinity_advance(context->arena, context->layer, context->epochs == EPOCH_PER_TOKEN ? rows : 1);
}

/* The affinity, activations and misses of `rows` rows at epoch `now`: one CAS per expert that was selected at all.
 * Returns how many selections hit. */
static inline uint64_t route_account_selections(const struct route_context *context, uint64_t now, uint32_t rows,
                                                const int32_t *ids, const struct route_snapshot *snapshot,
                                                struct route_tally *tally) {
    const struct affinity_law *law = context->law;
    const uint64_t half = UINT64_C(1) << (AFFINITY_WEIGHT_BITS - 25); /* rounds Q.36 to Q.24 */
    int per_token = context->epochs == EPOCH_PER_TOKEN;
    atomic_u64 *slots = affinity_row(context->arena, context->layer);
    atomic_u64 *activations = activation_row(context->arena, context->process, context->layer);
    struct affinity_activation group[AFFINITY_GROUP];
    uint32_t grouped = 0;
    uint64_t hits = 0;
    if (rows == 1) {
        for (; grouped < context->rule->top_k; grouped++) {
            uint32_t e = (uint32_t)ids[grouped];
            hits += route_count_expert(activations, snapshot, e, 1, tally->missing);
            group[grouped] = (struct affinity_activation){e, law->boost_q24, load_relaxed(slots + e)};
        }
        affinity_merge_group(law, slots, group, grouped, now);
        return hits;
    }
    for (uint32_t e = 0; e < context->rule->num_experts; e++) {
        uint64_t selections = tally->selections[e];
        if (!selections) continue;
        uint64_t count = per_token ? selections & ((1 << ROUTE_COUNT_BITS) - 1) : selections;
        uint64_t amount = per_token ? ((selections >> ROUTE_COUNT_BITS) + half) >> (AFFINITY_WEIGHT_BITS - 24)
                                    : law->boost_q24;
        hits += route_count_expert(activations, snapshot, e, count, tally->missing);
        group[grouped++] = (struct affinity_activation){e, amount, load_relaxed(slots + e)};
        if (grouped < AFFINITY_GROUP) continue;
        affinity_merge_group(law, slots, group, grouped, now);
        grouped = 0;
    }
    affinity_merge_group(law, slots, group, grouped, now);
    return hits;
}

/* At the end of a call: its running mean, and the counters of the caller's process. */
static inline void route_account_call(const struct route_context *context, uint64_t rows, uint64_t hits,
                                      const struct route_snapshot *snapshot, const struct route_tally *tally) {
    atomic_u64 *counters = counter_row(context->arena, context->process);
    counter_add(counters, COUNTER_ROUTING_DECISIONS, rows);
    counter_add(counters, COUNTER_CACHE_HITS, hits);
    counter_add(counters, COUNTER_CACHE_MISSES, rows * context->rule->top_k - hits);
    if (tally->nan_logits | tally->rows_without_finite) {
        counter_add(counters, COUNTER_NAN_LOGITS, tally->nan_logits);
        counter_add(counters, COUNTER_ROWS_WITHOUT_FINITE_LOGIT, tally->rows_without_finite);
    }
    if (tally->changed) {
        counter_add(counters, COUNTER_SELECTIONS_CHANGED, tally->changed);
        /* Rounding can make the loss negative by an ulp; the counter only grows. */
        if (tally->lost_mass > 0)
            counter_add(counters, COUNTER_LOST_MASS_Q32, (uint64_t)(tally->lost_mass * 4294967296.0 + 0.5));
    }
    route_account_range(context->arena, context->layer, snapshot, tally);
}

#endif
