/* The whole core under threads, for ThreadSanitizer and UBSan: workers that route, pin, wait and compute, a pager that
 * loads, evicts, gives up and restarts, a reader of the metrics. The threads stand for processes.
 *
 *     concurrent_core IMAGE SECONDS
 *     built with -DEVICT_WITHOUT_READING_PINS   the negative control: ThreadSanitizer has to complain
 *
 * The image has 2 layers of 70 experts, 5 processes with 4 pins, 13 slots of 512 bytes. The weights are plain memory,
 * so that ThreadSanitizer sees every access that the protocol does not order. Prints the counts as key=value; exit
 * status 1 if something is wrong at the end. */
#define _GNU_SOURCE
#include "arena_image.h"
#include "futex.h"
#include "histogram.h"
#include "residency.h"
#include "route_batch.h"

#include <pthread.h>
#include <string.h>

enum { WORKERS = 3, PAGER = 3, METRICS = 4, PROCESSES = 5 };
enum { LAYERS = 2, EXPERTS = 70, TOP_K = 4, MAX_ROWS = 24, WORDS = 64 };
#define LOST_AFTER_NANOSECONDS UINT64_C(20000000000)

#ifdef EVICT_WITHOUT_READING_PINS
static int evict_at_once(const struct arena *arena, uint32_t slot) {
    uint64_t word = load_relaxed(&arena->slot_words[slot]);
    if (slot_word_state(word) != SLOT_RESIDENT) return 0;
    mask_put(arena, arena->resident_mask, slot_word_expert(word), 0);
    store_seq_cst(&arena->slot_words[slot], word - SLOT_RESIDENT + SLOT_EVICTING);
    return 1;
}
#define evict_begin evict_at_once
#endif

static struct arena arena;
static struct affinity_law law;
static const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
static uint32_t kernel_count;
static atomic_u32 stop, pager_stop; /* the pager stops last: a worker may still wait for it */

struct role {
    pthread_t thread;
    uint32_t process;
    uint64_t random;
    uint64_t routed, uses, waits, failures, prefetch_hits; /* a worker's */
    uint64_t loads, prefetches, refused, restarts;         /* the pager's */
    uint64_t reads;                                        /* of the metrics */
    uint64_t wrong_weights, lost_requests;
};

static uint32_t draw(struct role *role, uint32_t limit) {
    role->random ^= role->random << 13;
    role->random ^= role->random >> 7;
    role->random ^= role->random << 17;
    return (uint32_t)(role->random >> 32) % limit;
}

static uint64_t weights_of(uint32_t id) { return UINT64_C(0x0101010101) * (id + 1); }

/* ---- worker ---- */

static uint32_t route(struct role *role, uint32_t layer, int32_t *ids) {
    static const struct route_rule rule = {.num_experts = EXPERTS, .top_k = TOP_K, .renormalize = 1, .weight_scale = 1,
                                           .num_groups = 1, .top_groups = 1, .keep_top = 1, .prefetch_threshold = 0.04f};
    static const float strengths[ROUTE_POLICIES] = {0, 0.5f, 0.2f, 0.05f};
    uint32_t policy = draw(role, ROUTE_POLICIES), rows = 1 + draw(role, MAX_ROWS);
    struct route_call call = {.policy = policy, .strength = strengths[policy], .want_prefetch = 1};
    struct route_context context = {&arena, role->process, layer, &rule, &law, draw(role, 3)};
    struct route_boosts boosts = route_boosts(&context);
    struct route_snapshot snapshot;
    struct route_tally tally;
    float logits[MAX_ROWS * EXPERTS], weights[MAX_ROWS * TOP_K];
    uint64_t began = clock_nanoseconds();
    for (uint32_t i = 0; i < rows * EXPERTS; i++) logits[i] = (float)draw(role, 1u << 20) / (1 << 18);
    route_snapshot_take(&snapshot, &arena, layer, 1);
    route_tally_begin(&tally, &arena, &snapshot);
    memset(tally.selections, 0, sizeof tally.selections);
    uint64_t now = route_epoch(&context, rows);
    kernels[draw(role, kernel_count)]->rows(&rule, &call, &snapshot, &boosts, logits, rows, ids, weights, &tally);
    uint64_t hits = route_account_selections(&context, now, rows, ids, &snapshot, &tally);
    route_account_call(&context, rows, hits, &snapshot, &tally);
    latency_record(&arena, role->process, HISTOGRAM_ROUTING, clock_nanoseconds() - began, rows);
    role->routed += rows;
    for (uint32_t expert = 0; expert < EXPERTS; expert++)
        if (bit_test(tally.prefetch, expert)) request_set(&arena, arena.prefetch_mask, layer * EXPERTS + expert);
    return rows;
}

static void compute(struct role *role, uint32_t slot, uint32_t id) {
    const uint64_t *words = slot_bytes(&arena, slot);
    int whole = arena.slot_info[slot].checksum == weights_of(id) && arena.slot_info[slot].nbytes == WORDS * 8;
    for (int i = 0; i < WORDS; i++) whole &= words[i] == weights_of(id);
    role->wrong_weights += !whole;
    role->prefetch_hits += (uint64_t)prefetched_take(&arena, id);
    role->uses++;
}

