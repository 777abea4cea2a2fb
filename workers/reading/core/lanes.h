/* The read lanes: threads that fill slots from files and hash what they read, urgent loads strictly before a prefetch.
 *
 * A single load is spread over all lanes, for a disk is fastest with several requests; several loads over a lane each:
 * then a load's bytes stay in one core's cache. A lane takes the more chunks at once the more are waiting: fewer reads,
 * but no lane idle at the end.
 * A prefetch is read by one lane, and only while no urgent load is under way: what an urgent load may find before it is
 * at most one lane at one run of chunks.
 *
 * One lock guards all of it; it is held for some looks at the few loads under way, never while reading or hashing. It
 * also hands the slot over, word and bytes: from the main thread that begins a load to the lanes, and back to it when it
 * takes the finished load. */
#ifndef HOTSET_LANES_H
#define HOTSET_LANES_H

#include "futex.h"
#include "histogram.h"
#include "load.h"
#include "residency.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>

/* That a lane takes at once, of 256 KiB each (expert_store.py). Of an urgent load 4 MiB: a MiB at a time, experts of 16 MiB
 * came at 82 to 88 % of the rate of a plain loop. Of a prefetch a MiB: something urgent may come. */
#define MOST_URGENT_CHUNKS 16
#define MOST_PREFETCH_CHUNKS 4

struct lanes {
    pthread_mutex_t lock;
    pthread_cond_t work; /* there is more to read, or the lanes close */
    struct load **loads; /* in the order in which they came, finished ones too until they are taken */
    size_t count, capacity;
    size_t sleeping; /* lanes that wait for `work` */
    bool called;     /* one of them was told, and has not looked yet: it calls the next if there is work for more */
    bool from_disk;  /* the latest run */
    bool closing;
    bool direct;
    uint64_t alignment;            /* of direct reads */
    atomic_bool asks_page_cache;   /* a hint, relaxed: not once a file system was found that cannot say */
    const struct xxh3_kernel *hash;
    const struct arena *arena; /* whose slots they fill; with none, nothing is published */
    uint32_t process;          /* the pager's row of counters */
    bool tells_all;            /* the main thread has use for every lane and slot that comes free */
    int finished_fd; /* an eventfd: readable while there are finished loads that the main thread has to know of */
    pthread_t *threads;
    size_t num_threads;
};

/* Something is finished. Not under the lock: who is told would wake only to wait for it. */
static inline void lanes_tell(struct lanes *lanes) { eventfd_write(lanes->finished_fd, 1); }

/* The next chunks to read, as one; they then count as being read. Whether another lane would find some too: in `more`.
 * Under the lock. */
static inline struct load *lanes_take(struct lanes *lanes, struct chunk *run, bool *more) {
    struct load *best = NULL;
    bool urgent_under_way = false, prefetch_is_read = false;
    size_t unread = 0;
    for (size_t i = 0; i < lanes->count; i++) {
        struct load *load = lanes->loads[i];
        if (load->finished) continue;
        urgent_under_way |= load->urgent;
        prefetch_is_read |= !load->urgent && load->reading;
        if (!load_has_unread(load)) continue;
        unread += load->num_chunks - load->next_chunk;
        bool first = !best || load->urgent > best->urgent;
        if (first || (load->urgent == best->urgent && load->reading < best->reading)) best = load;
    }
    if (!best || (!best->urgent && (urgent_under_way || prefetch_is_read))) return NULL;
    size_t share = unread / (lanes->num_threads ? lanes->num_threads : unread);
    uint32_t before = best->next_chunk;
    const uint32_t most = best->urgent ? MOST_URGENT_CHUNKS : MOST_PREFETCH_CHUNKS;
    *run = load_take(best, share < most ? (uint32_t)share : most, lanes->alignment);
    best->reading++;
    *more = best->urgent && unread > best->next_chunk - before;
    return best;
}

/* There is work for one more lane: whether it has to be signalled, after unlocking. */
static inline bool lanes_call(struct lanes *lanes) {
    bool call = lanes->sleeping && !lanes->called;
    lanes->called |= call;
    return call;
}

static inline struct load *lanes_find(const struct lanes *lanes, uint64_t id) {
    for (size_t i = 0; i < lanes->count; i++)
        if (lanes->loads[i]->id == id) return lanes->loads[i];
    return NULL;
}

/* 0, and the load is the lanes'; or EEXIST, as one of its expert is under way, or ENOMEM. From the page cache it is a
 * matter of processors: one lane is woken, and wakes the next if there is work for two. A disk is faster with several
 * requests at once. */
