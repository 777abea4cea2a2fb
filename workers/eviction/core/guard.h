/* The guard of what td learns (td.h): two caches of a layer's share of the slots are simulated, for a few layers, one
 * kept by td's values and one by affinity. Whichever hits more decides who goes. */
#ifndef HOTSET_GUARD_H
#define HOTSET_GUARD_H

#include "pool.h"

#define GUARD_LAYERS 4u    /* that are simulated at most, and ... */
#define GUARD_EVERY 4u     /* ... at most every fourth: all of them would cost more than learning does */
#define GUARD_STEPS 2048.  /* of the guarded layers, over which their hit rates are averaged */
#define GUARD_MARGIN 0.002 /* by which the other must be ahead to take over */

struct guard {
    uint32_t every; /* layers 0, every, 2 * every ... are simulated */
    uint32_t count;
    struct pool td[GUARD_LAYERS], affinity[GUARD_LAYERS];
    double steps, td_rate, affinity_rate; /* hit rates over the latest steps of those layers */
    int td_leads; /* whether td's values decide */
};

/* 0 when there is not enough memory. */
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

static inline void guard_free(struct guard *guard) {
    for (uint32_t i = 0; i < GUARD_LAYERS; i++) {
        pool_free(&guard->td[i]);
        pool_free(&guard->affinity[i]);
    }
}

#endif
