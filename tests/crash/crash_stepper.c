/* Kills an operation on the arena after every one of its instructions, recovers, and checks the invariants R1 to R5
 * of residency.h and A1 of affinity.h. A pager's recovery is killed in turn, wherever it changed the arena.
 *
 *     crash_stepper IMAGE OPERATION          kills after each instruction that changed the arena: what a killed
 *                                            process leaves is memory, so these are all the different outcomes
 *     crash_stepper IMAGE OPERATION every    kills after every instruction: the same, taking no one's word for it
 *     crash_stepper IMAGE list               names the operations
 *
 * The image has 1 layer of 6 experts, 3 processes with 2 pins, 3 slots of 64 bytes. In every scene process 0 is the
 * worker that may die and process 1 one that lives: it uses expert 2 and waits for expert 0, which is absent.
 * Operations whose name begins with "planted-" have a mistake; it must be found. Prints the counts as key=value and
 * the first violation; exit status 1 if there is one, 77 if this system forbids ptrace. */
#define _GNU_SOURCE
#include "affinity.h"
#include "arena_image.h"
#include "futex.h"
#include "publish.h"
#include "residency.h"

#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

enum { DYING_WORKER = 0, LIVING_WORKER = 1 };
enum { AWAITED = 0, VICTIM = 1, IN_USE = 2, OTHER = 3, UNWANTED = 4, PREFETCHED = 5, EXPERTS = 6 };
#define SLOT_WORDS 8

static struct arena arena;
static struct affinity_law law;

/* ---- what the processes do, as runtime/expert_pins.py and workers/pager.py do it ---- */

static uint64_t weights_of(uint32_t id) { return UINT64_C(0x0101010101010101) * (id + 1); }

static void read_from_disk(uint32_t slot, uint32_t id) {
    for (int i = 0; i < SLOT_WORDS; i++) ((volatile uint64_t *)slot_bytes(&arena, slot))[i] = weights_of(id);
}

static void load(uint32_t slot, uint32_t id, int prefetched) {
    (prefetched ? prefetch_begin : load_begin)(&arena, slot, id);
    read_from_disk(slot, id);
    load_publish(&arena, slot, weights_of(id), SLOT_WORDS * 8, 0, prefetched);
    futex_bump_and_wake(&arena.layers[0].residency_generation);
}

static void worker_waits(void) {
    pin_set(&arena, DYING_WORKER, 0, UNWANTED);
    if (residency_find(&arena, UNWANTED) != SLOT_NONE) return;
    load_seq_cst(&arena.layers[0].residency_generation);
    if (residency_find(&arena, UNWANTED) == SLOT_NONE) request_set(&arena, arena.urgent_mask, UNWANTED);
}

static void worker_joins_a_wait(void) {
    pin_set(&arena, DYING_WORKER, 1, AWAITED);
    if (residency_find(&arena, AWAITED) == SLOT_NONE) request_set(&arena, arena.urgent_mask, AWAITED);
}

static void worker_computes(void) {
    pin_set(&arena, DYING_WORKER, 0, VICTIM);
    int32_t slot = residency_find(&arena, VICTIM);
    if (slot != SLOT_NONE && prefetched_take(&arena, VICTIM)) (void)*(volatile uint64_t *)slot_bytes(&arena, (uint32_t)slot);
    pin_clear(&arena, DYING_WORKER, 0);
}

static void worker_asks_for_a_prefetch(void) { request_set(&arena, arena.prefetch_mask, PREFETCHED); }

static void worker_counts_an_activation(void) {
    uint64_t now = affinity_advance(&arena, 0, 1);
    affinity_merge(&law, affinity_row(&arena, 0) + VICTIM, law.boost_q24, now);
    affinity_merge(&law, affinity_row(&arena, 0) + IN_USE, law.boost_q24, now);
}

static void pager_replaces(void) {
    if (evict_begin(&arena, 1)) _exit(3); /* the living worker uses what is there */
    if (evict_begin(&arena, 0)) load(0, AWAITED, 0);
}

