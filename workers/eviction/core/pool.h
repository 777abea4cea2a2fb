/* A cache in a simulation: which experts are resident, and who goes. Slots are not told apart.
 *
 * Invariant: `used` is the number of set bytes in `resident`, `used_in_layer` that of each layer's; no layer that has
 * its floor or less loses an expert while another one has more than its own. */
#ifndef HOTSET_POOL_H
#define HOTSET_POOL_H

#include <stdint.h>
#include <stdlib.h>

struct pool {
    uint32_t num_layers, num_experts, slots, floor, used;
    uint32_t *used_in_layer;
    uint8_t *resident; /* [layers][experts] */
};

static inline void pool_free(struct pool *pool) {
    free(pool->used_in_layer);
    free(pool->resident);
    pool->used_in_layer = NULL;
    pool->resident = NULL;
}

static inline int pool_init(struct pool *pool, uint32_t num_layers, uint32_t num_experts, uint32_t slots,
                            uint32_t floor) {
    *pool = (struct pool){.num_layers = num_layers, .num_experts = num_experts, .slots = slots, .floor = floor};
    pool->used_in_layer = calloc(num_layers, sizeof *pool->used_in_layer);
    pool->resident = calloc((size_t)num_layers * num_experts, 1);
    if (pool->used_in_layer && pool->resident) return 1;
    pool_free(pool);
    return 0;
}

/* The resident expert of least value (NULL: all are worth the same); equal ones: the one used longest ago, then the
 * lowest id. Experts of `layer` that are marked in `kept` stay, unless kept is NULL. UINT32_MAX if nobody may go. */
static inline uint32_t pool_victim(const struct pool *pool, const double *value, const uint64_t *last_used,
                                   uint32_t layer, const uint8_t *kept, uint32_t floor) {
    uint32_t victim = UINT32_MAX;
    for (uint32_t l = 0; l < pool->num_layers; l++) {
        if (pool->used_in_layer[l] <= floor) continue;
        for (uint32_t e = 0; e < pool->num_experts; e++) {
            uint32_t id = l * pool->num_experts + e;
            if (!pool->resident[id] || (kept && l == layer && kept[e])) continue;
            double more = victim == UINT32_MAX || !value ? 0 : value[id] - value[victim];
            if (victim == UINT32_MAX || more < 0 || (more == 0 && last_used[id] < last_used[victim])) victim = id;
        }
    }
    return victim;
}

/* All of `experts` come in at once, then the pool shrinks to its slots. When the kept ones alone are too many, each
 * newcomer drives out an earlier one, whatever that is worth. */
static inline void pool_admit(struct pool *pool, uint32_t layer, const uint16_t *experts, uint32_t count,
                              const double *value, const uint64_t *last_used, const uint8_t *kept) {
    uint8_t *row = pool->resident + (size_t)layer * pool->num_experts;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t absent = !row[experts[i]];
        row[experts[i]] = 1;
        pool->used_in_layer[layer] += absent;
        pool->used += absent;
    }
    while (pool->used > pool->slots) {
        uint32_t victim = pool_victim(pool, value, last_used, layer, kept, pool->floor);
        if (victim == UINT32_MAX) victim = pool_victim(pool, kept ? NULL : value, last_used, layer, NULL, 0);
        pool->resident[victim] = 0;
        pool->used_in_layer[victim / pool->num_experts]--;
        pool->used--;
    }
}

/* How many of `experts` are resident. */
static inline uint32_t pool_hits(const struct pool *pool, uint32_t layer, const uint16_t *experts, uint32_t count) {
    const uint8_t *row = pool->resident + (size_t)layer * pool->num_experts;
    uint32_t hits = 0;
    for (uint32_t i = 0; i < count; i++) hits += row[experts[i]];
    return hits;
}

#endif
