/* A cache in a simulation: which experts are resident, and who goes. Slots are not told apart.
 *
 * Invariant: `residents` lists `used` experts, in no order, and `place` has the place of each in it, counted from 1
 * (0: not resident); `used_in_layer` counts them by layer. No layer that has `floor` experts or less loses one while
 * another one has more. */
#ifndef HOTSET_POOL_H
#define HOTSET_POOL_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define POOL_MAX_EXPERTS 1024u /* of a layer */

struct pool {
    uint32_t num_layers, num_experts, slots, floor, used;
    uint32_t *used_in_layer;
    uint32_t *residents; /* ids: layer * num_experts + expert; room for all of them */
    uint32_t *place;     /* [layers][experts] */
};

static inline void pool_free(struct pool *pool) {
    free(pool->used_in_layer);
    free(pool->residents);
    free(pool->place);
    pool->used_in_layer = pool->residents = pool->place = NULL;
}

static inline int pool_init(struct pool *pool, uint32_t num_layers, uint32_t num_experts, uint32_t slots) {
    const size_t places = (size_t)num_layers * num_experts;
    *pool = (struct pool){.num_layers = num_layers, .num_experts = num_experts, .slots = slots};
    pool->used_in_layer = calloc(num_layers, sizeof(uint32_t));
    pool->residents = calloc(places, sizeof(uint32_t));
    pool->place = calloc(places, sizeof(uint32_t));
    if (pool->used_in_layer && pool->residents && pool->place) return 1;
    pool_free(pool);
    return 0;
}

static inline void pool_add(struct pool *pool, uint32_t id) {
    if (pool->place[id]) return;
    pool->residents[pool->used++] = id;
    pool->place[id] = pool->used;
    pool->used_in_layer[id / pool->num_experts]++;
}

static inline void pool_remove(struct pool *pool, uint32_t id) {
    uint32_t last = pool->residents[--pool->used], place = pool->place[id];
    pool->residents[place - 1] = last;
    pool->place[last] = place;
    pool->place[id] = 0;
    pool->used_in_layer[id / pool->num_experts]--;
}

/* What experts are compared by. */
struct pool_order {
    const double *value;       /* NULL: all are worth the same */
    const uint64_t *last_used;
};

static inline double pool_worth(const struct pool_order *order, uint32_t id) {
    return order->value ? order->value[id] : 0;
}

/* Who goes first: who is worth least, of equal ones who was used longest ago, then the lowest id. */
static inline int pool_before(const struct pool_order *order, uint32_t a, uint32_t b) {
    const double worth = pool_worth(order, a), other = pool_worth(order, b);
    if (worth != other) return worth < other;
    if (order->last_used[a] != order->last_used[b]) return order->last_used[a] < order->last_used[b];
    return a < b;
}

/* Who goes first. Experts of `layer` that are marked in `kept` stay, unless kept is NULL, and so do those of layers that
 * have `floor` or less. UINT32_MAX if nobody may go. */
static inline uint32_t pool_victim(const struct pool *pool, const struct pool_order *order, uint32_t layer,
                                   const uint8_t *kept, uint32_t floor) {
    const uint32_t first = layer * pool->num_experts;
    uint32_t victim = UINT32_MAX;
    double least = INFINITY;
    for (uint32_t i = 0; i < pool->used; i++) {
        const uint32_t id = pool->residents[i];
        const double worth = pool_worth(order, id);
        if (worth > least) continue; /* most are: nothing else needs to be looked at */
        if (kept && id - first < pool->num_experts && kept[id - first]) continue;
        if (floor && pool->used_in_layer[id / pool->num_experts] <= floor) continue;
        if (victim != UINT32_MAX && !pool_before(order, id, victim)) continue;
        least = worth;
        victim = id;
    }
    return victim;
}

/* The `most` (at least 1) experts that go first of a pool of one layer, without those that are kept; returns how many
 * there are. */
static inline uint32_t pool_victims(const struct pool *pool, const struct pool_order *order, const uint8_t *kept,
                                    uint32_t most, uint32_t *victims) {
    uint32_t count = 0;
    double enough = INFINITY; /* what the last of `most` victims is worth */
    for (uint32_t i = 0; i < pool->used; i++) {
        const uint32_t id = pool->residents[i];
        if (pool_worth(order, id) > enough || (kept && kept[id])) continue;
        uint32_t at = count;
        if (count < most) count++;
        else if (!pool_before(order, id, victims[--at])) continue;
        for (; at && pool_before(order, id, victims[at - 1]); at--) victims[at] = victims[at - 1];
        victims[at] = id;
        if (count == most) enough = pool_worth(order, victims[most - 1]);
    }
    return count;
}

/* All of `experts` come in at once, then the pool shrinks to its slots. When the kept ones alone are too many, each
 * newcomer drives out an earlier one, whatever that is worth. */
static inline void pool_admit(struct pool *pool, uint32_t layer, const uint16_t *experts, uint32_t count,
                              struct pool_order order, const uint8_t *kept) {
    for (uint32_t i = 0; i < count; i++) pool_add(pool, layer * pool->num_experts + experts[i]);
    if (pool->num_layers == 1 && pool->used > pool->slots) {
        uint32_t victims[POOL_MAX_EXPERTS];
        const uint32_t going = pool_victims(pool, &order, kept, pool->used - pool->slots, victims);
        for (uint32_t i = 0; i < going; i++) pool_remove(pool, victims[i]);
    }
    while (pool->used > pool->slots) {
        uint32_t victim = pool_victim(pool, &order, layer, kept, pool->floor);
        if (victim == UINT32_MAX) {
            const struct pool_order any = {kept ? NULL : order.value, order.last_used};
            victim = pool_victim(pool, &any, layer, NULL, 0);
        }
        pool_remove(pool, victim);
    }
}

/* How many of `experts` are resident. */
static inline uint32_t pool_hits(const struct pool *pool, uint32_t layer, const uint16_t *experts, uint32_t count) {
    const uint32_t *place = pool->place + (size_t)layer * pool->num_experts;
    uint32_t hits = 0;
    for (uint32_t i = 0; i < count; i++) hits += place[experts[i]] != 0;
    return hits;
}

#endif
