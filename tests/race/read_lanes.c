/* The read lanes: a main thread that evicts, begins loads, urgent ones and prefetches, promotes and cancels some of them,
 * and two workers that use what the lanes have published, for some seconds. What is published must be the expert's bytes
 * with their checksum, and nobody may write to a slot that is in use, or has come back to the main thread;
 * ThreadSanitizer watches (scripts/sanitize).
 * usage: read_lanes IMAGE SECONDS, of an image with 12 experts in 6 slots of 200000 bytes, 3 processes with 1 pin */
#define _GNU_SOURCE
#include "arena_image.h"
#include "read.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#define LANES 4
#define DRAIN_SECONDS 20
#define SLOTS 6
#define EXPERTS 12
#define CHUNKS 5
#define CHUNK_NBYTES 40000
#define NBYTES (CHUNKS * (uint64_t)CHUNK_NBYTES)
#define SLOT_PITCH ((NBYTES + 4095) / 4096 * 4096)

enum { WORKERS = 2, PAGER = 2 };

static uint8_t bytes[EXPERTS][NBYTES];
static uint64_t checksums[EXPERTS];
static struct arena arena;
static atomic_u32 stop;
static struct load *loads[EXPERTS];            /* the main thread's: which are under way, and */
static int resident[SLOTS], occupied[SLOTS]; /* expert + 1 that it knows to be there, or to be on its way */
static long finished, published, cancelled, refused;

static uint8_t *slot_of(uint32_t slot) {
    return arena.base + arena.header->sections[SECTION_EXPERT_SLOTS].offset + slot * SLOT_PITCH;
}

/* The chunks of the file in another order in the slot, so that the checksum has to wait for some of them. */
static struct load *new_load(int fd, uint32_t slot, uint32_t id, bool urgent, bool known) {
    struct load *load = load_new(CHUNKS, CHUNKS, 0);
    if (!load) return NULL;
    load->id = id;
    load->slot = slot_of(slot);
    load->slot_number = slot;
    load->nbytes = NBYTES;
    load->urgent = urgent;
    load->source = !urgent;
    load->is_known = known;
    load->expected = checksums[id];
    load->began = clock_nanoseconds();
    for (uint32_t i = 0; i < CHUNKS; i++) {
        uint64_t start = (uint64_t)((i * 2 + 1) % CHUNKS) * CHUNK_NBYTES, offset = id * NBYTES + start;
        load->chunks[i] = (struct chunk){.fd = fd, .offset = offset, .nbytes = CHUNK_NBYTES, .first = i, .count = 1};
        load->pieces[i] = (struct piece){.start = start, .nbytes = CHUNK_NBYTES};
    }
    return load_prepare(load) ? load : NULL;
}

static void begin(struct lanes *lanes, int fd, uint32_t slot, uint32_t id, uint32_t chance) {
    if (occupied[slot]) return;
    if (resident[slot] && !evict_begin(&arena, slot)) {
        refused++;
        return;
    }
    bool urgent = chance >> 30 == 0;
    (urgent ? load_begin : prefetch_begin)(&arena, slot, id);
    memset(slot_of(slot), 0, NBYTES); /* a race if anybody still uses it */
    resident[slot] = 0;
    occupied[slot] = (int)id + 1;
    struct load *load = loads[id] = new_load(fd, slot, id, urgent, chance >> 29 & 1);
    if (lanes_begin(lanes, load)) abort();
}

/* Takes what is finished; false if it is not what was asked for. */
static bool take(struct lanes *lanes) {
    for (struct load *load; (load = lanes_take_finished(lanes)); free(load)) {
        uint32_t slot = load->slot_number;
        loads[load->id] = NULL;
        occupied[slot] = 0;
        finished++;
        published += load->published;
        cancelled += load->cancelled;
        if (load->error || load->published == load->cancelled) return false;
        if (load->published) {
            resident[slot] = (int)load->id + 1;
            if (load->checksum != checksums[load->id]) return false;
        } else {
            memset(load->slot, 0, NBYTES); /* a race if a lane is still at it */
            slot_release(&arena, slot);
        }
    }
    return true;
}

