/* Counters: one row per process in the arena, written by that process alone; readers add the rows up.
 * The numbers are those of shm/counters.py: a test compares. */
#ifndef HOTSET_COUNTERS_H
#define HOTSET_COUNTERS_H

#include "arena.h"

enum counter {
    COUNTER_ROUTING_DECISIONS = 0,
    COUNTER_CACHE_HITS = 1,
    COUNTER_CACHE_MISSES = 2,
    COUNTER_NAN_LOGITS = 3,
    COUNTER_ROWS_WITHOUT_FINITE_LOGIT = 4,
    COUNTER_SELECTIONS_CHANGED = 5,
    COUNTER_LOST_MASS_Q32 = 6,
    COUNTER_ROUTING_NANOSECONDS = 7,
    COUNTER_ROUTING_MAX_NANOSECONDS = 8,
    COUNTER_URGENT_PAGE_INS = 32,
    COUNTER_PREFETCH_PAGE_INS = 33,
    COUNTER_EVICTIONS = 35,
    COUNTER_EVICTIONS_REFUSED = 36,
    COUNTER_BYTES_READ = 37,
    COUNTER_PAGING_NANOSECONDS = 38,
    COUNTER_PAGING_MAX_NANOSECONDS = 39,
    COUNTER_WARM_PAGE_INS = 41,
    COUNTER_PAGE_CACHE_PAGE_INS = 42,
    COUNTER_DISK_PAGE_INS = 43,
};

#define PREFETCH_OF_SOURCE 64u
#define PREFETCH_SOURCES ((ARENA_COUNTERS - PREFETCH_OF_SOURCE) / PREFETCH_COUNTS) /* that a row has room for */

/* What is counted of each source of prefetches. */
enum prefetch_count {
    PREFETCH_COUNT_REQUESTS = 0,
    PREFETCH_COUNT_PAGE_INS = 1,
    PREFETCH_COUNT_HITS = 2,
    PREFETCH_COUNT_LATE_HITS = 3,
    PREFETCH_COUNTS = 4
};

/* Index in a process's row. */
static inline enum counter prefetch_counter(uint16_t source, enum prefetch_count count) {
    return (enum counter)(PREFETCH_OF_SOURCE + PREFETCH_COUNTS * source + count);
}

static inline atomic_u64 *counter_row(const struct arena *arena, uint32_t process) {
    return arena->counters + (size_t)process * ARENA_COUNTERS;
}

/* Not a fetch_add: the row has one writer, so a load and a store cannot lose anything. */
static inline void counter_add(atomic_u64 *row, enum counter counter, uint64_t amount) {
    store_relaxed(&row[counter], load_relaxed(&row[counter]) + amount);
}

static inline void counter_raise(atomic_u64 *row, enum counter counter, uint64_t value) {
    if (value > load_relaxed(&row[counter])) store_relaxed(&row[counter], value);
}

/* How often `process` selected each expert of the layer. */
static inline atomic_u64 *activation_row(const struct arena *arena, uint32_t process, uint32_t layer) {
    size_t stride = arena->header->sections[SECTION_ACTIVATIONS].stride / 8;
    return arena->activations + process * stride + (size_t)layer * arena->num_experts;
}

/* Over all processes: the sum, or for the counters that hold an extreme the largest. */
static inline uint64_t counter_total(const struct arena *arena, enum counter counter) {
    int largest = counter == COUNTER_ROUTING_MAX_NANOSECONDS || counter == COUNTER_PAGING_MAX_NANOSECONDS;
    uint64_t total = 0;
    for (uint32_t process = 0; process < arena->num_processes; process++) {
        uint64_t value = load_relaxed(&counter_row(arena, process)[counter]);
        total = !largest ? total + value : value > total ? value : total;
    }
    return total;
}

#endif