static void pager_prefetches(void) {
    if (evict_begin(&arena, 2)) load(2, PREFETCHED, 1);
}

/* Two lanes read at the same time, and the one that was begun first ends last. */
static void pager_loads_two_at_once(void) {
    if (!evict_begin(&arena, 0)) return;
    load_begin(&arena, 0, AWAITED);
    if (!evict_begin(&arena, 2)) return;
    load_begin(&arena, 2, UNWANTED);
    slot_bytes(&arena, 0)[0] = weights_of(AWAITED);
    read_from_disk(2, UNWANTED);
    load_publish(&arena, 2, weights_of(UNWANTED), SLOT_WORDS * 8, 0, 0);
    read_from_disk(0, AWAITED);
    load_publish(&arena, 0, weights_of(AWAITED), SLOT_WORDS * 8, 0, 0);
    futex_bump_and_wake(&arena.layers[0].residency_generation);
}

/* A prefetch is given up half-way, and its slot goes to a request that somebody waits for. */
static void pager_gives_way(void) {
    if (!evict_begin(&arena, 2)) return;
    prefetch_begin(&arena, 2, PREFETCHED);
    slot_bytes(&arena, 2)[0] = weights_of(PREFETCHED);
    slot_release(&arena, 2);
    load(2, AWAITED, 0);
}

/* A load as its lane ends it, all bytes read or given up; the lanes have no threads, the process is the lane. */
static struct lanes lanes = {.arena = &arena, .lock = PTHREAD_MUTEX_INITIALIZER};

static struct load whole(uint32_t slot, uint32_t id) {
    return (struct load){.id = id, .slot_number = slot, .nbytes = SLOT_WORDS * 8, .urgent = true,
                         .checksum = weights_of(id), .is_known = true, .expected = weights_of(id)};
}

static void lane_ends(struct load *load) {
    bool tell;
    pthread_mutex_lock(&lanes.lock);
    atomic_u32 *generation = lanes_finish(&lanes, load, &tell);
    pthread_mutex_unlock(&lanes.lock);
    if (generation) futex_bump_and_wake(generation);
}

/* The main thread is in the middle of something else. */
static void pager_lane_publishes(void) {
    if (!evict_begin(&arena, 0)) return;
    load_begin(&arena, 0, AWAITED);
    read_from_disk(0, AWAITED);
    if (!evict_begin(&arena, 2)) return;
    struct load load = whole(0, AWAITED);
    lane_ends(&load);
    load_begin(&arena, 2, UNWANTED);
}

/* A prefetch that somebody came to wait for counts as theirs. */
static void pager_lane_publishes_what_was_overtaken(void) {
    if (!evict_begin(&arena, 2)) return;
    prefetch_begin(&arena, 2, AWAITED);
    mask_put(&arena, arena.urgent_mask, AWAITED, 0);
    read_from_disk(2, AWAITED);
    struct load load = whole(2, AWAITED);
    load.source = 1;
    lane_ends(&load);
}

/* As its lane ends it: begun, half read, and cancelled. */
static struct load given_up_prefetch(uint32_t slot) {
    prefetch_begin(&arena, slot, PREFETCHED);
    slot_bytes(&arena, slot)[0] = weights_of(PREFETCHED);
    struct load load = whole(slot, PREFETCHED);
    load.urgent = false;
    load.cancelled = true;
    return load;
}

static void pager_lane_ends_what_was_given_up(void) {
    if (!evict_begin(&arena, 2)) return;
    struct load load = given_up_prefetch(2);
    lane_ends(&load);
    slot_release(&arena, 2);
    load_begin(&arena, 2, AWAITED);
    read_from_disk(2, AWAITED);
    load = whole(2, AWAITED);
    lane_ends(&load);
}

