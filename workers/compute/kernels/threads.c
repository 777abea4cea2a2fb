#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

/* Multiply-adds; below, waking threads costs more than they save, or sharing with those that are awake. */
#define MIN_PARALLEL_WORK 400000
#define MIN_WORK_TO_SHARE 30000

/* Waking a sleeping thread takes some 30 us, about as long as a product of one row, and the loops of a forward pass
 * follow one another within a few us, or where the worker routes and pins after some 100. So a thread looks for the next
 * loop so long before it sleeps: at first it only pauses, later it lets whoever else could run on its core go first. The
 * thread whose loop it is looks for the others' end as long as it would only pause. Times, not counts, because a pause
 * takes 11 ns on one processor and several times that on another. */
#define NANOSECONDS_OF_PAUSES 20000
#define NANOSECONDS_BEFORE_SLEEP 300000

/* Each thread has a part of the loop and takes pieces from its front, half of what is left each time; when it has none
 * left, half of what another has, from the back: then a slow or late thread holds up little, and a thread mostly goes
 * through neighbouring rows, which are on their way from memory. No piece is smaller than this share of a part. */
#define PIECES_OF_A_PART 16

/* The pool's state in one word: the number of the current loop, whether threads may still join it (none has to: one that
 * wakes late is not waited for), and how many have joined it and not left. Joining and leaving are one atomic operation
 * each. A mutex there is contended whenever a loop begins, and puts threads to sleep that are about to work. */
#define JOINED ((uint64_t)0xffff)
#define OPEN ((uint64_t)0x10000)
#define LOOP ((uint64_t)0x20000)

/* What of a thread's part nobody has taken: its begin in the low half, its end in the high one. */
struct part_left {
    _Alignas(64) _Atomic uint64_t range;
};

