/* The ring of a process's recent demands, in the arena. The process is its only writer; anybody may read.
 *
 * Positions count words (demands.h) from the start and never go back; word p lies at p modulo the capacity, a power of
 * two. The writer moves `reserved` before it overwrites words and `written` after, so a reader that has copied words
 * knows whether they were being overwritten meanwhile: then it has lost them, and goes on at the newest, which begins
 * a record.
 *
 * A writer that is killed between the two leaves `reserved` ahead, of the words that it may have overwritten. Its
 * successor begins at `written` again, and leaves `reserved` where it is until it gets there. */
#ifndef HOTSET_DEMAND_RING_H
#define HOTSET_DEMAND_RING_H

#include "arena.h"
#include "demands.h"

#include <time.h>

struct demand_ring {
    atomic_u64 reserved, written;
    uint64_t unused[6];
    _Atomic uint16_t words[];
};

_Static_assert(sizeof(struct demand_ring) == 64, "shm/layout.py: DEMAND_RING_HEADER");

/* Words that a process's ring holds; 0: this arena has no rings. */
static inline uint64_t demand_ring_capacity(const struct arena *arena) {
    const struct section_entry *entry = &arena->header->sections[SECTION_DEMANDS];
    return entry->count ? (entry->stride - sizeof(struct demand_ring)) / 2 : 0;
}

static inline struct demand_ring *demand_ring_of(const struct arena *arena, uint32_t process) {
    const struct section_entry *entry = &arena->header->sections[SECTION_DEMANDS];
    return (struct demand_ring *)(arena->base + entry->offset + (uint64_t)process * entry->stride);
}

static inline uint64_t demand_put(struct demand_ring *ring, uint64_t capacity, uint64_t at, uint64_t word) {
    store_relaxed(&ring->words[at & (capacity - 1)], (uint16_t)word); /* ordered by `reserved` and `written` */
    return at + 1;
}

/* Writes one record. `streams` NULL: the rows are sets of no stream. 0 when the record is too long for the ring. */
static inline int demand_write(const struct arena *arena, uint32_t process, uint32_t layer, uint32_t rows,
                               uint32_t experts_per_row, const int32_t *streams, const int32_t *experts) {
    uint64_t capacity = demand_ring_capacity(arena);
    uint64_t length = DEMAND_HEADER_WORDS + (uint64_t)rows * (experts_per_row + 1);
    if (!capacity) return 1;
    if (length > capacity / 2 || length > UINT16_MAX) return 0;
    struct demand_ring *ring = demand_ring_of(arena, process);
    uint64_t at = load_relaxed(&ring->written), end = at + length; /* relaxed: nobody else writes it */
    if (end > load_relaxed(&ring->reserved)) store_relaxed(&ring->reserved, end);
    atomic_thread_fence(memory_order_release); /* who sees a word of this record sees `reserved` too */
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t stamp = (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
    const uint64_t header[] = {length, layer, rows, experts_per_row};
    for (uint32_t i = 0; i < 4; i++) at = demand_put(ring, capacity, at, header[i]);
    for (uint32_t i = 0; i < 4; i++) at = demand_put(ring, capacity, at, stamp >> (16 * i));
    for (uint32_t row = 0; row < rows; row++) {
        at = demand_put(ring, capacity, at, streams ? (uint64_t)streams[row] : DEMAND_NO_STREAM);
        for (uint32_t i = 0; i < experts_per_row; i++)
            at = demand_put(ring, capacity, at, (uint64_t)experts[(size_t)row * experts_per_row + i]);
    }
    store_release(&ring->written, end); /* publishes the words */
    return 1;
}

/* Words that all processes have ever written: as long as it stays the same there is nothing to read. Relaxed: a hint,
 * which no word is read by. */
static inline uint64_t demands_written(const struct arena *arena) {
    uint64_t words = 0;
    for (uint32_t process = 0; demand_ring_capacity(arena) && process < arena->num_processes; process++)
        words += load_relaxed(&demand_ring_of(arena, process)->written);
    return words;
}

/* Copies what was written since `*cursor` to `out` (of the ring's capacity) and moves the cursor; returns the words.
 * `*lost` is set when words had been overwritten: those are skipped, up to the newest. */
static inline uint64_t demand_read(const struct arena *arena, uint32_t process, uint64_t *cursor, uint16_t *out,
                                   int *lost) {
    uint64_t capacity = demand_ring_capacity(arena), from = *cursor;
    *lost = 0;
    if (!capacity) return 0;
    struct demand_ring *ring = demand_ring_of(arena, process);
    uint64_t written = load_acquire(&ring->written); /* pairs with the publishing store */
    *cursor = written;
    if (written - from > capacity) {
        *lost = 1;
        return 0;
    }
    for (uint64_t at = from; at < written; at++) *out++ = load_relaxed(&ring->words[at & (capacity - 1)]);
    atomic_thread_fence(memory_order_acquire); /* pairs with the writer's fence: a new word shows the new `reserved` */
    if (load_relaxed(&ring->reserved) - from > capacity) {
        *lost = 1;
        return 0;
    }
    return written - from;
}

#endif
