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
static const char *fill_load(struct load *load, const int64_t *rows, uint64_t alignment) {
    uint32_t chunks = 0;
    for (uint32_t i = 0; i < load->num_pieces; i++, rows += PIECE_COLUMNS) {
        if (rows[CHUNK_FD] < 0 || rows[CHUNK_FD] > INT32_MAX || rows[PIECE_OFFSET] < 0 || rows[PIECE_START] < 0 ||
            rows[PIECE_NBYTES] <= 0)
            return "a number is out of range";
        uint64_t start = (uint64_t)rows[PIECE_START], nbytes = (uint64_t)rows[PIECE_NBYTES];
        load->pieces[i] = (struct piece){.start = start, .nbytes = nbytes};
        load->nbytes += nbytes;
        if (rows[CHUNK_NUMBER] == chunks && chunks < load->num_chunks)
            load->chunks[chunks++] =
                (struct chunk){.fd = (int)rows[CHUNK_FD], .offset = (uint64_t)rows[PIECE_OFFSET], .first = i};
        else if (rows[CHUNK_NUMBER] + 1 != chunks)
            return "the chunks are not in order";
        struct chunk *chunk = &load->chunks[chunks - 1];
        if ((uint64_t)rows[PIECE_OFFSET] != chunk->offset + chunk->nbytes || rows[CHUNK_FD] != chunk->fd)
            return "the pieces of a chunk do not follow one another in a file";
        chunk->nbytes += nbytes;
        if (++chunk->count > MAX_PIECES_OF_RUN) return "a chunk has too many pieces";
        if (alignment && chunk->count > 1) return "direct reads take a piece at a time";
        uint64_t touched = alignment ? (nbytes + alignment - 1) / alignment * alignment : nbytes;
        if (start + touched > load->touched) load->touched = start + touched;
    }
    return load_prepare(load) ? NULL : "the pieces leave a gap or overlap";
}

static const char *fill_transposed(struct load *load, const int64_t *rows) {
    for (uint32_t i = 0; i < load->num_transposed; i++, rows += TRANSPOSED_COLUMNS) {
        for (int column = 0; column < TRANSPOSED_COLUMNS; column++)
            if (rows[column] < (column != MATRIX_START) || rows[column] > UINT32_MAX) return "a matrix is out of range";
        uint64_t row_nbytes = (uint64_t)rows[MATRIX_COLUMNS] * (uint64_t)rows[MATRIX_ITEM_NBYTES];
        uint64_t start = (uint64_t)rows[MATRIX_START];
        if (start > load->nbytes || row_nbytes > (load->nbytes - start) / (uint64_t)rows[MATRIX_ROWS])
            return "a matrix lies outside of the expert";
        load->transposed[i] = (struct transposed){start, (uint64_t)rows[MATRIX_ROWS], (uint64_t)rows[MATRIX_COLUMNS],
                                                  (uint64_t)rows[MATRIX_ITEM_NBYTES]};
    }
    return NULL;
}

/* What an expert's loads are copies of; NULL with an exception. */
static struct load *new_load(const Py_buffer *pieces, const Py_buffer *transposed, uint64_t alignment) {
    Py_ssize_t count = pieces->shape[0], turned = transposed->shape[0];
    if (count < 1 || count > UINT16_MAX || turned > UINT16_MAX)
        return PyErr_SetString(PyExc_ValueError, "these pieces cannot be read: there are none, or too many"), NULL;
    const int64_t *last = (const int64_t *)pieces->buf + PIECE_COLUMNS * (count - 1);
    int64_t chunks = last[CHUNK_NUMBER] >= 0 && last[CHUNK_NUMBER] < count ? last[CHUNK_NUMBER] + 1 : count;
    struct load *load = load_new((uint32_t)chunks, (uint32_t)count, (uint32_t)turned);
    if (!load) return PyErr_NoMemory(), NULL;
    const char *problem = fill_load(load, pieces->buf, alignment);
    if (!problem) problem = fill_transposed(load, transposed->buf);
    if (!problem) return load;
    free(load);
    return PyErr_Format(PyExc_ValueError, "these pieces cannot be read: %s", problem), NULL;
}

#endif