static void pager_lane_read_something_else(void) { /* than what was packed: it is tried again */
    if (!evict_begin(&arena, 0)) return;
    load_begin(&arena, 0, AWAITED);
    slot_bytes(&arena, 0)[0] = weights_of(AWAITED);
    struct load load = whole(0, AWAITED);
    load.checksum ^= 1;
    lane_ends(&load);
    read_from_disk(0, AWAITED);
    load = whole(0, AWAITED);
    lane_ends(&load);
}

static void pager_is_overtaken(void) { /* what it prefetches is wanted meanwhile: the load goes on, for the waiter */
    if (!evict_begin(&arena, 2)) return;
    prefetch_begin(&arena, 2, PREFETCHED);
    slot_bytes(&arena, 2)[0] = weights_of(PREFETCHED);
    request_set(&arena, arena.urgent_mask, PREFETCHED);
    mask_put(&arena, arena.urgent_mask, PREFETCHED, 0);
    mask_put(&arena, arena.prefetch_mask, PREFETCHED, 0);
    read_from_disk(2, PREFETCHED);
    load_publish(&arena, 2, weights_of(PREFETCHED), SLOT_WORDS * 8, 0, 0);
    futex_bump_and_wake(&arena.layers[0].residency_generation);
}

static void pager_pages_out(void) {
    if (evict_begin(&arena, 0)) slot_release(&arena, 0);
}

static void pager_gives_up(void) {
    if (!evict_begin(&arena, 0)) return;
    load_begin(&arena, 0, AWAITED);
    mask_put(&arena, arena.failed_mask, AWAITED, 1);
    slot_release(&arena, 0);
    futex_bump_and_wake(&arena.layers[0].residency_generation);
}

static void pager_withdraws(void) { /* of what is resident already */
    mask_put(&arena, arena.urgent_mask, IN_USE, 0);
    mask_put(&arena, arena.prefetch_mask, IN_USE, 0);
    futex_bump_and_wake(&arena.layers[0].residency_generation);
}

static void pager_recovers(void) { residency_recover(&arena); }

/* What an earlier pager left when it was killed: one slot half read, one about to be evicted, stale masks. */
static void scene_after_a_kill(void) {
    if (!evict_begin(&arena, 0) || !evict_begin(&arena, 2)) abort();
    load_begin(&arena, 0, AWAITED);
    slot_bytes(&arena, 0)[0] = weights_of(AWAITED);
    mask_put(&arena, arena.prefetched_mask, AWAITED, 1);
}

/* The same with two loads in flight, the one for the waiter half read. */
static void scene_after_a_kill_with_two_loads(void) {
    scene_after_a_kill();
    load_begin(&arena, 2, UNWANTED);
    read_from_disk(2, UNWANTED);
}

static void scene_with_requests_of_what_is_there(void) {
    request_set(&arena, arena.urgent_mask, IN_USE);
    request_set(&arena, arena.prefetch_mask, IN_USE);
}

/* ---- planted mistakes ---- */

static void planted_clears_bit_before_loading(void) {
    if (!evict_begin(&arena, 0)) return;
    mask_put(&arena, arena.urgent_mask, AWAITED, 0);
    load(0, AWAITED, 0);
}

static void planted_publishes_before_the_last_word(void) {
    if (!evict_begin(&arena, 0)) return;
    load_begin(&arena, 0, AWAITED);
    read_from_disk(0, AWAITED);
    slot_bytes(&arena, 0)[SLOT_WORDS - 1] = 0;
    load_publish(&arena, 0, weights_of(AWAITED), SLOT_WORDS * 8, 0, 0);
    ((volatile uint64_t *)slot_bytes(&arena, 0))[SLOT_WORDS - 1] = weights_of(AWAITED);
}

static void planted_reads_into_an_evicting_slot(void) {
    if (!evict_begin(&arena, 0)) return;
    read_from_disk(0, AWAITED);
    load_begin(&arena, 0, AWAITED);
    load_publish(&arena, 0, weights_of(AWAITED), SLOT_WORDS * 8, 0, 0);
}

static void planted_lane_publishes_what_was_given_up(void) {
    if (!evict_begin(&arena, 2)) return;
    struct load load = given_up_prefetch(2);
    lanes_publish(&lanes, &load);
}