/* Whether all loads come to their end without anything else happening: a lane that was not woken would leave some. */
static bool drain(struct lanes *lanes) {
    time_t end = time(NULL) + DRAIN_SECONDS;
    lanes_tell_of_all(lanes, true);
    for (uint32_t id = 0; id < EXPERTS; id++)
        while (loads[id]) {
            poll(&(struct pollfd){.fd = lanes->finished_fd, .events = POLLIN}, 1, 100);
            eventfd_t events;
            eventfd_read(lanes->finished_fd, &events);
            if (!take(lanes) || time(NULL) > end) return false;
        }
    return true;
}

struct worker {
    pthread_t thread;
    uint32_t process, chance;
    long uses, wrong;
};

static void *work(void *argument) {
    struct worker *worker = argument;
    while (!load_relaxed(&stop)) {
        worker->chance = worker->chance * 1664525 + 1013904223;
        uint32_t id = (worker->chance >> 16) % EXPERTS;
        pin_set(&arena, worker->process, 0, id);
        int32_t slot = residency_find(&arena, id);
        if (slot != SLOT_NONE) {
            worker->uses++;
            worker->wrong += arena.slot_info[slot].checksum != checksums[id] || arena.slot_info[slot].nbytes != NBYTES ||
                             memcmp(slot_of((uint32_t)slot), bytes[id], NBYTES) != 0;
        } else {
            uint32_t seen = load_seq_cst(&arena.layers[0].residency_generation);
            futex_wait(&arena.layers[0].residency_generation, seen, 100000);
        }
        pin_clear(&arena, worker->process, 0);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    time_t end = time(NULL) + atoi(argv[2]);
    arena = arena_from_image(argv[1]);
    int fd = open("/var/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); /* on a disk: of a memfd no page cache can be asked */
    if (fd < 0) fd = memfd_create("weights", MFD_CLOEXEC);
    for (uint32_t id = 0; id < EXPERTS; id++) {
        for (uint64_t i = 0; i < NBYTES; i++) bytes[id][i] = (uint8_t)(i * 31 + (i >> 8) + id);
        struct xxh3 sums;
        xxh3_begin(&sums);
        xxh3_best()->blocks(sums.sums, bytes[id], xxh3_whole_blocks(NBYTES));
        checksums[id] = xxh3_end(&sums, bytes[id], NBYTES);
    }
    if (write(fd, bytes, sizeof bytes) != (ssize_t)sizeof bytes) return 2;

    struct lanes lanes = {.hash = xxh3_best(), .loads = calloc(SLOTS, sizeof(struct load *)), .capacity = SLOTS,
                          .arena = &arena, .process = PAGER};
    atomic_init(&lanes.asks_page_cache, true);
    if (lanes_start(&lanes, LANES)) return 2;
    struct worker workers[WORKERS] = {{.process = 0, .chance = 1}, {.process = 1, .chance = 2}};
    for (int i = 0; i < WORKERS; i++)
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i])) return 2;
    bool right = true;
    for (uint32_t step = 0, chance = 1; right && time(NULL) < end; step++) {
        chance = chance * 1664525 + 1013904223;
        uint32_t id = (chance >> 16) % EXPERTS, slot = (chance >> 8) % SLOTS;
        if (!loads[id] && residency_find(&arena, id) == SLOT_NONE) begin(&lanes, fd, slot, id, chance);
        else if (loads[id] && chance >> 29 < 2) lanes_promote(&lanes, id);
        else if (loads[id] && chance >> 29 < 4) lanes_cancel(&lanes, id);
        else if (chance >> 29 < 5) lanes_tell_of_all(&lanes, chance >> 12 & 1);
        else poll(&(struct pollfd){.fd = lanes.finished_fd, .events = POLLIN}, 1, 1);
        right = take(&lanes) && (step % 256 || drain(&lanes));
    }
    store_relaxed(&stop, 1);
    long uses = 0, wrong = 0;
    for (int i = 0; i < WORKERS; i++) {
        pthread_join(workers[i].thread, NULL);
        uses += workers[i].uses, wrong += workers[i].wrong;
    }
    lanes_close(&lanes);
    printf("%ld loads, %ld published, %ld cancelled; %ld uses, %ld of them wrong; %ld evictions refused%s\n", finished,
           published, cancelled, uses, wrong, refused, right ? "" : "; one is not what it should be");
    return !right || wrong || !uses || !cancelled || !published || !refused;
}