/* Rules 1 to 3, for up to four experts at once: the resident ones first, then those that arrive. */
static void use_experts(struct role *role, uint32_t layer, const int32_t *experts) {
    uint32_t ids[TOP_K], waiting = 0;
    for (uint32_t pin = 0; pin < TOP_K; pin++) {
        ids[pin] = layer * EXPERTS + (uint32_t)experts[pin];
        pin_set(&arena, role->process, pin, ids[pin]);
        int32_t slot = residency_find(&arena, ids[pin]);
        if (slot == SLOT_NONE) {
            waiting |= 1u << pin;
            continue;
        }
        compute(role, (uint32_t)slot, ids[pin]);
        pin_clear(&arena, role->process, pin);
    }
    role->waits += waiting != 0;
    for (uint64_t began = clock_nanoseconds(); waiting;) {
        uint32_t generation = load_seq_cst(&arena.layers[layer].residency_generation), before = waiting;
        for (uint32_t pin = 0; pin < TOP_K; pin++) {
            if (!(waiting >> pin & 1)) continue;
            int32_t slot = residency_find(&arena, ids[pin]);
            int given_up = slot == SLOT_NONE && mask_test(&arena, arena.failed_mask, ids[pin]);
            if (slot != SLOT_NONE) compute(role, (uint32_t)slot, ids[pin]);
            else if (!given_up) request_set(&arena, arena.urgent_mask, ids[pin]);
            else request_set(&arena, arena.prefetch_mask, ids[pin]); /* a later attempt may succeed */
            role->failures += (uint64_t)given_up;
            if (slot == SLOT_NONE && !given_up) continue;
            pin_clear(&arena, role->process, pin);
            waiting &= ~(1u << pin);
        }
        if (waiting == before) futex_wait(&arena.layers[layer].residency_generation, generation, 50000000);
        if (clock_nanoseconds() - began > LOST_AFTER_NANOSECONDS) {
            role->lost_requests++;
            break;
        }
    }
    for (uint32_t pin = 0; pin < TOP_K; pin++) pin_clear(&arena, role->process, pin);
}

static void *worker(void *argument) {
    struct role *role = argument;
    int32_t ids[MAX_ROWS * TOP_K];
    while (!load_relaxed(&stop)) {
        uint32_t layer = draw(role, LAYERS), rows = route(role, layer, ids);
        use_experts(role, layer, ids + draw(role, rows) * TOP_K);
    }
    return NULL;
}

/* ---- pager ---- */

static int take_slot(struct role *role) {
    uint32_t first = draw(role, arena.num_slots);
    for (uint32_t i = 0; i < arena.num_slots; i++) {
        uint32_t slot = (first + i) % arena.num_slots;
        if (slot_word_state(load_relaxed(&arena.slot_words[slot])) == SLOT_EMPTY) return (int)slot;
    }
    for (uint32_t i = 0; i < arena.num_slots; i++) {
        uint32_t slot = (first + i) % arena.num_slots;
        if (evict_begin(&arena, slot)) return (int)slot;
        role->refused++;
    }
    return SLOT_NONE;
}

static void serve(struct role *role, uint32_t id, int prefetched) {
    uint64_t began = clock_nanoseconds();
    atomic_u32 *generation = &arena.layers[id / EXPERTS].residency_generation;
    int slot = residency_find(&arena, id) == SLOT_NONE ? take_slot(role) : SLOT_NONE;
    if (residency_find(&arena, id) != SLOT_NONE) {
        mask_put(&arena, arena.urgent_mask, id, 0);
        mask_put(&arena, arena.prefetch_mask, id, 0);
        futex_bump_and_wake(generation);
        return;
    }
    if (slot == SLOT_NONE) return; /* all are pinned; the bit stays */
    if (draw(role, 500) == 0) {    /* killed before it began to load: a slot is left EVICTING, or EMPTY */
        residency_recover(&arena);
        role->restarts++;
        return;
    }
    load_begin(&arena, (uint32_t)slot, id);
    uint64_t *words = slot_bytes(&arena, (uint32_t)slot);
    for (int i = 0; i < WORDS / 2; i++) words[i] = weights_of(id);
    uint32_t fate = draw(role, 1000);
    if (fate == 0) { /* killed in the middle of a load */
        residency_recover(&arena);
        role->restarts++;
        return;
    }
    if (fate == 1) { /* the disk gave up */
        mask_put(&arena, arena.failed_mask, id, 1);
        slot_release(&arena, (uint32_t)slot);
    } else {
        for (int i = WORDS / 2; i < WORDS; i++) words[i] = weights_of(id);
        load_publish(&arena, (uint32_t)slot, weights_of(id), WORDS * 8, 0, prefetched);
        role->loads++;
        role->prefetches += (uint64_t)prefetched;
    }
    futex_bump_and_wake(generation);
    latency_record(&arena, role->process, HISTOGRAM_PAGING, clock_nanoseconds() - began, 1);
}

