/* Which experts are in memory, and the protocol that keeps one from being overwritten while it is used.
 *
 * Slot word [generation 32 | expert 24 | state 8], written by the pager alone, and there by one thread at a time (R5):
 *
 *     EMPTY -> LOADING -> RESIDENT -> EVICTING -> LOADING ...      (an EVICTING slot that is pinned: back to RESIDENT)
 *
 * Invariants
 *   R1  A slot's bytes change only while its word says LOADING.
 *   R2  A pinned expert that is RESIDENT stays RESIDENT: pin and check, on the worker's side, and EVICTING and
 *       read pins, on the pager's, are each "store mine, then load theirs", all four seq_cst. With release and
 *       acquire both sides may read the old value, and the reader computes with half-overwritten weights
 *       (seen 74,737 times in 3 s on x86; a store may pass a later load there).
 *   R3  A request is never lost: its bit is cleared only after LOADING (or RESIDENT) with the expert's id is
 *       stored, so at every instant a wanted expert has its bit set, or is LOADING, or is RESIDENT. Clearing the
 *       bit before LOADING, or for a prefetch, which may be given up, loses a request (tests/race explores both).
 *   R4  Masks and directory are derived from the slot words and rebuilt from them when the pager restarts.
 *   R5  A LOADING slot belongs to the pager's read lanes: the lane that ends the load calls load_publish(), which also
 *       writes the expert's mask bits. All other slot words, and the directory, are the main thread's. The lanes' lock
 *       hands the slot over: to them when the load is begun, back when its end is taken note of. Under it the lane
 *       decides and publishes in one, so that no load is published of which the main thread has been promised that it
 *       will not be (a prefetch that was given up), or that was read wrong (workers/reading/core/publish.h).
 *
 * Experts are named by `id` = layer * num_experts + expert throughout. */
#ifndef HOTSET_RESIDENCY_H
#define HOTSET_RESIDENCY_H

#include "arena.h"

enum slot_state { SLOT_EMPTY = 0, SLOT_LOADING = 1, SLOT_RESIDENT = 2, SLOT_EVICTING = 3 };

#define SLOT_NONE (-1)

static inline uint64_t slot_word(uint32_t generation, uint32_t id, enum slot_state state) {
    return (uint64_t)generation << 32 | (uint64_t)(id & 0xFFFFFFu) << 8 | state;
}
static inline enum slot_state slot_word_state(uint64_t word) { return (enum slot_state)(word & 0xFF); }
static inline uint32_t slot_word_expert(uint64_t word) { return (uint32_t)(word >> 8) & 0xFFFFFFu; }
static inline uint32_t slot_word_generation(uint64_t word) { return (uint32_t)(word >> 32); }

static inline atomic_u32 *pin_row(const struct arena *arena, uint32_t process) {
    return arena->pins + (size_t)process * arena->pin_stride;
}

/* ---- the worker's side ---- */

/* Rule 1, want. seq_cst: must not sink below the check (R2). */
static inline void pin_set(const struct arena *arena, uint32_t process, uint32_t pin, uint32_t id) {
    store_seq_cst(&pin_row(arena, process)[pin], id + 1);
}

/* Release: the reads of the slot's bytes must not sink below, where the pager may overwrite them. */
static inline void pin_clear(const struct arena *arena, uint32_t process, uint32_t pin) {
    store_release(&pin_row(arena, process)[pin], 0);
}

/* Rule 2, check: the slot that holds `id`, or SLOT_NONE. Only meaningful while the caller pins `id`.
 * The directory is a hint; the slot word, which names its expert, decides. seq_cst: see R2. */
static inline int32_t residency_find(const struct arena *arena, uint32_t id) {
    uint32_t entry = load_seq_cst(&arena->directory[id]);
    if (entry == 0 || entry > arena->num_slots) return SLOT_NONE;
    uint64_t word = load_seq_cst(&arena->slot_words[entry - 1]);
    if (slot_word_state(word) != SLOT_RESIDENT || slot_word_expert(word) != id) return SLOT_NONE;
    return (int32_t)(entry - 1);
}

/* The user wants `id` in memory, or does not care any more. Then it is asked for as by a worker: before EVICTING the
 * pager sees the bit, and what went a moment earlier is loaded again. */
