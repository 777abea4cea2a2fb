/* The arena: one block of memory, shared by all processes of an instance or private to one.
 *
 * The sections are declared once, in shm/layout.py; the header page carries their table, and arena_attach()
 * turns it into the typed pointers below. enum section must list them in the same order: a test compares. */
#ifndef HOTSET_ARENA_H
#define HOTSET_ARENA_H

#include "atomics.h"

#include <stddef.h>

#define ARENA_MAGIC UINT64_C(0x0000746573746f68) /* "hotset" in little-endian: refuses a foreign byte order too */
#define ARENA_ABI_VERSION 1u
#define ARENA_HEADER_BYTES 4096u
#define ARENA_STATE_OFFSET 4032u /* the last cache line of the header page */
#define ARENA_MAX_SECTIONS 40u

enum arena_state { ARENA_BUILDING = 0, ARENA_READY = 1, ARENA_CLOSED = 2 };

enum section {
    SECTION_RESIDENT_MASK,   /* u64[layers][words]: expert is in a slot, fully loaded. Writer: pager */
    SECTION_LOADING_MASK,    /* u64[layers][words]: expert is being read from disk. Writer: pager */
    SECTION_FAILED_MASK,     /* u64[layers][words]: expert cannot be loaded; its waiters give up. Writer: pager */
    SECTION_URGENT_MASK,     /* u64[layers][words]: page-in requests. Workers set, pager clears */
    SECTION_PREFETCH_MASK,   /* u64[layers][words]: prefetch requests. Workers set, pager clears */
    SECTION_PREFETCHED_MASK, /* u64[layers][words]: loaded by a prefetch and not used since. Pager sets, first hit clears */
    SECTION_LAYERS,          /* struct layer_state[layers] */
    SECTION_AFFINITY,        /* u64[layers][experts]: [score Q0.24 | epoch 40]. Any worker, by CAS */
    SECTION_COUNTERS,        /* u64[processes][ARENA_COUNTERS]: one row per process, single writer */
    SECTION_HISTOGRAMS,      /* u64[processes][5 * ARENA_BUCKETS]: latencies, see histogram.h. Single writer a row */
    SECTION_ACTIVATIONS,     /* u64[processes][layers * experts]: how often this process selected an expert */
    SECTION_PINS,            /* u32[processes][pins]: expert id + 1 that the process wants, waits for or uses; 0 = none */
    SECTION_DIRECTORY,       /* u32[layers * experts]: slot + 1 that holds or loads the expert; 0 = none. Writer: pager */
    SECTION_SLOT_WORDS,      /* u64[slots]: [generation 32 | expert 24 | state 8]: the truth about residency. Writer: pager */
    SECTION_SLOT_INFO,       /* struct slot_info[slots]: what lies in the slot. Writer: pager, before RESIDENT */
    SECTION_SEQUENCES,       /* struct sequence_state[sequences] */
    SECTION_BLOCK_TABLES,    /* u32[sequences][groups][blocks]: page ids, before granted_blocks. Writer: coordinator */
    SECTION_TOKEN_IDS,       /* i32[sequences][max_model_len]: prompt by the coordinator, the rest by the serving worker */
    SECTION_PAGE_GENERATIONS,/* u32[pages + 1]: how often a page was handed out: see kv_page.h. Writer: coordinator */
    SECTION_KV_PAGES,        /* bytes[pages + 1][page_nbytes]; page 0 is never handed out */
    SECTION_EXPERT_SLOTS,    /* bytes[pages][4096]: slot after slot, in classes of one size: Geometry in shm/geometry.py */
    SECTION_DEMANDS,         /* struct demand_ring[processes]: which experts its steps used. Single writer a row */
    SECTION_USER_PINS,       /* u64[layers][words]: expert that the user wants in memory. Writer: coordinator */
    SECTION_COUNT
};

struct section_entry {
    char name[24];
    uint64_t offset; /* bytes from the start of the arena; a multiple of 64 */
    uint64_t length; /* bytes */
    uint32_t stride; /* bytes from one row to the next */
    uint32_t count;  /* rows */
};

struct arena_header {
    uint64_t magic;
    uint32_t abi_version;
    uint32_t crc; /* of the header page with this field and the state word zero */
    uint64_t total_nbytes;
    uint64_t layout_hash;
    uint8_t instance_uuid[16];
    uint8_t boot_id[16];
    uint64_t creator_pid;
    uint64_t creator_start_time; /* clock ticks after boot: tells a reused pid from the creator */
    uint32_t num_layers, num_experts, num_processes, pins_per_process;
    uint32_t num_slots, num_pages, max_sequences, section_count;
    struct section_entry sections[ARENA_MAX_SECTIONS];
};

/* Per layer. The futex word has a cache line of its own: it changes with page-ins, the rest with every route. */
struct layer_state {
    atomic_u64 affinity_epoch;
    atomic_u32 logit_range; /* float bits: running mean of max - min of the gate logits (Cache-Prior); 0 = no row seen */
    atomic_u32 expert_norm; /* float bits: running mean of the norms of the experts' outputs; 0 = no row seen */
    uint32_t reserved_route[12];
    atomic_u32 residency_generation; /* futex: bumped whenever an expert of the layer became resident or failed */
    uint32_t reserved_futex[15];
};

struct slot_info {
    uint64_t checksum; /* xxh3-64 of the loaded bytes */
    uint32_t nbytes;
    uint16_t format; /* how the weights are stored: see shm/layout.py WeightFormat */
    uint16_t source; /* who asked for it before it was needed: see shm/layout.py PrefetchSource; 0 if nobody did */
};

