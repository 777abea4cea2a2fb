/* The rows of a call, and what they change in the arena. See route.h for how the parts fit. */
#ifndef HOTSET_ROUTE_BATCH_H
#define HOTSET_ROUTE_BATCH_H

#include "affinity.h"
#include "counters.h"
#include "route_row.h"

enum route_epochs {
    EPOCH_PER_TOKEN = 0, /* a batch equals the sequence of single calls */
    EPOCH_PER_CALL = 1,  /* one epoch; each expert is boosted once, however many rows selected it */
    EPOCH_NONE = 2,      /* the same within the current epoch: a further call of the same step */
};

/* One read of each word: all rows of the call see the same residency. acquire pairs with the pager's stores, so
 * that an expert seen resident is. */
static inline void route_snapshot_take(struct route_snapshot *snapshot, const struct arena *arena, uint32_t layer,
                                       int prefer_loading) {
    memset(snapshot, 0, sizeof *snapshot);
    for (uint32_t word = 0; word < arena->mask_words; word++) {
        size_t at = (size_t)layer * arena->mask_stride + word;
        uint64_t resident = load_acquire(arena->resident_mask + at);
        snapshot->resident[word] = resident;
        snapshot->preferred[word] = resident | (prefer_loading ? load_acquire(arena->loading_mask + at) : 0);
    }
    snapshot->range = bits_float(load_relaxed(&arena->layers[layer].logit_range));
}

static inline void route_tally_begin(struct route_tally *tally, const struct route_rule *rule,
                                     const struct route_snapshot *snapshot) {
    memset(tally->selections, 0, rule->num_experts * sizeof tally->selections[0]);
    memset(tally->displaced, 0, sizeof tally->displaced);
    memset(tally->prefetch, 0, sizeof tally->prefetch);
    tally->nan_logits = tally->rows_without_finite = tally->changed = 0;
    tally->lost_mass = 0;
    tally->range = snapshot->range;
    tally->range_updates = 0;
    tally->range_gain = 1;
    tally->range_shift = 0;
}

/* Routes `rows` rows of num_experts logits. Reads no shared memory. rows <= AFFINITY_MAX_AGES if EPOCH_PER_TOKEN. */
static inline void route_rows(const struct route_rule *rule, const struct route_call *call,
                              const struct route_snapshot *snapshot, const struct affinity_law *law,
                              enum route_epochs epochs, const float *logits, uint32_t rows, int32_t *ids, float *weights,
                              struct route_tally *tally) {
    struct route_scratch scratch;
    uint32_t k = rule->top_k;
    for (uint32_t row = 0; row < rows; row++, ids += k, weights += k, logits += rule->num_experts) {
        float strength = call->strengths ? call->strengths[row] : call->strength;
        route_row(rule, call, snapshot, &scratch, logits, strength, ids, weights, tally);
        uint64_t boost = epochs == EPOCH_PER_TOKEN ? law->weight_q36[rows - 1 - row] << 16 : 0;
        uint64_t keep = law->saturating && epochs == EPOCH_PER_TOKEN ? 0xFFFF : UINT64_MAX;
        for (uint32_t i = 0; i < k; i++)
            tally->selections[ids[i]] = (tally->selections[ids[i]] & keep) + boost + 1;
    }
}

/* The rows' effect on the running mean. If nobody else moved it, exactly what single calls would have left. */
static inline void route_account_range(const struct arena *arena, uint32_t layer, const struct route_snapshot *snapshot,
                                       const struct route_tally *tally) {
    if (!tally->range_updates) return;
    atomic_u32 *word = &arena->layers[layer].logit_range;
    uint32_t old = float_bits(snapshot->range), moved = float_bits(tally->range);
    while (!atomic_compare_exchange_weak_explicit(word, &old, moved, memory_order_relaxed, memory_order_relaxed))
        moved = old == float_bits(snapshot->range)
                    ? float_bits(tally->range)
                    : float_bits(tally->range_gain * bits_float(old) + tally->range_shift);
}

/* Adds the tally to the arena: affinity, activation counts and the counters of `process`, which is the caller.
 * Sets the bits of selected experts that are not resident in `missing`. Returns how many selections hit. */
static inline uint64_t route_account(const struct arena *arena, uint32_t process, uint32_t layer,
                                     const struct route_rule *rule, const struct affinity_law *law,
                                     enum route_epochs epochs, uint32_t rows, const struct route_snapshot *snapshot,
                                     const struct route_tally *tally, uint64_t *missing) {
    uint64_t hits = 0, selected = (uint64_t)rows * rule->top_k;
    uint64_t now = epochs == EPOCH_NONE ? affinity_now(arena, layer)
                                        : affinity_advance(arena, layer, epochs == EPOCH_PER_TOKEN ? rows : 1);
    atomic_u64 *slots = affinity_row(arena, layer);
    atomic_u64 *activations = activation_row(arena, process, layer);
    for (uint32_t e = 0; e < rule->num_experts; e++) {
        uint64_t selections = tally->selections[e];
        if (!selections) continue;
        uint64_t count = epochs == EPOCH_PER_TOKEN ? selections & 0xFFFF : selections;
        uint64_t amount = epochs == EPOCH_PER_TOKEN
                              ? ((selections >> 16) + (1 << (AFFINITY_WEIGHT_BITS - 25))) >> (AFFINITY_WEIGHT_BITS - 24)
                              : law->boost_q24;
        affinity_merge(law, &slots[e], amount, now);
        store_relaxed(&activations[e], load_relaxed(&activations[e]) + count);
        if (bit_test(snapshot->resident, e)) hits += count;
        else bit_set(missing, e);
    }
    atomic_u64 *counters = counter_row(arena, process);
    counter_add(counters, COUNTER_ROUTING_DECISIONS, rows);
    counter_add(counters, COUNTER_CACHE_HITS, hits);
    counter_add(counters, COUNTER_CACHE_MISSES, selected - hits);
    counter_add(counters, COUNTER_NAN_LOGITS, tally->nan_logits);
    counter_add(counters, COUNTER_ROWS_WITHOUT_FINITE_LOGIT, tally->rows_without_finite);
    counter_add(counters, COUNTER_SELECTIONS_CHANGED, tally->changed);
    /* Rounding can make a row's loss negative by an ulp; the counter only grows. */
    if (tally->lost_mass > 0)
        counter_add(counters, COUNTER_LOST_MASS_Q32, (uint64_t)(tally->lost_mass * 4294967296.0 + 0.5));
    route_account_range(arena, layer, snapshot, tally);
    return hits;
}

#endif