static void *pager(void *argument) {
    struct role *role = argument;
    while (!load_relaxed(&pager_stop)) {
        for (uint32_t id = 0; id < LAYERS * EXPERTS; id++)
            if (mask_test(&arena, arena.urgent_mask, id)) serve(role, id, 0);
        uint32_t guess = draw(role, LAYERS * EXPERTS);
        if (mask_test(&arena, arena.prefetch_mask, guess)) serve(role, guess, 1);
        uint32_t slot = draw(role, arena.num_slots);
        if (draw(role, 100) == 0 && evict_begin(&arena, slot)) slot_release(&arena, slot); /* a page-out */
    }
    return NULL;
}

/* ---- metrics ---- */

static void *metrics(void *argument) {
    struct role *role = argument;
    uint64_t last = 0;
    while (!load_relaxed(&stop)) {
        uint64_t decisions = counter_total(&arena, COUNTER_ROUTING_DECISIONS);
        role->wrong_weights += decisions < last; /* totals only grow */
        last = decisions;
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            for (uint32_t expert = 0; expert < EXPERTS; expert++) {
                uint64_t slot = load_relaxed(affinity_row(&arena, layer) + expert);
                role->reads += affinity_score(&law, slot, affinity_now(&arena, layer)) <= AFFINITY_ONE;
                role->reads += (uint64_t)mask_test(&arena, arena.resident_mask, layer * EXPERTS + expert);
            }
        for (uint32_t bucket = 0; bucket < ARENA_BUCKETS; bucket++)
            role->reads += load_relaxed(histogram_row(&arena, 0, HISTOGRAM_ROUTING) + bucket);
    }
    return NULL;
}

/* ---- what must hold when all have stopped ---- */

static int wrong_at_the_end(uint64_t routed) {
    int wrong = 0;
    for (uint32_t id = 0; id < LAYERS * EXPERTS; id++) {
        int32_t slot = residency_find(&arena, id);
        wrong += mask_test(&arena, arena.resident_mask, id) != (slot != SLOT_NONE);
        wrong += (load_seq_cst(&arena.directory[id]) != 0) != (slot != SLOT_NONE);
        wrong += mask_test(&arena, arena.loading_mask, id) || is_pinned(&arena, id);
        wrong += mask_test(&arena, arena.prefetched_mask, id) && slot == SLOT_NONE;
    }
    uint64_t selections = 0;
    for (uint32_t process = 0; process < PROCESSES; process++)
        for (uint32_t layer = 0; layer < LAYERS; layer++)
            for (uint32_t expert = 0; expert < EXPERTS; expert++)
                selections += load_relaxed(activation_row(&arena, process, layer) + expert);
    wrong += selections != routed * TOP_K;
    wrong += counter_total(&arena, COUNTER_ROUTING_DECISIONS) != routed;
    wrong += counter_total(&arena, COUNTER_CACHE_HITS) + counter_total(&arena, COUNTER_CACHE_MISSES) != selections;
    return wrong;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: concurrent_core IMAGE SECONDS\n");
        return 2;
    }
    arena = arena_from_image(argv[1]);
    affinity_law_init(&law, 31. / 32, 1. / 32, 1);
    kernel_count = route_kernels(kernels);
    static struct role roles[PROCESSES];
    for (uint32_t process = 0; process < PROCESSES; process++) {
        roles[process].process = process;
        roles[process].random = UINT64_C(0x9E3779B97F4A7C15) * (process + 1);
        void *(*run)(void *) = process < WORKERS ? worker : process == PAGER ? pager : metrics;
        if (pthread_create(&roles[process].thread, NULL, run, &roles[process])) return 2;
    }
    usleep((useconds_t)(1e6 * atof(argv[2])));
    struct role sum = {0};
    store_relaxed(&stop, 1);
    for (uint32_t process = 0; process < PROCESSES; process++)
        if (process != PAGER) pthread_join(roles[process].thread, NULL);
    store_relaxed(&pager_stop, 1);
    pthread_join(roles[PAGER].thread, NULL);
    for (uint32_t process = 0; process < PROCESSES; process++) {
        const struct role *role = &roles[process];
        sum.routed += role->routed, sum.uses += role->uses, sum.waits += role->waits, sum.failures += role->failures;
        sum.loads += role->loads, sum.prefetches += role->prefetches, sum.prefetch_hits += role->prefetch_hits;
        sum.refused += role->refused, sum.restarts += role->restarts;
        sum.wrong_weights += role->wrong_weights, sum.lost_requests += role->lost_requests;
    }
    int wrong = wrong_at_the_end(sum.routed) + (sum.prefetch_hits > sum.prefetches);
    printf("routed=%lu uses=%lu waits=%lu failures=%lu loads=%lu prefetches=%lu prefetch_hits=%lu refused=%lu restarts=%lu "
           "wrong_weights=%lu lost_requests=%lu wrong_at_the_end=%d\n",
           sum.routed, sum.uses, sum.waits, sum.failures, sum.loads, sum.prefetches, sum.prefetch_hits, sum.refused,
           sum.restarts, sum.wrong_weights, sum.lost_requests, wrong);
    return sum.wrong_weights || sum.lost_requests || wrong;
}
