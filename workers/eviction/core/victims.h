/* Who goes when a slot is needed, of the experts that lie in slots: first who is worth least, of equal ones who was used
 * longest ago, then the lowest id; last of all those that are protected: the latest step's, if they are admitted, and
 * those of layers at their floor.
 *
 * A heap, as the first one mostly goes: sorting all slots of a large model took 1.7 ms for each expert that is read. */
#ifndef HOTSET_VICTIMS_H
#define HOTSET_VICTIMS_H

#include "policy_values.h"

struct victim {
    double worth;
    uint64_t last_used;
    int64_t expert;
    uint32_t slot;
    uint8_t protected;
};

static inline int victim_before(const struct victim *a, const struct victim *b) {
    if (a->protected != b->protected) return a->protected < b->protected;
    if (a->worth != b->worth) return a->worth < b->worth;
    if (a->last_used != b->last_used) return a->last_used < b->last_used;
    return a->expert < b->expert;
}

/* Lets the victim at `at` sink to its place in the heap. */
static inline void victims_sink(struct victim *heap, size_t count, size_t at) {
    const struct victim sinking = heap[at];
    for (size_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && victim_before(&heap[child + 1], &heap[child])) child++;
        if (!victim_before(&heap[child], &sinking)) break;
        heap[at] = heap[child];
    }
    heap[at] = sinking;
}

static inline struct victim victims_pop(struct victim *heap, size_t *count) {
    struct victim first = heap[0];
    heap[0] = heap[--*count];
    if (*count) victims_sink(heap, *count, 0);
    return first;
}

/* Fills `heap` [slots] with the experts of those slots that are in `among` (NULL: all); returns how many. Slots without
 * one have -1. `newcomer`: the layer that will have one expert more, or num_layers. `residents`, `nearness`
 * [layers + 1]: room to work. */
static inline size_t victims_heap(const struct policy *policy, const int64_t *experts, const uint8_t *among,
                                  size_t slots, uint32_t newcomer, uint32_t *residents, double *nearness,
                                  struct victim *heap) {
    memset(residents, 0, (policy->num_layers + 1) * sizeof *residents);
    residents[newcomer] = 1;
    for (size_t slot = 0; slot < slots; slot++)
        if (experts[slot] >= 0) residents[(uint32_t)experts[slot] / policy->num_experts]++;
    for (uint32_t layer = 0; layer < policy->num_layers; layer++) {
        nearness[layer] = policy_nearness(policy, layer);
        policy_fresh(policy, layer);
    }
    const uint8_t *kept = policy->count ? policy_kept(policy, policy_td_leads(policy)) : NULL;
    const uint32_t floor = policy_floor(policy);
    size_t count = 0;
    for (size_t slot = 0; slot < slots; slot++) {
        if (experts[slot] < 0 || (among && !among[slot])) continue;
        uint32_t id = (uint32_t)experts[slot], layer = id / policy->num_experts;
        int stays = kept && layer == policy->layer && kept[id % policy->num_experts];
        heap[count++] = (struct victim){.worth = policy->value[id] * nearness[layer], .last_used = policy->last_used[id],
                                        .expert = id, .slot = (uint32_t)slot,
                                        .protected = stays || residents[layer] <= floor};
    }
    for (size_t at = count / 2; at > 0; at--) victims_sink(heap, count, at - 1);
    return count;
}

#endif
