/* Preloaded by test_allocations.py: counts the calls of malloc and its relatives while `counting` is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

int counting;
long allocations;

void *malloc(size_t size) {
    static void *(*next)(size_t);
    if (!next) next = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
    allocations += counting;
    return next(size);
}

void *realloc(void *old, size_t size) {
    static void *(*next)(void *, size_t);
    if (!next) next = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    allocations += counting;
    return next(old, size);
}