static inline int lanes_begin(struct lanes *lanes, struct load *load) {
    int error = 0;
    size_t signals = 0;
    pthread_mutex_lock(&lanes->lock);
    if (lanes->count == lanes->capacity) {
        size_t capacity = 2 * lanes->capacity + 8;
        struct load **loads = realloc(lanes->loads, capacity * sizeof *loads);
        if (loads) lanes->loads = loads, lanes->capacity = capacity;
    }
    if (lanes_find(lanes, load->id)) error = EEXIST;
    else if (lanes->count == lanes->capacity) error = ENOMEM;
    else {
        lanes->loads[lanes->count++] = load;
        signals = load->urgent && lanes->from_disk ? load->num_chunks : lanes_call(lanes);
        if (signals > lanes->sleeping) signals = lanes->sleeping;
    }
    pthread_mutex_unlock(&lanes->lock);
    while (signals--) pthread_cond_signal(&lanes->work); /* not under the lock, for which whoever wakes would wait */
    return error;
}

/* Under the lock. */
static inline bool lanes_urgent_under_way(const struct lanes *lanes) {
    for (size_t i = 0; i < lanes->count; i++)
        if (lanes->loads[i]->urgent && !lanes->loads[i]->finished) return true;
    return false;
}

/* Whether the main thread is told of every load that is finished, and not only of those with which the urgent ones end
 * or that were not published. */
static inline void lanes_tell_of_all(struct lanes *lanes, bool all) {
    bool finished = false;
    pthread_mutex_lock(&lanes->lock);
    lanes->tells_all = all;
    for (size_t i = 0; all && i < lanes->count; i++) finished |= lanes->loads[i]->finished;
    pthread_mutex_unlock(&lanes->lock);
    if (finished) lanes_tell(lanes);
}

/* Nothing of it that is unread will be read. Under the lock; whether it is finished with that. */
static inline bool lanes_stop(struct load *load) {
    load->next_chunk = load->num_chunks;
    load->finished = !load->reading;
    return load->finished;
}

/* Somebody waits for what was a prefetch; false if that was given up already. */
static inline bool lanes_promote(struct lanes *lanes, uint64_t id) {
    pthread_mutex_lock(&lanes->lock);
    struct load *load = lanes_find(lanes, id);
    bool goes_on = load && !load->cancelled;
    if (goes_on && !load->urgent && !load->finished) {
        load->urgent = true;
        load->began = clock_nanoseconds();
        pthread_cond_broadcast(&lanes->work);
    }
    pthread_mutex_unlock(&lanes->lock);
    return goes_on;
}

/* Gives a prefetch up; it is finished as soon as no lane writes to its slot. */
static inline void lanes_cancel(struct lanes *lanes, uint64_t id) {
    bool finished = false;
    pthread_mutex_lock(&lanes->lock);
    struct load *load = lanes_find(lanes, id);
    if (load && !load->urgent && !load->finished && !load->cancelled) {
        load->cancelled = true;
        finished = lanes_stop(load);
    }
    pthread_mutex_unlock(&lanes->lock);
    if (finished) lanes_tell(lanes);
}

/* A finished load, which then is the caller's; NULL if there is none. */
static inline struct load *lanes_take_finished(struct lanes *lanes) {
    struct load *load = NULL;
    pthread_mutex_lock(&lanes->lock);
    for (size_t i = 0; i < lanes->count && !load; i++) {
        if (!lanes->loads[i]->finished) continue;
        load = lanes->loads[i];
        memmove(&lanes->loads[i], &lanes->loads[i + 1], (lanes->count - i - 1) * sizeof *lanes->loads);
        lanes->count--;
    }
    pthread_mutex_unlock(&lanes->lock);
    return load;
}

/* `count` more bytes of a piece are in the slot. Whoever brings what the checksum needs next hashes it, and what
 * follows it and came earlier; whoever brings something else leaves it to them. Not under the lock. */
static inline void lanes_note_present(struct lanes *lanes, struct load *load, struct piece *piece, uint64_t count) {
    pthread_mutex_lock(&lanes->lock);
    piece->present += count;
    if (!load->hashing && !load->num_transposed) {
        load->hashing = true;
        uint64_t end;
        while ((end = load_hashable(load)) > load->hashed) {
            uint64_t begin = load->hashed;
            pthread_mutex_unlock(&lanes->lock);
            lanes->hash->blocks(load->sums.sums, load->slot + begin, (end - begin) / XXH3_BLOCK);
            pthread_mutex_lock(&lanes->lock);
            load->hashed = end;
        }
        load->hashing = false; /* who brings more now hashes it */
    }
    pthread_mutex_unlock(&lanes->lock);
}

/* All bytes are there, and no other lane is at this load: what is left to do with them. */
static inline int lanes_complete(struct lanes *lanes, struct load *load) {
    if (load->num_transposed) {
        int error = load_transpose(load);
        if (error) return error;
        load_hash_whole(load, lanes->hash);
    }
    load->checksum = xxh3_end(&load->sums, load->slot, load->nbytes);
    return 0;
}

#endif