static void planted_drops_an_overtaken_prefetch(void) { /* the waiter's bit is cleared for a load that is given up */
    if (!evict_begin(&arena, 2)) return;
    prefetch_begin(&arena, 2, AWAITED);
    mask_put(&arena, arena.urgent_mask, AWAITED, 0);
    slot_release(&arena, 2);
    load(2, PREFETCHED, 1);
}

static void planted_recovery_frees_before_it_requests(void) {
    slot_release(&arena, 0);
    request_set(&arena, arena.urgent_mask, AWAITED);
    residency_recover(&arena);
}

static void planted_gives_up_silently(void) {
    if (!evict_begin(&arena, 0)) return;
    load_begin(&arena, 0, AWAITED);
    slot_release(&arena, 0);
    mask_put(&arena, arena.failed_mask, AWAITED, 1);
}

static void planted_activation_in_two_stores(void) {
    atomic_u64 *slot = affinity_row(&arena, 0) + VICTIM;
    uint64_t now = affinity_advance(&arena, 0, 1), epoch = affinity_slot_epoch(load_relaxed(slot));
    uint64_t score = affinity_score(&law, load_relaxed(slot), now) + law.boost_q24;
    store_relaxed(slot, score << AFFINITY_EPOCH_BITS | epoch); /* an older epoch with the newer score, for a while */
    store_relaxed(slot, score << AFFINITY_EPOCH_BITS | now);
}

enum role { WORKER, PAGER };

static const struct operation {
    const char *name;
    enum role role;
    void (*scene)(void); /* beyond what set_scene() does */
    void (*run)(void);
} operations[] = {
    {"worker-waits", WORKER, NULL, worker_waits},
    {"worker-joins-a-wait", WORKER, NULL, worker_joins_a_wait},
    {"worker-computes", WORKER, NULL, worker_computes},
    {"worker-asks-for-a-prefetch", WORKER, NULL, worker_asks_for_a_prefetch},
    {"worker-counts-an-activation", WORKER, NULL, worker_counts_an_activation},
    {"pager-replaces", PAGER, NULL, pager_replaces},
    {"pager-prefetches", PAGER, NULL, pager_prefetches},
    {"pager-loads-two-at-once", PAGER, NULL, pager_loads_two_at_once},
    {"pager-gives-way", PAGER, NULL, pager_gives_way},
    {"pager-is-overtaken", PAGER, NULL, pager_is_overtaken},
    {"pager-lane-publishes", PAGER, NULL, pager_lane_publishes},
    {"pager-lane-publishes-what-was-overtaken", PAGER, NULL, pager_lane_publishes_what_was_overtaken},
    {"pager-lane-ends-what-was-given-up", PAGER, NULL, pager_lane_ends_what_was_given_up},
    {"pager-lane-read-something-else", PAGER, NULL, pager_lane_read_something_else},
    {"pager-pages-out", PAGER, NULL, pager_pages_out},
    {"pager-gives-up", PAGER, NULL, pager_gives_up},
    {"pager-withdraws", PAGER, scene_with_requests_of_what_is_there, pager_withdraws},
    {"pager-recovers", PAGER, scene_after_a_kill, pager_recovers},
    {"pager-recovers-two-loads", PAGER, scene_after_a_kill_with_two_loads, pager_recovers},
    {"planted-clears-bit-before-loading", PAGER, NULL, planted_clears_bit_before_loading},
    {"planted-publishes-before-the-last-word", PAGER, NULL, planted_publishes_before_the_last_word},
    {"planted-reads-into-an-evicting-slot", PAGER, NULL, planted_reads_into_an_evicting_slot},
    {"planted-recovery-frees-before-it-requests", PAGER, scene_after_a_kill, planted_recovery_frees_before_it_requests},
    {"planted-drops-an-overtaken-prefetch", PAGER, NULL, planted_drops_an_overtaken_prefetch},
    {"planted-lane-publishes-what-was-given-up", PAGER, NULL, planted_lane_publishes_what_was_given_up},
    {"planted-gives-up-silently", PAGER, NULL, planted_gives_up_silently},
    {"planted-activation-in-two-stores", WORKER, NULL, planted_activation_in_two_stores},
};