static inline void user_pin_put(const struct arena *arena, uint32_t id, int pinned) {
    uint32_t expert = id % arena->num_experts;
    atomic_u64 *word = mask_word(arena, arena->user_pins, id / arena->num_experts, expert);
    uint64_t bits = load_relaxed(word); /* relaxed: the coordinator is the only writer */
    store_seq_cst(word, pinned ? bits | mask_bit(expert) : bits & ~mask_bit(expert));
}

/* Sets the bit of `id` in `mask`; 1 if it was clear, and the caller is the one who sends the message.
 * seq_cst: follows the second check of rule 3 in program order and must stay there. */
static inline int request_set(const struct arena *arena, atomic_u64 *mask, uint32_t id) {
    uint32_t expert = id % arena->num_experts;
    uint64_t bit = mask_bit(expert);
    return (fetch_or_seq_cst(mask_word(arena, mask, id / arena->num_experts, expert), bit) & bit) == 0;
}

static inline int mask_test(const struct arena *arena, atomic_u64 *mask, uint32_t id) {
    uint32_t expert = id % arena->num_experts;
    return (load_acquire(mask_word(arena, mask, id / arena->num_experts, expert)) & mask_bit(expert)) != 0;
}

/* The first hit on a prefetched expert counts for the prefetch, and only the first: fetch_and names one winner. */
static inline int prefetched_take(const struct arena *arena, uint32_t id) {
    uint32_t expert = id % arena->num_experts;
    atomic_u64 *word = mask_word(arena, arena->prefetched_mask, id / arena->num_experts, expert);
    uint64_t bit = mask_bit(expert);
    if ((load_relaxed(word) & bit) == 0) return 0; /* a load is far cheaper than the locked operation, and mostly enough */
    return (fetch_and_seq_cst(word, ~bit) & bit) != 0;
}

/* ---- the pager's side ---- */

static inline void mask_put(const struct arena *arena, atomic_u64 *mask, uint32_t id, int value) {
    uint32_t expert = id % arena->num_experts;
    atomic_u64 *word = mask_word(arena, mask, id / arena->num_experts, expert);
    /* Atomic although some masks have one writer: request and prefetched words have others. */
    if (value) fetch_or_seq_cst(word, mask_bit(expert));
    else fetch_and_seq_cst(word, ~mask_bit(expert));
}

static inline int is_pinned(const struct arena *arena, uint32_t id) {
    /* seq_cst, as the rows below: a user's pin, like a worker's, is set first and then asked for (R2, R3). */
    uint32_t expert = id % arena->num_experts;
    if (load_seq_cst(mask_word(arena, arena->user_pins, id / arena->num_experts, expert)) & mask_bit(expert)) return 1;
    for (uint32_t process = 0; process < arena->num_processes; process++) {
        const atomic_u32 *row = pin_row(arena, process);
        for (uint32_t pin = 0; pin < arena->pins_per_process; pin++)
            if (load_seq_cst(&row[pin]) == id + 1) return 1;
    }
    return 0;
}

/* Rule 6: RESIDENT -> EVICTING if nobody pins the slot's expert; 0 (and RESIDENT again) if somebody does. */
static inline int evict_begin(const struct arena *arena, uint32_t slot) {
    uint64_t word = load_relaxed(&arena->slot_words[slot]); /* relaxed: the caller is the only writer, see R5 */
    uint32_t id = slot_word_expert(word), generation = slot_word_generation(word);
    if (slot_word_state(word) != SLOT_RESIDENT) return 0;
    mask_put(arena, arena->resident_mask, id, 0); /* first, so that routers stop preferring it */
    store_seq_cst(&arena->slot_words[slot], slot_word(generation, id, SLOT_EVICTING)); /* before the pins are read: R2 */
    if (is_pinned(arena, id)) {
        store_seq_cst(&arena->slot_words[slot], slot_word(generation, id, SLOT_RESIDENT));
        mask_put(arena, arena->resident_mask, id, 1);
        return 0;
    }
    mask_put(arena, arena->prefetched_mask, id, 0);
    return 1;
}

/* Frees an EVICTING slot (page-out), or a LOADING one whose read failed or, of a prefetch, was given up. */
static inline void slot_release(const struct arena *arena, uint32_t slot) {
    uint64_t word = load_relaxed(&arena->slot_words[slot]);
    uint32_t id = slot_word_expert(word);
    if (load_relaxed(&arena->directory[id]) == slot + 1) store_seq_cst(&arena->directory[id], 0);
    mask_put(arena, arena->loading_mask, id, 0);
    store_seq_cst(&arena->slot_words[slot], slot_word(slot_word_generation(word) + 1, 0, SLOT_EMPTY));
}

