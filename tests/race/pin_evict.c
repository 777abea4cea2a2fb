/* A reader and a pager fight over one slot: does the memory order of pin and check, evict and read pins, hold (R2)?
 *
 *     pin_evict IMAGE SECONDS        the protocol of residency.h
 *     built with -DRELEASE_ACQUIRE   the same code with release and acquire in place of seq_cst: the negative
 *                                    control, which has to see mixed weights and stops at the first
 *
 * The image has 1 layer of 2 experts, 2 processes with 1 pin, 1 slot. The pager loads the two experts in turn; the
 * reader wants one or the other and looks at every word of what it found. Prints the counts as key=value; exit
 * status 1 if a reader saw anything but whole weights of its own expert. */
#define _GNU_SOURCE
#include "atomics.h"

#ifdef RELEASE_ACQUIRE
#undef load_seq_cst
#undef store_seq_cst
#define load_seq_cst(p) load_acquire(p)
#define store_seq_cst(p, v) store_release((p), (v))
#endif

#include "arena_image.h"
#include "residency.h"

#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORDS 64 /* of the slot, written and read in order */

struct counts {
    atomic_u32 stop;
    _Alignas(64) uint64_t uses, misses, mixed; /* the reader's */
    _Alignas(64) uint64_t loads, refused;      /* the pager's */
};

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* On a processor of its own: two that take turns on one never meet. */
static void run_on(int number) {
    cpu_set_t allowed, one;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &allowed) && number-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof one, &one);
            return;
        }
}

static void reader(const struct arena *arena, struct counts *counts) {
    run_on(0);
    for (uint32_t turn = 0; !load_relaxed(&counts->stop); turn++) {
        uint32_t id = turn & 1;
        pin_set(arena, 0, 0, id);
        int32_t slot = residency_find(arena, id);
        if (slot == SLOT_NONE) {
            counts->misses++;
        } else {
            /* volatile: the compiler must not read once what the pager may be writing */
            const volatile uint64_t *words = slot_bytes(arena, (uint32_t)slot);
            uint64_t first = words[0];
            int whole = (first & 1) == id;
            for (int i = 1; i < WORDS; i++) whole &= words[i] == first;
            whole &= words[0] == first;
            counts->uses++;
            counts->mixed += !whole;
#ifdef RELEASE_ACQUIRE
            if (!whole) store_relaxed(&counts->stop, 1);
#endif
        }
        pin_clear(arena, 0, 0);
    }
}

static void pager(const struct arena *arena, struct counts *counts) {
    run_on(1);
    uint32_t id = 0;
    for (uint64_t turn = 0; !load_relaxed(&counts->stop); turn++) {
        if (slot_word_state(load_relaxed(&arena->slot_words[0])) == SLOT_RESIDENT && !evict_begin(arena, 0)) {
            counts->refused++;
            continue;
        }
        id ^= 1;
        load_begin(arena, 0, id);
        volatile uint64_t *words = slot_bytes(arena, 0);
        for (int i = 0; i < WORDS; i++) words[i] = turn << 1 | id;
        load_publish(arena, 0, 0, WORDS * 8, 0, 0);
        counts->loads++;
        for (volatile int rest = 0; rest < 30; rest++); /* so that the reader finds it now and then */
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: pin_evict IMAGE SECONDS\n");
        return 2;
    }
    struct arena arena = arena_from_image(argv[1]);
    struct counts *counts =
        mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    void (*roles[])(const struct arena *, struct counts *) = {reader, pager};
    for (int role = 0; role < 2; role++)
        if (fork() == 0) {
            roles[role](&arena, counts);
            _exit(0);
        }
    double end = seconds_now() + atof(argv[2]);
    while (seconds_now() < end && !load_relaxed(&counts->stop)) usleep(10000);
    store_relaxed(&counts->stop, 1);
    while (wait(NULL) > 0);
    printf("uses=%lu misses=%lu loads=%lu refused=%lu mixed=%lu\n", counts->uses, counts->misses, counts->loads,
           counts->refused, counts->mixed);
    return counts->mixed != 0;
}