/* ---- scene, recovery, invariants ---- */

static void set_scene(const struct operation *operation) {
    load(0, VICTIM, 1);
    load(1, IN_USE, 0);
    load(2, OTHER, 0);
    pin_set(&arena, LIVING_WORKER, 0, IN_USE);
    pin_set(&arena, LIVING_WORKER, 1, AWAITED);
    request_set(&arena, arena.urgent_mask, AWAITED);
    for (uint64_t epoch = 1; epoch <= 5; epoch++)
        affinity_merge(&law, affinity_row(&arena, 0) + VICTIM, law.boost_q24, affinity_advance(&arena, 0, 1));
    if (operation->scene) operation->scene();
}

/* The pager's rescan of urgent requests. */
static void serve(void) {
    for (uint32_t id = 0; id < EXPERTS; id++) {
        if (!mask_test(&arena, arena.urgent_mask, id)) continue;
        if (residency_find(&arena, id) != SLOT_NONE || mask_test(&arena, arena.failed_mask, id)) {
            mask_put(&arena, arena.urgent_mask, id, 0);
            continue;
        }
        for (uint32_t slot = 0; slot < arena.num_slots; slot++)
            if (slot_word_state(load_seq_cst(&arena.slot_words[slot])) == SLOT_EMPTY || evict_begin(&arena, slot)) {
                load(slot, id, 0);
                break;
            }
    }
}

#define REQUIRE(condition, sentence) \
    if (!(condition)) return sentence

static int slots_that_hold(uint32_t id) {
    int count = 0;
    for (uint32_t slot = 0; slot < arena.num_slots; slot++) {
        uint64_t word = load_seq_cst(&arena.slot_words[slot]);
        count += slot_word_state(word) != SLOT_EMPTY && slot_word_expert(word) == id;
    }
    return count;
}

/* At every instant, also while nobody has noticed the death. */
static const char *broken_always(void) {
    for (uint32_t slot = 0; slot < arena.num_slots; slot++) {
        uint64_t word = load_seq_cst(&arena.slot_words[slot]);
        enum slot_state state = slot_word_state(word);
        uint32_t id = slot_word_expert(word);
        REQUIRE(state <= SLOT_EVICTING && id < EXPERTS, "a slot word is not one");
        if (state != SLOT_RESIDENT && state != SLOT_EVICTING) continue;
        for (int i = 0; i < SLOT_WORDS; i++)
            REQUIRE(slot_bytes(&arena, slot)[i] == weights_of(id), "R1: a slot's bytes are not those of its expert");
        REQUIRE(arena.slot_info[slot].checksum == weights_of(id), "R1: a slot's checksum is not that of its expert");
    }
    for (uint32_t id = 0; id < EXPERTS; id++) REQUIRE(slots_that_hold(id) <= 1, "an expert is in two slots");
    REQUIRE(slots_that_hold(IN_USE) == 1, "R2: an expert in use was taken away");
    REQUIRE(slots_that_hold(AWAITED) || mask_test(&arena, arena.urgent_mask, AWAITED) ||
                mask_test(&arena, arena.failed_mask, AWAITED),
            "R3: a request is lost");
    return NULL;
}

