/* One expert on its way into a slot: the chunks that are read, the pieces of the slot that they fill, and the checksum
 * of what has come. All fields are guarded by the lanes' lock but for what is said to belong to one thread. */
#ifndef HOTSET_LOAD_H
#define HOTSET_LOAD_H

#include "xxh3.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define END_OF_FILE (-1) /* in the place of an errno */
#define MAX_PIECES_OF_RUN 64 /* that one read fills */

/* A part of the slot that comes from one place of a file. */
struct piece {
    uint64_t start, nbytes;
    uint64_t present; /* bytes from its start that are in the slot */
};

/* Bytes of a file that follow one another, for `count` pieces from `first` on. */
struct chunk {
    int fd;
    uint64_t offset, nbytes;
    uint32_t first, count;
};

/* A matrix that the file has the other way round: `rows` x `columns` values of `item_nbytes` there. */
struct transposed {
    uint64_t start, rows, columns, item_nbytes;
};

struct load {
    uint64_t id;
    uint8_t *slot;
    uint64_t nbytes;
    uint64_t touched; /* bytes from the slot's start that reading may write to: more than `nbytes` in direct reads */
    size_t block_nbytes; /* of this struct with the parts behind it */
    struct chunk *chunks;
    struct piece *pieces;
    uint32_t *in_order; /* pieces by their start */
    struct transposed *transposed;
    uint32_t num_chunks, num_pieces, num_transposed;
    uint32_t next_chunk; /* the first that no lane has taken */
    uint32_t reading;    /* lanes that are at it */
    bool urgent, cancelled, finished, from_disk;
    int error; /* why it cannot be had: an errno or END_OF_FILE, at `error_offset` of `error_fd` */
    int error_fd;
    uint64_t error_offset;
    struct xxh3 sums; /* belongs to the thread that set `hashing` */
    bool hashing;
    uint64_t hashed;   /* bytes from the start of the slot */
    uint32_t complete; /* pieces in order that are present */
    uint64_t checksum; /* when finished */
    /* What the publication needs: see publish.h. */
    uint32_t slot_number;
    uint16_t format, source; /* of struct slot_info */
    bool warm_start;         /* nobody had asked for it when it was begun */
    bool is_known;           /* its checksum has to be `expected` */
    uint64_t expected;
    uint64_t began; /* monotonic nanoseconds: when it was begun, or became urgent */
    bool published;
};

/* Where its parts lie: behind it, in one block. */
static inline void load_place(struct load *load) {
    load->chunks = (struct chunk *)(load + 1);
    load->pieces = (struct piece *)(load->chunks + load->num_chunks);
    load->transposed = (struct transposed *)(load->pieces + load->num_pieces);
    load->in_order = (uint32_t *)(load->transposed + load->num_transposed);
}

/* A load whose parts are still to be filled in, for free(); NULL if there is no memory for it. */
static inline struct load *load_new(uint32_t chunks, uint32_t pieces, uint32_t transposed) {
    size_t nbytes = sizeof(struct load) + chunks * sizeof(struct chunk) +
                    pieces * (sizeof(struct piece) + sizeof(uint32_t)) + transposed * sizeof(struct transposed);
    struct load *load = calloc(1, nbytes);
    if (!load) return NULL;
    load->block_nbytes = nbytes;
    load->num_chunks = chunks;
    load->num_pieces = pieces;
    load->num_transposed = transposed;
    load_place(load);
    return load;
}

/* Another one of the same parts. */
static inline struct load *load_copy(const struct load *load) {
    struct load *copy = malloc(load->block_nbytes);
    if (!copy) return NULL;
    memcpy(copy, load, load->block_nbytes);
    load_place(copy);
    return copy;
}

/* Puts pieces in order; whether they fill the slot's first `nbytes` bytes without gap or overlap. */
static inline bool load_prepare(struct load *load) {
    for (uint32_t i = 0; i < load->num_pieces; i++) {
        uint32_t at = i; /* almost in order: an insertion is a step or two */
        for (; at && load->pieces[load->in_order[at - 1]].start > load->pieces[i].start; at--)
            load->in_order[at] = load->in_order[at - 1];
        load->in_order[at] = i;
    }
    uint64_t end = 0;
    for (uint32_t i = 0; i < load->num_pieces; i++) {
        const struct piece *piece = &load->pieces[load->in_order[i]];
        if (piece->start != end) return false;
        end += piece->nbytes;
    }
    xxh3_begin(&load->sums);
    return end == load->nbytes;
}

static inline bool load_has_unread(const struct load *load) { return load->next_chunk < load->num_chunks; }

/* The next chunks, `most` at most (and at least one), as one: as far as they follow one another in the file. `alignment`
 * of direct reads, or 0. */
static inline struct chunk load_take(struct load *load, uint32_t most, uint64_t alignment) {
    struct chunk run = load->chunks[load->next_chunk++];
    for (; most > 1 && load_has_unread(load); most--) {
        const struct chunk *next = &load->chunks[load->next_chunk];
        if (next->fd != run.fd || next->offset != run.offset + run.nbytes || run.count + next->count > MAX_PIECES_OF_RUN)
            break;
        if (alignment && load->pieces[next->first].start != load->pieces[run.first].start + run.nbytes) break;
        run.nbytes += next->nbytes;
        run.count += next->count;
        load->next_chunk++;
    }
    return run;
}

/* Whole blocks of the checksum from the start of the slot that are all there, in bytes. */
static inline uint64_t load_hashable(struct load *load) {
    const struct piece *piece = NULL;
    while (load->complete < load->num_pieces) {
        piece = &load->pieces[load->in_order[load->complete]];
        if (piece->present < piece->nbytes) break;
        load->complete++;
    }
    uint64_t present = load->complete < load->num_pieces ? piece->start + piece->present : load->nbytes;
    uint64_t most = xxh3_whole_blocks(load->nbytes) * XXH3_BLOCK;
    return present < most ? present / XXH3_BLOCK * XXH3_BLOCK : most;
}

static inline void load_hash_whole(struct load *load, const struct xxh3_kernel *kernel) {
    xxh3_begin(&load->sums);
    kernel->blocks(load->sums.sums, load->slot, xxh3_whole_blocks(load->nbytes));
}

/* Turns the matrices that the file has the other way round; 0, or ENOMEM. Of the thread that ends the load. */
static inline int load_transpose(struct load *load) {
    enum { TILE = 32 }; /* rows and columns of values that stay in the first-level cache */
    for (uint32_t i = 0; i < load->num_transposed; i++) {
        const struct transposed *matrix = &load->transposed[i];
        uint64_t rows = matrix->rows, columns = matrix->columns, item = matrix->item_nbytes;
        uint8_t *to = load->slot + matrix->start, *from = malloc(rows * columns * item);
        if (!from) return ENOMEM;
        memcpy(from, to, rows * columns * item);
        for (uint64_t row = 0; row < rows; row += TILE)
            for (uint64_t column = 0; column < columns; column += TILE)
                for (uint64_t c = column; c < columns && c < column + TILE; c++)
                    for (uint64_t r = row; r < rows && r < row + TILE; r++)
                        memcpy(to + (c * rows + r) * item, from + (r * columns + c) * item, item);
        free(from);
    }
    return 0;
}

#endif
