/* Latency histograms: eight buckets per power of two, so that a quantile is at most 12.5 % too high. */
#ifndef HOTSET_HISTOGRAM_H
#define HOTSET_HISTOGRAM_H

#include "counters.h"

#include <time.h>

/* The numbers are those of shm/counters.py. */
enum histogram {
    HISTOGRAM_ROUTING = 0,
    HISTOGRAM_PAGING = 1,
    HISTOGRAM_PAGE_CACHE = 2,
    HISTOGRAM_DISK = 3,
    HISTOGRAM_SLOT = 4,
    HISTOGRAM_COUNT = 5
};

/* 0..7 have a bucket each; above, the exponent and the next three bits choose. The last one takes >= 15 s. */
static inline uint32_t histogram_bucket(uint64_t nanoseconds) {
    if (nanoseconds < 8) return (uint32_t)nanoseconds;
    uint32_t exponent = 63 - (uint32_t)__builtin_clzll(nanoseconds);
    uint32_t bucket = (exponent - 2) * 8 + (uint32_t)(nanoseconds >> (exponent - 3) & 7);
    return bucket < ARENA_BUCKETS ? bucket : ARENA_BUCKETS - 1;
}

static inline atomic_u64 *histogram_row(const struct arena *arena, uint32_t process, enum histogram histogram) {
    return arena->histograms + ((size_t)process * HISTOGRAM_COUNT + histogram) * ARENA_BUCKETS;
}

/* `count` events that took `nanoseconds` in all: the bucket, and for routing and paging total and maximum. Single writer
 * per row, as all counters. */
static inline void latency_record(const struct arena *arena, uint32_t process, enum histogram histogram,
                                  uint64_t nanoseconds, uint64_t count) {
    int paging = histogram == HISTOGRAM_PAGING;
    uint64_t each = nanoseconds / count;
    atomic_u64 *row = counter_row(arena, process);
    atomic_u64 *bucket = histogram_row(arena, process, histogram) + histogram_bucket(each);
    if (paging || histogram == HISTOGRAM_ROUTING) {
        counter_add(row, paging ? COUNTER_PAGING_NANOSECONDS : COUNTER_ROUTING_NANOSECONDS, nanoseconds);
        counter_raise(row, paging ? COUNTER_PAGING_MAX_NANOSECONDS : COUNTER_ROUTING_MAX_NANOSECONDS, each);
    }
    store_relaxed(bucket, load_relaxed(bucket) + count);
}

static inline uint64_t clock_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