static const char *broken_after_recovery(const struct operation *operation) {
    uint64_t resident = 0;
    for (uint32_t slot = 0; slot < arena.num_slots; slot++) {
        uint64_t word = load_seq_cst(&arena.slot_words[slot]);
        enum slot_state state = slot_word_state(word);
        REQUIRE(state == SLOT_EMPTY || state == SLOT_RESIDENT, "a slot is still LOADING or EVICTING");
        if (state == SLOT_RESIDENT) resident |= mask_bit(slot_word_expert(word));
        if (state == SLOT_RESIDENT)
            REQUIRE(load_seq_cst(&arena.directory[slot_word_expert(word)]) == slot + 1, "R4: the directory is wrong");
    }
    for (uint32_t id = 0; id < EXPERTS; id++)
        REQUIRE(!load_seq_cst(&arena.directory[id]) == !(resident & mask_bit(id)), "R4: the directory is wrong");
    REQUIRE(load_seq_cst(arena.resident_mask) == resident, "R4: the residency mask is wrong");
    REQUIRE(load_seq_cst(arena.loading_mask) == 0, "R4: the loading mask is wrong");
    REQUIRE((load_seq_cst(arena.prefetched_mask) & ~resident) == 0, "an absent expert is marked as prefetched");
    REQUIRE((load_seq_cst(arena.failed_mask) & resident) == 0, "a resident expert is marked as failed");
    if (operation->role == WORKER)
        for (uint32_t pin = 0; pin < arena.pins_per_process; pin++)
            REQUIRE(load_seq_cst(&pin_row(&arena, DYING_WORKER)[pin]) == 0, "a dead worker holds a pin");
    REQUIRE(load_seq_cst(&pin_row(&arena, LIVING_WORKER)[0]) == IN_USE + 1 &&
                load_seq_cst(&pin_row(&arena, LIVING_WORKER)[1]) == AWAITED + 1,
            "a living worker lost a pin");
    return NULL;
}

static const char *broken_after_service(void) {
    REQUIRE(load_seq_cst(arena.urgent_mask) == 0, "a request was not served");
    REQUIRE(residency_find(&arena, AWAITED) != SLOT_NONE || mask_test(&arena, arena.failed_mask, AWAITED),
            "R3: the living worker waits for ever");
    REQUIRE(residency_find(&arena, IN_USE) != SLOT_NONE, "R2: an expert in use was taken away");
    return NULL;
}

/* A1, and that the slots still work: the scores are what they are with or without the activation, none between. */
static const char *broken_affinity(void) {
    atomic_u64 *row = affinity_row(&arena, 0);
    uint64_t now = affinity_now(&arena, 0), victim = load_relaxed(row + VICTIM), in_use = load_relaxed(row + IN_USE);
    uint64_t before = 0;
    for (int i = 0; i < 5; i++) before = affinity_decayed(&law, before, 1) + law.boost_q24;
    uint64_t decayed = affinity_decayed(&law, before, now - 5);
    REQUIRE(now == 5 || now == 6, "the epoch is neither the old nor the new one");
    REQUIRE(affinity_slot_epoch(victim) == 5 || affinity_slot_epoch(victim) == now, "A1: an epoch went back");
    REQUIRE(affinity_score(&law, victim, now) == decayed || affinity_score(&law, victim, now) == decayed + law.boost_q24,
            "A1: a score is neither with nor without the activation");
    REQUIRE(in_use == 0 || affinity_score(&law, in_use, now) == law.boost_q24,
            "A1: a score is neither with nor without the activation");
    uint64_t next = affinity_advance(&arena, 0, 1), score = affinity_score(&law, victim, next);
    affinity_merge(&law, row + VICTIM, law.boost_q24, next);
    REQUIRE(affinity_score(&law, load_relaxed(row + VICTIM), next) == score + law.boost_q24,
            "a slot does not take an activation any more");
    return NULL;
}

static const char *check(const struct operation *operation) {
    const char *broken = broken_always();
    if (broken) return broken;
    if (operation->role == WORKER)
        for (uint32_t pin = 0; pin < arena.pins_per_process; pin++) pin_clear(&arena, DYING_WORKER, pin);
    else
        residency_recover(&arena);
    if ((broken = broken_always()) || (broken = broken_after_recovery(operation)) || (broken = broken_affinity()))
        return broken;
    serve();
    if ((broken = broken_always()) || (broken = broken_after_recovery(operation))) return broken;
    return broken_after_service();
}

/* ---- stepping ---- */

