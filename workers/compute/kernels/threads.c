#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define MIN_PARALLEL_WORK 400000 /* multiply-adds; below, waking a thread costs more than it saves */

/* Waking a sleeping thread takes some 30 us, about as long as a product of one row. The loops of a forward pass follow
 * one another within a few us, so a thread looks for the next one so often before it sleeps: for 5 to 25 us. */
#define LOOKS_BEFORE_SLEEP 500

static struct {
    pthread_mutex_t busy; /* held by the thread whose loop the pool runs */
    pthread_mutex_t lock; /* guards what follows, except for reading the atomics */
    pthread_cond_t start, done;
    pthread_t threads[MAX_THREADS];
    int size;   /* threads besides the caller */
    int wanted; /* a thread with an index from here on ends */
    int open;   /* threads may still join the current loop; none has to: one that wakes late is not waited for */
    atomic_int running; /* threads that joined it and have not left */
    atomic_ulong loop;  /* number of loops since the threads were started */
    loop_part *part;
    void *context;
    size_t count, step;
    atomic_size_t next;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .start = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

static void pool_work(void) {
    for (;;) {
        size_t begin = atomic_fetch_add_explicit(&pool.next, pool.step, memory_order_relaxed);
        if (begin >= pool.count) return;
        size_t end = pool.count - begin < pool.step ? pool.count : begin + pool.step;
        pool.part(pool.context, begin, end);
    }
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void await_next_loop(unsigned long seen) {
    /* Relaxed: only a hint, the thread looks again under the lock. */
    for (int i = 0; i < LOOKS_BEFORE_SLEEP && atomic_load_explicit(&pool.loop, memory_order_relaxed) == seen; i++)
        pause_briefly();
}

static void *pool_thread(void *argument) {
    int index = (int)(ptrdiff_t)argument;
    unsigned long seen = 0; /* not pool.loop: the first loop may have begun before this thread did */
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        /* Relaxed here and below: the lock orders them. */
        while ((!pool.open || atomic_load_explicit(&pool.loop, memory_order_relaxed) == seen) && index < pool.wanted)
            pthread_cond_wait(&pool.start, &pool.lock);
        if (index >= pool.wanted) break;
        seen = atomic_load_explicit(&pool.loop, memory_order_relaxed);
        atomic_fetch_add_explicit(&pool.running, 1, memory_order_relaxed);
        pthread_mutex_unlock(&pool.lock);
        pool_work();
        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub_explicit(&pool.running, 1, memory_order_relaxed) == 1) pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
        await_next_loop(seen);
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

void pool_forget(void) {
    pool.size = pool.wanted = pool.open = 0;
    atomic_init(&pool.running, 0);
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.start, NULL);
    pthread_cond_init(&pool.done, NULL);
}

int pool_resize(int threads) {
    int error = 0;
    pthread_mutex_lock(&pool.busy);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = 0;
    pthread_cond_broadcast(&pool.start);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
    pthread_mutex_lock(&pool.lock); /* the new threads wait for it until they are all there */
    atomic_store_explicit(&pool.loop, 0, memory_order_relaxed); /* under the lock */
    pool.wanted = threads - 1;
    sigset_t all, before; /* the host's signals are for its own threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pool.size = 0; pool.size < pool.wanted && !error; pool.size += !error)
        error = pthread_create(&pool.threads[pool.size], NULL, pool_thread, (void *)(ptrdiff_t)pool.size);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool.wanted = pool.size;
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.busy);
    return error;
}

int pool_threads(void) { return pool.size + 1; }

void parallel_for(size_t count, size_t grain, double work, loop_part *part, void *context) {
    int alone = work < MIN_PARALLEL_WORK || pthread_mutex_trylock(&pool.busy);
    if (!alone && pool.size == 0) {
        pthread_mutex_unlock(&pool.busy);
        alone = 1;
    }
    if (alone) {
        part(context, 0, count);
        return;
    }
    size_t pieces = (size_t)pool_threads() * 4; /* more than threads: a slow core then holds up less */
    pthread_mutex_lock(&pool.lock);
    pool.step = (count + pieces - 1) / pieces;
    pool.step = (pool.step + grain - 1) / grain * grain;
    pool.part = part;
    pool.context = context;
    pool.count = count;
    /* Relaxed: the lock orders them. */
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool.loop, 1, memory_order_relaxed);
    pool.open = 1;
    pthread_cond_broadcast(&pool.start);
    pthread_mutex_unlock(&pool.lock);
    pool_work();
    /* Relaxed: a hint as in await_next_loop. */
    for (int i = 0; i < LOOKS_BEFORE_SLEEP && atomic_load_explicit(&pool.running, memory_order_relaxed); i++)
        pause_briefly();
    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    while (atomic_load_explicit(&pool.running, memory_order_relaxed)) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.busy);
}