static inline void slot_to_loading(const struct arena *arena, uint32_t slot, uint32_t id) {
    uint64_t word = load_relaxed(&arena->slot_words[slot]);
    uint32_t previous = slot_word_expert(word);
    if (slot_word_state(word) == SLOT_EVICTING && load_relaxed(&arena->directory[previous]) == slot + 1)
        store_seq_cst(&arena->directory[previous], 0);
    store_seq_cst(&arena->slot_words[slot], slot_word(slot_word_generation(word) + 1, id, SLOT_LOADING));
    store_seq_cst(&arena->directory[id], slot + 1);
    mask_put(arena, arena->loading_mask, id, 1);
}

/* Rule 4: the EMPTY or EVICTING `slot` begins to load `id`; only then the request bits are cleared (R3). */
static inline void load_begin(const struct arena *arena, uint32_t slot, uint32_t id) {
    slot_to_loading(arena, slot, id);
    mask_put(arena, arena->urgent_mask, id, 0);
    mask_put(arena, arena->prefetch_mask, id, 0);
}

/* The same for a prefetch. It may be given up, so an urgent request that has come meanwhile keeps its bit: it is
 * answered by making the load urgent, after which it is not given up. */
static inline void prefetch_begin(const struct arena *arena, uint32_t slot, uint32_t id) {
    slot_to_loading(arena, slot, id);
    mask_put(arena, arena->prefetch_mask, id, 0);
}

/* Rule 5: everything about a loaded slot is written before RESIDENT (release), which is what readers look at. */
static inline void load_publish(const struct arena *arena, uint32_t slot, uint64_t checksum, uint32_t nbytes,
                                uint16_t format, uint16_t source) {
    uint64_t word = load_relaxed(&arena->slot_words[slot]); /* relaxed: the lock of R5 comes after LOADING was stored */
    uint32_t id = slot_word_expert(word);
    arena->slot_info[slot] = (struct slot_info){checksum, nbytes, format, source};
    if (source) mask_put(arena, arena->prefetched_mask, id, 1);
    store_release(&arena->slot_words[slot], slot_word(slot_word_generation(word), id, SLOT_RESIDENT));
    mask_put(arena, arena->resident_mask, id, 1);
    mask_put(arena, arena->loading_mask, id, 0);
    mask_put(arena, arena->failed_mask, id, 0); /* an earlier attempt may have failed */
}

/* Rule 7: makes sense of what a killed pager left, in this order: no slot is handed out before it has run. */
static inline void residency_recover(const struct arena *arena) {
    for (uint32_t id = 0; id < arena->num_layers * arena->num_experts; id++) {
        mask_put(arena, arena->loading_mask, id, 0);
        /* A right entry is left alone, so that running workers go on hitting while the pager restarts. */
        if (residency_find(arena, id) != SLOT_NONE) continue;
        store_seq_cst(&arena->directory[id], 0);
        mask_put(arena, arena->resident_mask, id, 0);
    }
    for (uint32_t slot = 0; slot < arena->num_slots; slot++) {
        uint64_t word = load_seq_cst(&arena->slot_words[slot]);
        uint32_t id = slot_word_expert(word), generation = slot_word_generation(word);
        switch (slot_word_state(word)) {
        case SLOT_LOADING: /* half-read: somebody may wait for it, so it is asked for again before the slot is free */
            request_set(arena, arena->urgent_mask, id);
            mask_put(arena, arena->prefetched_mask, id, 0); /* else the next load, an urgent one, would count as a hit */
            store_seq_cst(&arena->slot_words[slot], slot_word(generation + 1, 0, SLOT_EMPTY));
            break;
        case SLOT_EVICTING: /* its bytes are whole: R1 */
            store_seq_cst(&arena->slot_words[slot], slot_word(generation, id, SLOT_RESIDENT));
            /* fall through */
        case SLOT_RESIDENT:
            store_seq_cst(&arena->directory[id], slot + 1);
            mask_put(arena, arena->resident_mask, id, 1);
            break;
        case SLOT_EMPTY:
            break;
        }
    }
}

#endif