struct progress {
    atomic_u32 begun, ended;
};

/* A child that stands right before its operation. */
static pid_t start(void (*run)(void), struct progress *progress) {
    store_seq_cst(&progress->begun, 0);
    store_seq_cst(&progress->ended, 0);
    pid_t child = fork();
    if (child == 0) {
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL)) _exit(77);
        raise(SIGSTOP);
        store_seq_cst(&progress->begun, 1);
        run();
        store_seq_cst(&progress->ended, 1);
        _exit(0);
    }
    int status;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) {
        fprintf(stderr, "this system does not allow ptrace\n");
        exit(77);
    }
    ptrace(PTRACE_SETOPTIONS, child, NULL, (void *)PTRACE_O_EXITKILL);
    return child;
}

static void step(pid_t child) {
    int status;
    if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) {
        fprintf(stderr, "the operation ended by itself\n");
        exit(2);
    }
}

/* Kills `run` at every point and calls `after` with the number of instructions it made and what it left in the
 * arena. Every process that is killed starts from the same memory, so its first n instructions are the same. */
static void kill_everywhere(void (*run)(void), int every, void (*after)(long instructions)) {
    static struct progress *progress;
    if (!progress)
        progress = mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint8_t *begin = malloc(arena.nbytes), *last = malloc(arena.nbytes);
    memcpy(begin, arena.base, arena.nbytes);
    for (long n = 0, ended = 0; !ended; n++) {
        memcpy(arena.base, begin, arena.nbytes);
        pid_t child = start(run, progress);
        while (!load_seq_cst(&progress->begun)) step(child);
        long done = 0;
        while (done < n - 1) step(child), done++;
        memcpy(last, arena.base, arena.nbytes);
        while (done < n) { /* one instruction, or as many as it takes to change the arena */
            step(child), done++;
            int dull = !memcmp(last, arena.base, arena.nbytes) && !load_seq_cst(&progress->ended);
            if (!every && dull) n++;
        }
        ended = load_seq_cst(&progress->ended);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        after(n);
    }
    free(begin);
    free(last);
}

/* ---- what is asked of one operation ---- */

static const struct operation *operation;
static long instructions, points, recovery_points, violations;

static void note(const char *broken, const char *when) {
    if (broken && !violations++) printf("after %ld instructions%s: %s\n", instructions, when, broken);
}

static void after_kill_in_recovery(long recovery_instructions) {
    (void)recovery_instructions;
    recovery_points++;
    note(check(operation), " and a kill in the recovery");
}

static void after_kill(long done) {
    static uint8_t *left;
    int same = left && !memcmp(left, arena.base, arena.nbytes);
    if (!left) left = malloc(arena.nbytes);
    memcpy(left, arena.base, arena.nbytes);
    instructions = done;
    points++;
    note(check(operation), "");
    if (operation->role == PAGER && !same) { /* the pager that is started next may be killed as well */
        memcpy(arena.base, left, arena.nbytes);
        kill_everywhere(pager_recovers, 0, after_kill_in_recovery);
    }
}

int main(int argc, char **argv) {
    int list = argc == 3 && !strcmp(argv[2], "list"), every = argc == 4 && !strcmp(argv[3], "every");
    for (size_t i = 0; argc >= 3 && i < sizeof operations / sizeof *operations; i++) {
        if (list) puts(operations[i].name);
        if (!strcmp(argv[2], operations[i].name)) operation = operations + i;
    }
    if (list) return 0;
    if (!operation || argc != 3 + every) {
        fprintf(stderr, "usage: crash_stepper IMAGE OPERATION [every]\n");
        return 2;
    }
    arena = arena_from_image(argv[1]);
    affinity_law_init(&law, 31. / 32, 1. / 32, 1);
    set_scene(operation);
    kill_everywhere(operation->run, every, after_kill);
    printf("instructions=%ld points=%ld recovery_points=%ld violations=%ld\n", instructions, points, recovery_points,
           violations);
    return violations != 0;
}
