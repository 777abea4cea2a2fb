/* An arena in anonymous shared memory, filled from an image that tests/race/native.py wrote: forked processes and
 * threads work on the same one. Ends the program with a sentence if it cannot. */
#ifndef HOTSET_ARENA_IMAGE_H
#define HOTSET_ARENA_IMAGE_H

#include "arena.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static inline struct arena arena_from_image(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) {
        perror(path);
        exit(2);
    }
    size_t nbytes = (size_t)ftell(file);
    void *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    rewind(file);
    if (memory == MAP_FAILED || fread(memory, 1, nbytes, file) != nbytes) {
        fprintf(stderr, "%s: cannot be read into shared memory\n", path);
        exit(2);
    }
    fclose(file);
    struct arena arena;
    const char *problem = arena_attach(&arena, memory, nbytes);
    if (problem) {
        fprintf(stderr, "%s %s\n", path, problem);
        exit(2);
    }
    return arena;
}

/* The bytes of an expert slot. In these images, no slot is longer than a page. */
static inline uint64_t *slot_bytes(const struct arena *arena, uint32_t slot) {
    const struct section_entry *entry = &arena->header->sections[SECTION_EXPERT_SLOTS];
    return (uint64_t *)(arena->base + entry->offset + (size_t)slot * entry->stride);
}

#endif
