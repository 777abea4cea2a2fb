/* The kernels' thread pool: two callers and a thread that changes the pool's size, for some seconds. Every index of a
 * loop must be done once, in pieces that begin at a multiple of the grain, and its caller must see what was done;
 * ThreadSanitizer watches (scripts/sanitize).
 * usage: thread_pool SECONDS */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define MOST 500 /* indices of a loop */
#define MUCH_WORK 1e9 /* so that no loop is too small for the pool */

struct counted {
    int of[MOST];
    size_t grain;
};

static atomic_int stop, wrong;
static atomic_long loops;

static void count_each(void *context, size_t begin, size_t end) {
    struct counted *counted = context;
    if (begin % counted->grain) atomic_store(&wrong, 1);
    for (size_t i = begin; i < end; i++) counted->of[i]++;
}

static void *call(void *argument) {
    (void)argument;
    static _Thread_local struct counted counted;
    for (size_t loop = 1; !atomic_load(&stop); loop++) {
        size_t count = loop % 2 ? loop % MOST : loop % 20; /* many small ones, too */
        for (size_t i = 0; i < MOST; i++) counted.of[i] = 0;
        counted.grain = 1 + loop / MOST % 5;
        parallel_for(count, counted.grain, MUCH_WORK, count_each, &counted);
        for (size_t i = 0; i < MOST; i++)
            if (counted.of[i] != (i < count)) atomic_store(&wrong, 1);
        atomic_fetch_add(&loops, 1);
    }
    return NULL;
}

int main(int argc, char **argv) {
    time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 2);
    pthread_t callers[2];
    for (int i = 0; i < 2; i++) pthread_create(&callers[i], NULL, call, NULL);
    for (int size = 0; time(NULL) < end; size++) {
        if (pool_resize(1 + size % 5)) return 2;
        nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++) pthread_join(callers[i], NULL);
    printf("%ld loops%s\n", atomic_load(&loops), atomic_load(&wrong) ? ", an index was not done once, or a piece began within a grain" : "");
    return atomic_load(&wrong);
}
