/* hotset.workers.reading._core: how Python says what is to be read, as rows of numbers. */
#ifndef HOTSET_BIND_LOAD_H
#define HOTSET_BIND_LOAD_H

#include "bind_arrays.h"
#include "read.h"

static const struct array_kind BYTES = {"uint8", "B", 1};
static const struct array_kind INT64 = {"int64", "lq", 8};

enum { CHUNK_NUMBER, CHUNK_FD, PIECE_OFFSET, PIECE_START, PIECE_NBYTES, PIECE_COLUMNS };
enum { MATRIX_START, MATRIX_ROWS, MATRIX_COLUMNS, MATRIX_ITEM_NBYTES, TRANSPOSED_COLUMNS };

/* Makes chunks and pieces of the rows; NULL or what is wrong with them. */
static const char *fill_load(struct load *load, const int64_t *rows, uint32_t count, uint64_t slot_nbytes,
                             uint64_t alignment) {
    for (uint32_t i = 0; i < count; i++, rows += PIECE_COLUMNS) {
        if (rows[CHUNK_FD] < 0 || rows[CHUNK_FD] > INT32_MAX || rows[PIECE_OFFSET] < 0 || rows[PIECE_START] < 0 ||
            rows[PIECE_NBYTES] <= 0)
            return "a number is out of range";
        uint64_t start = (uint64_t)rows[PIECE_START], nbytes = (uint64_t)rows[PIECE_NBYTES];
        load->pieces[i] = (struct piece){.start = start, .nbytes = nbytes};
        load->nbytes += nbytes;
        if (rows[CHUNK_NUMBER] == load->num_chunks)
            load->chunks[load->num_chunks++] =
                (struct chunk){.fd = (int)rows[CHUNK_FD], .offset = (uint64_t)rows[PIECE_OFFSET], .first = i};
        else if (rows[CHUNK_NUMBER] + 1 != load->num_chunks)
            return "the chunks are not in order";
        struct chunk *chunk = &load->chunks[load->num_chunks - 1];
        if ((uint64_t)rows[PIECE_OFFSET] != chunk->offset + chunk->nbytes || rows[CHUNK_FD] != chunk->fd)
            return "the pieces of a chunk do not follow one another in a file";
        chunk->nbytes += nbytes;
        if (++chunk->count > MAX_PIECES_OF_RUN) return "a chunk has too many pieces";
        if (alignment && chunk->count > 1) return "direct reads take a piece at a time";
        uint64_t touched = alignment ? (nbytes + alignment - 1) / alignment * alignment : nbytes;
        if (start > slot_nbytes || touched > slot_nbytes - start) return "a piece lies outside of the slot";
    }
    load->num_pieces = count;
    return load_prepare(load) ? NULL : "the pieces leave a gap or overlap";
}

static const char *fill_transposed(struct load *load, const int64_t *rows, uint32_t count) {
    for (uint32_t i = 0; i < count; i++, rows += TRANSPOSED_COLUMNS) {
        for (int column = 0; column < TRANSPOSED_COLUMNS; column++)
            if (rows[column] < (column != MATRIX_START) || rows[column] > UINT32_MAX) return "a matrix is out of range";
        uint64_t row_nbytes = (uint64_t)rows[MATRIX_COLUMNS] * (uint64_t)rows[MATRIX_ITEM_NBYTES];
        uint64_t start = (uint64_t)rows[MATRIX_START];
        if (start > load->nbytes || row_nbytes > (load->nbytes - start) / (uint64_t)rows[MATRIX_ROWS])
            return "a matrix lies outside of the expert";
        load->transposed[i] = (struct transposed){start, (uint64_t)rows[MATRIX_ROWS], (uint64_t)rows[MATRIX_COLUMNS],
                                                  (uint64_t)rows[MATRIX_ITEM_NBYTES]};
    }
    load->num_transposed = count;
    return NULL;
}

/* NULL with an exception. */
static struct load *new_load(const Py_buffer *slot, const Py_buffer *pieces, const Py_buffer *transposed,
                             uint64_t alignment) {
    size_t count = (size_t)pieces->shape[0], turned = (size_t)transposed->shape[0];
    struct load *load = calloc(1, sizeof *load);
    const char *problem = NULL;
    if (load) {
        load->slot = slot->buf;
        load->chunks = calloc(count + 1, sizeof *load->chunks);
        load->pieces = calloc(count + 1, sizeof *load->pieces);
        load->in_order = calloc(count + 1, sizeof *load->in_order);
        load->transposed = calloc(turned + 1, sizeof *load->transposed);
    }
    if (!load || !load->chunks || !load->pieces || !load->in_order || !load->transposed) PyErr_NoMemory();
    else if (count < 1 || count > UINT16_MAX || turned > UINT16_MAX) problem = "there are none, or too many";
    else if (!(problem = fill_load(load, pieces->buf, (uint32_t)count, (uint64_t)slot->shape[0], alignment)))
        problem = fill_transposed(load, transposed->buf, (uint32_t)turned);
    if (problem) PyErr_Format(PyExc_ValueError, "these pieces cannot be read: %s", problem);
    if (!PyErr_Occurred()) return load;
    load_free(load);
    return NULL;
}

#endif
