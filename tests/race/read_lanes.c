/* The read lanes: a main thread that begins loads, urgent ones and prefetches, promotes and cancels some of them, for
 * some seconds. What is not cancelled must have the file's bytes and their checksum, and afterwards nobody may write to
 * its slot; ThreadSanitizer watches (scripts/sanitize).
 * usage: read_lanes SECONDS */
#define _GNU_SOURCE
#include "read.h"

#include <poll.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define LANES 4
#define SLOTS 6
#define CHUNKS 5
#define CHUNK_NBYTES 40000
#define NBYTES (CHUNKS * (uint64_t)CHUNK_NBYTES)

static uint8_t bytes[NBYTES], slots[SLOTS][NBYTES];
static struct load *in_slot[SLOTS];
static long finished, cancelled;

/* The chunks of the file in another order in the slot, so that the checksum has to wait for some of them. */
static struct load *new_load(int fd, uint64_t slot, bool urgent) {
    struct load *load = calloc(1, sizeof *load);
    load->id = slot;
    load->slot = slots[slot];
    load->nbytes = NBYTES;
    load->chunks = calloc(CHUNKS, sizeof *load->chunks);
    load->pieces = calloc(CHUNKS, sizeof *load->pieces);
    load->in_order = calloc(CHUNKS, sizeof *load->in_order);
    load->num_chunks = load->num_pieces = CHUNKS;
    load->urgent = urgent;
    for (uint32_t i = 0; i < CHUNKS; i++) {
        uint64_t start = (uint64_t)((i * 2 + 1) % CHUNKS) * CHUNK_NBYTES;
        load->chunks[i] = (struct chunk){.fd = fd, .offset = start, .nbytes = CHUNK_NBYTES, .first = i, .count = 1};
        load->pieces[i] = (struct piece){.start = start, .nbytes = CHUNK_NBYTES};
    }
    return load_prepare(load) ? load : NULL;
}

static void begin(struct lanes *lanes, int fd, uint64_t slot, bool urgent) {
    struct load *load = in_slot[slot] = new_load(fd, slot, urgent);
    pthread_mutex_lock(&lanes->lock);
    lanes->loads[lanes->count++] = load;
    pthread_cond_broadcast(&lanes->work);
    pthread_mutex_unlock(&lanes->lock);
}

/* Takes what is finished; false if it is not what was asked for. */
static bool take(struct lanes *lanes, uint64_t checksum) {
    for (struct load *load; (load = lanes_take_finished(lanes)); load_free(load)) {
        in_slot[load->id] = NULL;
        finished++;
        cancelled += load->cancelled;
        if (load->error || (!load->cancelled && (load->checksum != checksum || memcmp(load->slot, bytes, NBYTES))))
            return false;
        memset(load->slot, 0, NBYTES); /* a race if a lane is still at it */
    }
    return true;
}

int main(int argc, char **argv) {
    time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 2);
    for (uint64_t i = 0; i < NBYTES; i++) bytes[i] = (uint8_t)(i * 31 + (i >> 8));
    int fd = memfd_create("weights", MFD_CLOEXEC);
    if (write(fd, bytes, NBYTES) != (ssize_t)NBYTES) return 2;
    struct xxh3 sums;
    xxh3_begin(&sums);
    xxh3_best()->blocks(sums.sums, bytes, xxh3_whole_blocks(NBYTES));
    uint64_t checksum = xxh3_end(&sums, bytes, NBYTES);

    struct lanes lanes = {.hash = xxh3_best(), .loads = calloc(SLOTS, sizeof(struct load *)), .capacity = SLOTS};
    atomic_init(&lanes.asks_page_cache, true);
    if (lanes_start(&lanes, LANES)) return 2;
    bool right = true;
    for (uint32_t step = 0, chance = 1; right && time(NULL) < end; step++) {
        chance = chance * 1664525 + 1013904223;
        uint64_t slot = (chance >> 16) % SLOTS;
        if (!in_slot[slot]) begin(&lanes, fd, slot, chance >> 30 == 0);
        else if (chance >> 29 < 2) lanes_promote(&lanes, slot);
        else if (chance >> 29 < 4) lanes_cancel(&lanes, slot);
        else poll(&(struct pollfd){.fd = lanes.finished_fd, .events = POLLIN}, 1, 1);
        right = take(&lanes, checksum);
    }
    lanes_close(&lanes);
    printf("%ld loads, %ld of them cancelled%s\n", finished, cancelled, right ? "" : ", one is not what it should be");
    return !right || !cancelled || cancelled == finished;
}
