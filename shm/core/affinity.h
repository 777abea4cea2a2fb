/* Affinity: how much each expert was used lately, an exponential moving average that all processes share.
 *
 *     score = min(score * decay + boost, max)      per epoch; without the boost where the expert was not activated
 *
 * A slot holds [score Q0.24 | epoch 40]: the score as a fraction of max, true at that epoch. Decay is applied when a
 * slot is read or merged (lazily), so an epoch costs one CAS per activated expert and nothing for the others.
 *
 * Invariants
 *   A1  A slot's epoch never goes back, and its decayed score never rises without an activation (INV-2).
 *   A2  Merges commute, up to rounding, when boost <= (1 - decay) * max (the sum never meets the cap) or
 *       boost >= max (an activation sets the score to max, so the later one decides). Between the two the cap
 *       makes the order visible: such values are accepted, and agree with a float EMA for one process only. */
#ifndef HOTSET_AFFINITY_H
#define HOTSET_AFFINITY_H

#include "arena.h"

#define AFFINITY_EPOCH_BITS 40
#define AFFINITY_EPOCH_MASK ((UINT64_C(1) << AFFINITY_EPOCH_BITS) - 1)
#define AFFINITY_ONE 0xFFFFFFu    /* Q0.24: the score is max */
#define AFFINITY_MAX_AGES 1024u   /* tokens of one batch that are merged at once */
#define AFFINITY_WEIGHT_BITS 36   /* boosts within a batch, before they are merged: Q.36 */

struct affinity_law {
    double decay, boost, max;
    uint32_t boost_q24;
    int saturating;                             /* boost >= max: A2's second case */
    uint64_t power_q32[AFFINITY_EPOCH_BITS];    /* decay^(2^i) */
    uint64_t decay_q32[AFFINITY_MAX_AGES];      /* decay^age: mostly one step */
    uint64_t weight_q36[AFFINITY_MAX_AGES];     /* boost / max * decay^age */
};

static inline void affinity_law_init(struct affinity_law *law, double decay, double boost, double max) {
    double share = boost / max < 1 ? boost / max : 1, power = decay;
    law->decay = decay;
    law->boost = boost;
    law->max = max;
    law->boost_q24 = (uint32_t)(share * AFFINITY_ONE + 0.5);
    law->saturating = boost >= max;
    for (int i = 0; i < AFFINITY_EPOCH_BITS; i++, power *= power)
        law->power_q32[i] = (uint64_t)(power * 4294967296.0 + 0.5);
    double decayed = 4294967296.0;
    for (uint32_t age = 0; age < AFFINITY_MAX_AGES; age++, decayed *= decay) law->decay_q32[age] = (uint64_t)(decayed + 0.5);
    /* In units of the slot: AFFINITY_ONE, not 2^24, is one. */
    double weight = share * AFFINITY_ONE * (double)(UINT64_C(1) << (AFFINITY_WEIGHT_BITS - 24));
    for (uint32_t age = 0; age < AFFINITY_MAX_AGES; age++, weight *= decay)
        law->weight_q36[age] = (uint64_t)(weight + 0.5);
}

static inline uint64_t affinity_slot_score(uint64_t slot) { return slot >> AFFINITY_EPOCH_BITS; }
static inline uint64_t affinity_slot_epoch(uint64_t slot) { return slot & AFFINITY_EPOCH_MASK; }

/* `score` after `epochs` without an activation. Rounded to nearest: an EMA of floors drifts below the float one. */
static inline uint64_t affinity_decayed(const struct affinity_law *law, uint64_t score, uint64_t epochs) {
    const uint64_t half = UINT64_C(1) << 31;
    if (epochs < AFFINITY_MAX_AGES) return (score * law->decay_q32[epochs] + half) >> 32;
    for (int i = 0; epochs && score; i++, epochs >>= 1)
        if (epochs & 1) score = (score * law->power_q32[i] + half) >> 32;
    return score;
}

/* The score at epoch `now`; a slot that another process has already moved past `now` is not decayed back. */
static inline uint64_t affinity_score(const struct affinity_law *law, uint64_t slot, uint64_t now) {
    uint64_t epoch = affinity_slot_epoch(slot);
    return affinity_decayed(law, affinity_slot_score(slot), now > epoch ? now - epoch : 0);
}

/* A slot after an activation worth `amount` (Q0.24) at epoch `now`.
 * (score @ epoch) + (amount @ now) is formed at the later of the two, so that it does not matter who comes first. */
static inline uint64_t affinity_merged(const struct affinity_law *law, uint64_t slot, uint64_t amount, uint64_t now) {
    uint64_t epoch = affinity_slot_epoch(slot), at = now, score = affinity_slot_score(slot);
    if (epoch <= now) score = affinity_decayed(law, score, now - epoch);
    else amount = affinity_decayed(law, amount, epoch - now), at = epoch;
    score = !law->saturating ? score + amount : score > amount ? score : amount;
    if (score > AFFINITY_ONE) score = AFFINITY_ONE;
    return score << AFFINITY_EPOCH_BITS | at;
}

/* `slot` may be out of date: the merge then starts again from what is there. */
static inline void affinity_exchange(const struct affinity_law *law, atomic_u64 *shared, uint64_t slot, uint64_t merged,
                                     uint64_t amount, uint64_t now) {
    /* relaxed: a slot stands for itself, nothing is published through it */
    while (!atomic_compare_exchange_weak_explicit(shared, &slot, merged, memory_order_relaxed, memory_order_relaxed))
        merged = affinity_merged(law, slot, amount, now);
}

static inline void affinity_merge(const struct affinity_law *law, atomic_u64 *shared, uint64_t amount, uint64_t now) {
    uint64_t slot = load_relaxed(shared);
    affinity_exchange(law, shared, slot, affinity_merged(law, slot, amount, now), amount, now);
}

/* What the activations of a call are worth to an expert; its slot as it was read. */
struct affinity_activation {
    uint32_t expert;
    uint64_t amount, slot;
};

#define AFFINITY_GROUP 32u

/* Merges up to AFFINITY_GROUP different experts into a row of slots. An exchange waits for all that comes before it and
 * holds up all that comes after it: so everything is computed before the first one. */
static inline void affinity_merge_group(const struct affinity_law *law, atomic_u64 *row,
                                        const struct affinity_activation *group, uint32_t count, uint64_t now) {
    uint64_t merged[AFFINITY_GROUP];
    for (uint32_t i = 0; i < count; i++) merged[i] = affinity_merged(law, group[i].slot, group[i].amount, now);
    for (uint32_t i = 0; i < count; i++)
        affinity_exchange(law, row + group[i].expert, group[i].slot, merged[i], group[i].amount, now);
}

static inline atomic_u64 *affinity_row(const struct arena *arena, uint32_t layer) {
    return arena->affinity + (size_t)layer * arena->affinity_stride;
}

static inline uint64_t affinity_now(const struct arena *arena, uint32_t layer) {
    return load_relaxed(&arena->layers[layer].affinity_epoch);
}

/* Takes the next `epochs` epochs of the layer for the caller; the last of them. */
static inline uint64_t affinity_advance(const struct arena *arena, uint32_t layer, uint64_t epochs) {
    return atomic_fetch_add_explicit(&arena->layers[layer].affinity_epoch, epochs, memory_order_relaxed) + epochs;
}

#endif
