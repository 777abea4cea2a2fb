/* The end of a load: the lane that brings its last byte publishes it, so that who waits for it need not wait for the
 * pager's main thread, which is Python, to wake.
 *
 * Under the lanes' lock, in one with the decision that the load is finished. So whatever the main thread decided before
 * (a prefetch was given up, or became urgent) holds here, and it finds a load either under way or wholly published. */
#ifndef HOTSET_PUBLISH_H
#define HOTSET_PUBLISH_H

#include "lanes.h"

/* Whether readers may have it. The first whole read defines the checksum where none is known. */
static inline bool load_is_right(const struct load *load) {
    return !load->error && !load->cancelled && (!load->is_known || load->checksum == load->expected);
}

/* In the pager's row: these counters and histograms are written under the lanes' lock alone. */
static inline void lanes_count(const struct lanes *lanes, const struct load *load) {
    const struct arena *arena = lanes->arena;
    atomic_u64 *row = counter_row(arena, lanes->process);
    counter_add(row, load->urgent       ? COUNTER_URGENT_PAGE_INS
                     : load->warm_start ? COUNTER_WARM_PAGE_INS
                                        : COUNTER_PREFETCH_PAGE_INS, 1);
    counter_add(row, COUNTER_BYTES_READ, load->nbytes);
    counter_add(row, load->from_disk ? COUNTER_DISK_PAGE_INS : COUNTER_PAGE_CACHE_PAGE_INS, 1);
    if (load->source) {
        counter_add(row, prefetch_counter(load->source, PREFETCH_COUNT_PAGE_INS), 1);
        if (load->urgent) counter_add(row, prefetch_counter(load->source, PREFETCH_COUNT_LATE_HITS), 1);
    }
    if (!load->urgent) return;
    uint64_t now = clock_nanoseconds(), took = now > load->began ? now - load->began : 0;
    latency_record(arena, lanes->process, HISTOGRAM_PAGING, took, 1);
    latency_record(arena, lanes->process, load->from_disk ? HISTOGRAM_DISK : HISTOGRAM_PAGE_CACHE, took, 1);
}

/* The futex of its layer, to be bumped after unlocking. A prefetch that somebody waits for counts as theirs. */
static inline atomic_u32 *lanes_publish(const struct lanes *lanes, struct load *load) {
    const struct arena *arena = lanes->arena;
    lanes_count(lanes, load); /* first: who is woken may look */
    uint16_t source = load->urgent || load->warm_start ? 0 : load->source;
    load_publish(arena, load->slot_number, load->checksum, (uint32_t)load->nbytes, load->format, source);
    load->published = true;
    return &arena->layers[load->id / arena->num_experts].residency_generation;
}

/* Nothing of the load is unread, and nobody is at it any more. Returns whom to wake after unlocking, or NULL; whether to
 * tell the main thread, in `tell`: of what is published, only when that changes what it can do. */
static inline atomic_u32 *lanes_finish(const struct lanes *lanes, struct load *load, bool *tell) {
    atomic_u32 *generation = lanes->arena && load_is_right(load) ? lanes_publish(lanes, load) : NULL;
    load->finished = true;
    *tell = !load->published || !load->urgent || lanes->tells_all || !lanes_urgent_under_way(lanes);
    return generation;
}

#endif
