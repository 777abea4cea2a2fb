/* A pool of threads that split one loop. One loop at a time; a second caller, or a loop too small to be worth the wake-up,
 * runs in its own thread. What a part computes does not depend on the parts, so neither does the result. */
#ifndef HOTSET_THREADS_H
#define HOTSET_THREADS_H

#include <stddef.h>

#define MAX_THREADS 256

typedef void loop_part(void *context, size_t begin, size_t end);

/* part(context, begin, end) over [0, count) in pieces of a multiple of `grain`; `work` is the whole in multiply-adds. */
void parallel_for(size_t count, size_t grain, double work, loop_part *part, void *context);

/* Ends the pool's threads and starts `threads` - 1 new ones; 0, or the error number of pthread_create. */
int pool_resize(int threads);

/* How many threads share a loop, the caller's own included. */
int pool_threads(void);

/* In a forked child, where the threads of the parent do not exist. */
void pool_forget(void);

#endif
