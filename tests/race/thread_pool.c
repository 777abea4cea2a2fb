/* The kernels' thread pool: two callers and a thread that changes the pool's size, for some seconds. Every index of a
 * loop must be done once, and its caller must see what was done; ThreadSanitizer watches (scripts/sanitize).
 * usage: thread_pool SECONDS */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define COUNT 500
#define MUCH_WORK 1e9 /* so that no loop is too small for the pool */

static atomic_int stop, wrong;
static atomic_long loops;

static void count_each(void *counts, size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) ((int *)counts)[i]++;
}

static void *call(void *argument) {
    (void)argument;
    static _Thread_local int counts[COUNT];
    for (int loop = 1; !atomic_load(&stop); loop++) {
        parallel_for(COUNT, 4, MUCH_WORK, count_each, counts);
        for (size_t i = 0; i < COUNT; i++)
            if (counts[i] != loop) atomic_store(&wrong, 1);
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
    printf("%ld loops%s\n", atomic_load(&loops), atomic_load(&wrong) ? ", an index was not done once" : "");
    return atomic_load(&wrong);
}
