/* Sleeping until an expert of a layer arrives: a futex on layer_state.residency_generation.
 * Not FUTEX_PRIVATE: waiter and waker are different processes. */
#ifndef HOTSET_FUTEX_H
#define HOTSET_FUTEX_H

#include "atomics.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Returns when *word != seen, when woken, after `timeout_ns`, or on a signal: the caller looks again in any case. */
static inline void futex_wait(atomic_u32 *word, uint32_t seen, uint64_t timeout_ns) {
    struct timespec timeout = {(time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u)};
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT, seen, &timeout, NULL, 0);
}

/* The bump comes first: a waiter that read the old value and is about to sleep then fails the kernel's comparison. */
static inline void futex_bump_and_wake(atomic_u32 *word) {
    atomic_fetch_add_explicit(word, 1, memory_order_seq_cst);
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

#endif
