/* Whose bytes a KV page holds: its generation counts how often it was handed out. As in a seqlock, the number changes
 * before the bytes do, so a reader from outside that takes it, copies the page and finds the same number again has the
 * bytes of one owner (shm/page_reader.py):
 *
 *   coordinator  generation | block table, granted_blocks (release)     or, in compaction: generation | rows
 *   worker       granted_blocks (acquire), block table | rows, committed (release)
 *   reader       generation | rows | generation
 *
 * A bar is one of the orders that this file makes; x86 would keep them without being told, other processors do not. */
#ifndef HOTSET_KV_PAGE_H
#define HOTSET_KV_PAGE_H

#include "atomics.h"

/* By the coordinator, before it tells anybody of the new owner. */
static inline void kv_page_hand_out(atomic_u32 *generation, uint32_t value) {
    store_relaxed(generation, value); /* ordered by the fence, which a release store would not be with what follows it */
    atomic_thread_fence(memory_order_release); /* before the rows that compaction copies into the page next */
}

/* By a worker, after it has read granted_blocks with acquire and before it writes rows. */
static inline void kv_page_begin_rows(void) {
    atomic_thread_fence(memory_order_release); /* hands the generation on: whoever sees a row sees the number too */
}

/* By a reader, before and after it copies rows. */
static inline uint32_t kv_page_generation(const atomic_u32 *generation) {
    atomic_thread_fence(memory_order_acquire); /* after the rows copied before */
    return load_acquire(generation);           /* before the rows copied next */
}

#endif