/* Per sequence: what coordinator and serving worker tell each other.
 * Invariant: KV rows of positions < committed and token ids of positions <= committed are written. */
struct sequence_state {
    atomic_u64 committed;      /* positions with KV rows; stored with release after them. Writer: serving worker */
    atomic_u32 granted_blocks; /* valid entries of the block table; stored with release. Writer: coordinator */
    uint32_t reserved[13];
};

#define ARENA_COUNTERS 128u
#define ARENA_BUCKETS 256u

struct arena {
    uint8_t *base;
    uint64_t nbytes;
    struct arena_header *header;
    atomic_u32 *state;
    uint32_t num_layers, num_experts, num_processes, pins_per_process, num_slots, max_sequences;
    uint32_t mask_words; /* u64 words per layer in every mask */
    uint32_t mask_stride; /* u64 words from one layer's mask to the next */
    uint32_t affinity_stride; /* u64 from one layer to the next */
    uint32_t pin_stride; /* u32 from one process to the next */
    atomic_u64 *resident_mask, *loading_mask, *failed_mask, *urgent_mask, *prefetch_mask, *prefetched_mask, *user_pins;
    struct layer_state *layers;
    atomic_u64 *affinity, *counters, *histograms, *activations, *slot_words;
    atomic_u32 *pins, *directory, *page_generations;
    struct slot_info *slot_info;
    struct sequence_state *sequences;
};

_Static_assert(sizeof(struct section_entry) == 48, "mirrored in shm/layout.py");
_Static_assert(sizeof(struct layer_state) == 128 && sizeof(struct slot_info) == 16, "mirrored in shm/layout.py");
_Static_assert(sizeof(struct sequence_state) == 64, "one cache line each: two writers must not share one");
_Static_assert(sizeof(struct arena_header) <= ARENA_STATE_OFFSET, "the state word has its own cache line");

static inline void *arena_section(const struct arena *arena, enum section section) {
    return arena->base + arena->header->sections[section].offset;
}

/* Fills `arena` from the header at `base`. Returns NULL, or why the memory is not an arena of this build. */
static inline const char *arena_attach(struct arena *arena, void *base, uint64_t nbytes) {
    struct arena_header *header = base;
    if (nbytes < ARENA_HEADER_BYTES) return "is smaller than an arena header";
    if (header->magic != ARENA_MAGIC) return "does not begin with hotset's magic number";
    if (header->abi_version != ARENA_ABI_VERSION) return "was made by another version of hotset";
    if (header->total_nbytes > nbytes) return "is shorter than its header says";
    if (header->section_count != SECTION_COUNT) return "has another number of sections than this version";
    for (uint32_t i = 0; i < SECTION_COUNT; i++) {
        const struct section_entry *entry = &header->sections[i];
        if (entry->offset % 64 || entry->offset > nbytes || entry->length > nbytes - entry->offset)
            return "has a section outside of its memory";
    }
    arena->base = base;
    arena->nbytes = header->total_nbytes;
    arena->header = header;
    arena->state = (atomic_u32 *)((uint8_t *)base + ARENA_STATE_OFFSET);
    arena->num_layers = header->num_layers;
    arena->num_experts = header->num_experts;
    arena->num_processes = header->num_processes;
    arena->pins_per_process = header->pins_per_process;
    arena->num_slots = header->num_slots;
    arena->max_sequences = header->max_sequences;
    arena->mask_words = (header->num_experts + 63) / 64;
    arena->mask_stride = header->sections[SECTION_RESIDENT_MASK].stride / 8;
    arena->affinity_stride = header->sections[SECTION_AFFINITY].stride / 8;
    arena->pin_stride = header->sections[SECTION_PINS].stride / 4;
    arena->resident_mask = arena_section(arena, SECTION_RESIDENT_MASK);
    arena->loading_mask = arena_section(arena, SECTION_LOADING_MASK);
    arena->failed_mask = arena_section(arena, SECTION_FAILED_MASK);
    arena->urgent_mask = arena_section(arena, SECTION_URGENT_MASK);
    arena->prefetch_mask = arena_section(arena, SECTION_PREFETCH_MASK);
    arena->prefetched_mask = arena_section(arena, SECTION_PREFETCHED_MASK);
    arena->user_pins = arena_section(arena, SECTION_USER_PINS);
    arena->layers = arena_section(arena, SECTION_LAYERS);
    arena->affinity = arena_section(arena, SECTION_AFFINITY);
    arena->counters = arena_section(arena, SECTION_COUNTERS);
    arena->histograms = arena_section(arena, SECTION_HISTOGRAMS);
    arena->activations = arena_section(arena, SECTION_ACTIVATIONS);
    arena->pins = arena_section(arena, SECTION_PINS);
    arena->directory = arena_section(arena, SECTION_DIRECTORY);
    arena->page_generations = arena_section(arena, SECTION_PAGE_GENERATIONS);
    arena->slot_words = arena_section(arena, SECTION_SLOT_WORDS);
    arena->slot_info = arena_section(arena, SECTION_SLOT_INFO);
    arena->sequences = arena_section(arena, SECTION_SEQUENCES);
    return NULL;
}

/* The mask word that holds `expert` of `layer`, and its bit. */
static inline atomic_u64 *mask_word(const struct arena *arena, atomic_u64 *mask, uint32_t layer, uint32_t expert) {
    return mask + (size_t)layer * arena->mask_stride + expert / 64;
}

static inline uint64_t mask_bit(uint32_t expert) { return UINT64_C(1) << (expert % 64); }

#endif