static struct {
    pthread_mutex_t busy; /* held by the thread whose loop the pool runs */
    pthread_mutex_t lock; /* who sleeps has it between a last look and sleeping, who wakes has had it */
    pthread_cond_t start, done;
    pthread_t threads[MAX_THREADS];
    int size;            /* threads besides the caller */
    atomic_int wanted;   /* a thread with an index from here on ends */
    atomic_int sleeping; /* threads that have to be woken */
    _Atomic uint64_t state;
    /* Written by the caller while nobody has joined. */
    loop_part *part;
    void *context;
    size_t least, grain;
    struct part_left left[MAX_THREADS];
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .start = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static uint64_t range_of(size_t begin, size_t end) { return (uint64_t)end << 32 | begin; }
static size_t begin_of(uint64_t range) { return (uint32_t)range; }
static size_t end_of(uint64_t range) { return range >> 32; }
static size_t length_of(uint64_t range) { return end_of(range) - begin_of(range); }

/* How much of `left` is taken at once. */
static size_t piece_of(size_t left) {
    size_t piece = round_up(left / 2 > pool.least ? left / 2 : pool.least, pool.grain);
    return piece < left ? piece : left;
}

/* Does the part that is thread `index`'s, but for what others take of it. All orders here are relaxed: a range says only
 * who does what; the loop itself was known to whoever joined it. */
static void work_on_part(size_t index) {
    _Atomic uint64_t *own = &pool.left[index].range;
    uint64_t range = atomic_load_explicit(own, memory_order_relaxed);
    while (length_of(range)) {
        size_t begin = begin_of(range), end = begin + piece_of(length_of(range));
        if (!atomic_compare_exchange_weak_explicit(own, &range, range_of(end, end_of(range)), memory_order_relaxed,
                                                   memory_order_relaxed))
            continue;
        pool.part(pool.context, begin, end);
        range = atomic_load_explicit(own, memory_order_relaxed);
    }
}

/* Makes the back of what another thread has left the part of thread `index`, which has none; 0 if nobody has any. */
static int take_from_another(size_t index) {
    for (;;) {
        _Atomic uint64_t *longest = NULL;
        uint64_t range = 0;
        for (int other = 0; other < pool_threads(); other++) {
            uint64_t its = atomic_load_explicit(&pool.left[other].range, memory_order_relaxed);
            if (length_of(its) > length_of(range)) longest = &pool.left[other].range, range = its;
        }
        if (!longest) return 0;
        size_t length = length_of(range), kept = (length - piece_of(length)) / pool.grain * pool.grain;
        size_t begin = begin_of(range) + kept, end = end_of(range);
        if (!atomic_compare_exchange_weak_explicit(longest, &range, range_of(begin_of(range), begin),
                                                   memory_order_relaxed, memory_order_relaxed))
            continue;
        atomic_store_explicit(&pool.left[index].range, range_of(begin, end), memory_order_relaxed);
        return 1;
    }
}

static void pool_work(size_t index) {
    do work_on_part(index);
    while (take_from_another(index));
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int is_new(uint64_t state, uint64_t seen) { return (state & OPEN) && state / LOOP != seen; }

/* Until there is a loop that may be joined, or the thread is to end. */
static void await_loop(int index, uint64_t seen) {
    int64_t begin = nanoseconds(), waited = 0;
    for (; waited < NANOSECONDS_BEFORE_SLEEP; waited = nanoseconds() - begin) {
        if (is_new(atomic_load_explicit(&pool.state, memory_order_relaxed), seen)) return; /* a hint: join looks again */
        if (waited < NANOSECONDS_OF_PAUSES) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_lock(&pool.lock);
    /* Sequentially consistent, as in parallel_for: either this thread sees the loop, or its caller sees the sleeper. */
    atomic_fetch_add(&pool.sleeping, 1);
    while (!is_new(atomic_load(&pool.state), seen) && index < atomic_load(&pool.wanted))
        pthread_cond_wait(&pool.start, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
}

/* Whether it has joined a loop, whose number is then in *seen. */
static int join_loop(uint64_t *seen) {
    uint64_t state = atomic_load_explicit(&pool.state, memory_order_relaxed);
    while (is_new(state, *seen))
        if (atomic_compare_exchange_weak_explicit(&pool.state, &state, state + 1, memory_order_acquire,
                                                  memory_order_relaxed)) {
            *seen = state / LOOP;
            return 1;
        }
    return 0;
}

static void leave_loop(void) {
    uint64_t before = atomic_fetch_sub_explicit(&pool.state, 1, memory_order_release);
    if ((before & (OPEN | JOINED)) != 1) return; /* others are at it, or the caller has not yet asked who is */
    pthread_mutex_lock(&pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_cond_signal(&pool.done);
}

static void *pool_thread(void *argument) {
    int index = (int)(ptrdiff_t)argument;
    uint64_t seen = 0; /* not the current loop, which may have begun before this thread did */
    while (index < atomic_load(&pool.wanted)) {
        if (join_loop(&seen)) {
            pool_work((size_t)index + 1);
            leave_loop();
        } else {
            await_loop(index, seen);
        }
    }
    return NULL;
}

void pool_forget(void) {
    pool.size = 0;
    atomic_init(&pool.wanted, 0);
    atomic_init(&pool.sleeping, 0);
    atomic_init(&pool.state, 0);
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.start, NULL);
    pthread_cond_init(&pool.done, NULL);
}

static void wake_all(void) {
    pthread_mutex_lock(&pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_cond_broadcast(&pool.start);
}

int pool_resize(int threads) {
    int error = 0;
    pthread_mutex_lock(&pool.busy);
    atomic_store(&pool.wanted, 0);
    wake_all();
    for (int i = 0; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
    atomic_store(&pool.wanted, threads - 1);
    sigset_t all, before; /* the host's signals are for its own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pool.size = 0; pool.size < threads - 1 && !error; pool.size += !error)
        error = pthread_create(&pool.threads[pool.size], NULL, pool_thread, (void *)(ptrdiff_t)pool.size);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_mutex_unlock(&pool.busy);
    return error;
}

int pool_threads(void) { return pool.size + 1; }

/* Until all who joined have left; nobody can join any more. */
static void await_others(void) {
    int64_t begin = nanoseconds();
    do {
        if (!(atomic_load_explicit(&pool.state, memory_order_acquire) & JOINED)) return;
        pause_briefly();
    } while (nanoseconds() - begin < NANOSECONDS_OF_PAUSES);
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(&pool.state, memory_order_acquire) & JOINED) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

static void share_out(size_t count, size_t grain) {
    size_t threads = (size_t)pool_threads(), step = round_up((count + threads - 1) / threads, grain);
    pool.grain = grain;
    pool.least = step / PIECES_OF_A_PART > 0 ? step / PIECES_OF_A_PART : 1;
    for (size_t i = 0, begin = 0, end; i < threads; i++, begin = end) {
        end = count - begin < step ? count : begin + step;
        atomic_store_explicit(&pool.left[i].range, range_of(begin, end), memory_order_relaxed); /* the state orders it */
    }
}

void parallel_for(size_t count, size_t grain, double work, loop_part *part, void *context) {
    int asleep = atomic_load_explicit(&pool.sleeping, memory_order_relaxed) != 0;
    double least = asleep ? MIN_PARALLEL_WORK : MIN_WORK_TO_SHARE;
    int alone = work < least || count > UINT32_MAX || pthread_mutex_trylock(&pool.busy);
    if (!alone && pool.size == 0) {
        pthread_mutex_unlock(&pool.busy);
        alone = 1;
    }
    if (alone) {
        part(context, 0, count);
        return;
    }
    pool.part = part;
    pool.context = context;
    share_out(count, grain);
    uint64_t state = atomic_load_explicit(&pool.state, memory_order_relaxed);
    atomic_store(&pool.state, (state / LOOP + 1) * LOOP | OPEN);
    if (atomic_load(&pool.sleeping)) wake_all();
    pool_work(0);
    if (atomic_fetch_and_explicit(&pool.state, ~OPEN, memory_order_acquire) & JOINED) await_others();
    pthread_mutex_unlock(&pool.busy);
}
