/* Reading a run of chunks into its slot, and what a lane does with one. */
#ifndef HOTSET_READ_H
#define HOTSET_READ_H

#include "publish.h"

#include <signal.h>
#include <sys/uio.h>
#include <unistd.h>

/* What the page cache has is copied so much at a time and hashed while it is in the core's second-level cache: hashing
 * then takes a tenth of what copying does, from memory it would take half. */
#define CACHED_NBYTES (256 << 10)

/* Buffers for the next bytes of a chunk, of which `done` are read, `most` at most; returns how many there are. */
static inline int read_buffers(const struct load *load, const struct chunk *chunk, uint64_t done, uint64_t most,
                               struct iovec *buffers) {
    int count = 0;
    for (uint32_t i = chunk->first; most && i < chunk->first + chunk->count; i++) {
        uint64_t start = load->pieces[i].start, nbytes = load->pieces[i].nbytes;
        if (done >= nbytes) {
            done -= nbytes;
            continue;
        }
        uint64_t take = nbytes - done < most ? nbytes - done : most;
        uint8_t *to = load->slot + start + done;
        if (count && (uint8_t *)buffers[count - 1].iov_base + buffers[count - 1].iov_len == to)
            buffers[count - 1].iov_len += take;
        else buffers[count++] = (struct iovec){to, take};
        most -= take;
        done = 0;
    }
    return count;
}

/* `count` bytes after the first `done` of a chunk have come. */
static inline void read_came(struct lanes *lanes, struct load *load, const struct chunk *chunk, uint64_t done,
                             uint64_t count) {
    for (uint32_t i = chunk->first; count && i < chunk->first + chunk->count; i++) {
        uint64_t nbytes = load->pieces[i].nbytes;
        if (done >= nbytes) {
            done -= nbytes;
            continue;
        }
        uint64_t here = nbytes - done < count ? nbytes - done : count;
        lanes_note_present(lanes, load, &load->pieces[i], here);
        count -= here;
        done = 0;
    }
}

/* 0 or why not, with the bytes that were read in `done`; whether any did not come from the page cache in `from_disk`. */
static inline int read_chunk(struct lanes *lanes, struct load *load, const struct chunk *chunk, uint64_t *done,
                             bool *from_disk) {
    *done = 0;
    *from_disk = !atomic_load_explicit(&lanes->asks_page_cache, memory_order_relaxed);
    while (*done < chunk->nbytes) {
        uint64_t most = chunk->nbytes - *done;
        if (!*from_disk && most > CACHED_NBYTES) most = CACHED_NBYTES;
        struct iovec buffers[MAX_PIECES_OF_RUN];
        int count = read_buffers(load, chunk, *done, most, buffers);
        if (lanes->direct) /* a single place of the slot; the last one of an expert ends within its block */
            buffers[0].iov_len = (buffers[0].iov_len + lanes->alignment - 1) / lanes->alignment * lanes->alignment;
        ssize_t got = preadv2(chunk->fd, buffers, count, (off_t)(chunk->offset + *done), *from_disk ? 0 : RWF_NOWAIT);
        if (got == 0) return END_OF_FILE;
        if (got < 0) {
            if (errno == EINTR) continue;
            if (*from_disk || (errno != EAGAIN && errno != EOPNOTSUPP)) return errno;
            if (errno == EOPNOTSUPP) atomic_store_explicit(&lanes->asks_page_cache, false, memory_order_relaxed);
            *from_disk = true;
            continue;
        }
        uint64_t came = (uint64_t)got < most ? (uint64_t)got : most;
        read_came(lanes, load, chunk, *done, came);
        *done += came;
    }
    return 0;
}

/* What a lane does with chunks that it took. */
static inline void lane_read(struct lanes *lanes, struct load *load, const struct chunk *chunk) {
    uint64_t done;
    bool from_disk;
    int error = read_chunk(lanes, load, chunk, &done, &from_disk);
    pthread_mutex_lock(&lanes->lock);
    load->from_disk |= from_disk;
    lanes->from_disk = from_disk;
    if (error && !load->error) {
        load->error = error;
        load->error_fd = chunk->fd;
        load->error_offset = chunk->offset + done;
        lanes_stop(load);
    }
    if (load->reading == 1 && !load_has_unread(load) && !load->error && !load->cancelled) {
        pthread_mutex_unlock(&lanes->lock); /* it still counts as being read */
        error = lanes_complete(lanes, load);
        pthread_mutex_lock(&lanes->lock);
        load->error = error;
    }
    load->reading--;
    bool tell = false;
    atomic_u32 *generation = NULL;
    if (!load_has_unread(load) && !load->reading) generation = lanes_finish(lanes, load, &tell);
    pthread_mutex_unlock(&lanes->lock); /* from here on the load is the main thread's */
    if (generation) futex_bump_and_wake(generation);
    if (tell) lanes_tell(lanes);
}

static inline void *lane_run(void *argument) {
    struct lanes *lanes = argument;
    pthread_mutex_lock(&lanes->lock);
    while (!lanes->closing) {
        struct chunk run;
        bool more;
        struct load *load = lanes_take(lanes, &run, &more);
        if (!load) {
            lanes->sleeping++;
            pthread_cond_wait(&lanes->work, &lanes->lock);
            lanes->sleeping--;
            lanes->called = false;
            continue;
        }
        bool call = more && lanes_call(lanes);
        pthread_mutex_unlock(&lanes->lock);
        if (call) pthread_cond_signal(&lanes->work);
        lane_read(lanes, load, &run);
        pthread_mutex_lock(&lanes->lock);
    }
    pthread_mutex_unlock(&lanes->lock);
    return NULL;
}

/* Returns 0 or an errno; `lanes_close` has to follow in both cases. */
static inline int lanes_start(struct lanes *lanes, size_t count) {
    pthread_mutex_init(&lanes->lock, NULL);
    pthread_cond_init(&lanes->work, NULL);
    lanes->from_disk = true; /* until it is known better */
    lanes->finished_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (lanes->finished_fd < 0) return errno;
    lanes->threads = calloc(count ? count : 1, sizeof *lanes->threads);
    if (!lanes->threads) return ENOMEM;
    sigset_t all, before; /* signals are for the thread that runs Python */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    for (; lanes->num_threads < count && !error; lanes->num_threads += !error)
        error = pthread_create(&lanes->threads[lanes->num_threads], NULL, lane_run, lanes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* Returns when no lane writes to any slot any more; loads that were not finished are dropped. */
static inline void lanes_close(struct lanes *lanes) {
    pthread_mutex_lock(&lanes->lock);
    lanes->closing = true;
    pthread_cond_broadcast(&lanes->work);
    pthread_mutex_unlock(&lanes->lock);
    for (size_t i = 0; i < lanes->num_threads; i++) pthread_join(lanes->threads[i], NULL);
    for (size_t i = 0; i < lanes->count; i++) free(lanes->loads[i]);
    free(lanes->loads);
    free(lanes->threads);
    if (lanes->finished_fd >= 0) close(lanes->finished_fd);
    pthread_cond_destroy(&lanes->work);
    pthread_mutex_destroy(&lanes->lock);
}

#endif
