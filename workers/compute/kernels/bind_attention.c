/* Keys and values into their pages, and attention over them. */
#include "bindings.h"
#include "kernels.h"
#include "kv_page.h" /* of shm/core */
#include "threads.h"

#include <math.h>

#define NEIGHBOUR_NBYTES 1024 /* read by one thread one after another: memory is slower in smaller pieces */

static void attention_part(void *context, size_t begin, size_t end) { kernels->attention(context, begin, end); }

/* pages, format, layer, tables, table_starts, positions: where the keys and values of each row's sequence lie. */
static int take_pages(struct arrays *arrays, PyObject *const *args, Py_ssize_t rows, Py_ssize_t head_dim,
                      struct kv_pages *pages) {
    Py_buffer *bytes = take(arrays, args[0], "kv_pages", KIND_UINT8, 6, WRITABLE | STRIDED);
    if (!bytes) return 0;
    long format = PyLong_AsLong(args[1]);
    Py_ssize_t layer = PyLong_AsSsize_t(args[2]);
    if (PyErr_Occurred()) return 0;
    if (format < 0 || format >= KV_FORMAT_COUNT) {
        PyErr_Format(PyExc_ValueError, "unknown KV page format %ld", format);
        return 0;
    }
    if (head_dim < 1 || head_dim > MAX_HEAD_DIM) {
        PyErr_Format(PyExc_ValueError, "the head size is %zd, expected 1 to %d", head_dim, MAX_HEAD_DIM);
        return 0;
    }
    if (layer < 0 || layer >= bytes->shape[1]) {
        PyErr_Format(PyExc_ValueError, "layer is %zd, expected 0 <= layer < %zd", layer, bytes->shape[1]);
        return 0;
    }
    Py_ssize_t head_nbytes = (Py_ssize_t)kv_row_nbytes((enum kv_format)format, (size_t)head_dim);
    Py_buffer *tables, *starts, *positions;
    if (!(tables = take(arrays, args[3], "block_tables", KIND_UINT32, 1, 0)) ||
        !(starts = take(arrays, args[4], "table_starts", KIND_INT64, 1, 0)) ||
        !(positions = take(arrays, args[5], "positions", KIND_INT32, 1, 0)) ||
        !expect(bytes->shape[5], head_nbytes, "the last dimension of kv_pages (bytes of a head)") ||
        !expect(starts->shape[0], rows, "the length of table_starts") ||
        !expect(positions->shape[0], rows, "the length of positions"))
        return 0;
    if (bytes->shape[2] < 1 || bytes->shape[2] > 2) {
        PyErr_Format(PyExc_ValueError, "the third dimension of kv_pages is %zd, expected 2 (keys, values) or 1",
                     bytes->shape[2]);
        return 0;
    }
    if (bytes->shape[3] < 1 || bytes->shape[4] < 1) {
        PyErr_SetString(PyExc_ValueError, "kv_pages has an empty dimension");
        return 0;
    }
    *pages = (struct kv_pages){
        .bytes = bytes->buf,
        .tables = tables->buf,
        .table_starts = starts->buf,
        .positions = positions->buf,
        .layer = (size_t)layer,
        .planes = (size_t)bytes->shape[2],
        .block_size = (size_t)bytes->shape[3],
        .num_kv_heads = (size_t)bytes->shape[4],
        .head_dim = (size_t)head_dim,
        .page_stride = (size_t)bytes->strides[0],
        .format = (enum kv_format)format,
    };
    int64_t block_size = bytes->shape[3];
    for (Py_ssize_t row = 0; row < rows; row++) {
        int64_t start = pages->table_starts[row], position = pages->positions[row];
        if (start < 0 || position < 0 || start + position / block_size >= tables->shape[0]) {
            PyErr_Format(PyExc_ValueError, "row %zd at position %lld lies outside its block table", row,
                         (long long)position);
            return 0;
        }
    }
    for (Py_ssize_t i = 0; i < tables->shape[0]; i++)
        if (pages->tables[i] >= (uint64_t)bytes->shape[0]) {
            PyErr_Format(PyExc_ValueError, "block_tables[%zd] is page %lu, expected less than %zd", i,
                         (unsigned long)pages->tables[i], bytes->shape[0]);
            return 0;
        }
    return 1;
}

/* Writes all rows, or none: the first row that the format cannot hold, -1 if there is none. `values` is NULL where keys
 * are values too. */
static Py_ssize_t write_rows(const struct kv_pages *pages, const float *keys, const float *values, size_t rows) {
    const struct kv_codec *codec = kv_fastest_codec();
    size_t heads = pages->num_kv_heads, dim = pages->head_dim, width = heads * dim;
    if (codec->any_refused(pages->format, keys, rows * width) ||
        (values && codec->any_refused(pages->format, values, rows * width)))
        for (size_t row = 0; row < rows; row++)
            if (kv_find_refused(pages->format, keys + row * width, width) >= 0 ||
                (values && kv_find_refused(pages->format, values + row * width, width) >= 0))
                return (Py_ssize_t)row;
    size_t token_nbytes = heads * kv_row_nbytes(pages->format, dim);
    kv_page_begin_rows();
    for (size_t row = 0; row < rows; row++) {
        size_t position = (size_t)pages->positions[row];
        size_t page = pages->tables[pages->table_starts[row] + (int64_t)(position / pages->block_size)];
        uint8_t *at = pages->bytes + page * pages->page_stride + pages->layer * pages->planes * kv_plane_nbytes(pages) +
                      position % pages->block_size * token_nbytes;
        kv_encode(codec, pages->format, keys + row * width, heads, dim, at);
        if (values) kv_encode(codec, pages->format, values + row * width, heads, dim, at + kv_values_offset(pages));
    }
    return -1;
}

PyObject *py_write_kv(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    struct kv_pages pages;
    Py_buffer *keys, *values = NULL;
    if (!count_is(count, 8)) return NULL;
    int has_values = args[1] != Py_None;
    if (!(keys = take(&arrays, args[0], "keys", KIND_FLOAT32, 3, 0)) ||
        !take_pages(&arrays, args + 2, keys->shape[0], keys->shape[2], &pages) ||
        !expect(keys->shape[1], (Py_ssize_t)pages.num_kv_heads, "the number of heads of keys") ||
        !expect((Py_ssize_t)pages.planes, 1 + has_values, "the third dimension of kv_pages (keys, values if there are)") ||
        (has_values && (!(values = take(&arrays, args[1], "values", KIND_FLOAT32, 3, 0)) ||
                        !expect(values->shape[0], keys->shape[0], "the number of rows of values") ||
                        !expect(values->shape[1], (Py_ssize_t)pages.num_kv_heads, "the number of heads of values") ||
                        !expect(values->shape[2], (Py_ssize_t)pages.head_dim, "the head size of values")))) {
        release(&arrays);
        return NULL;
    }
    Py_ssize_t refused;
    Py_BEGIN_ALLOW_THREADS
    refused = write_rows(&pages, keys->buf, values ? values->buf : NULL, (size_t)keys->shape[0]);
    Py_END_ALLOW_THREADS
    release(&arrays);
    return PyLong_FromSsize_t(refused);
}

/* Query heads that one thread takes at least: whole groups, so that two do not convert the same rows, and as many
 * neighbours as make up NEIGHBOUR_NBYTES of a row while every thread still has some. Where key-value heads are fewer than
 * threads, parts of a group, in fours, which the kernel takes at once. */
static size_t attention_grain(const struct attention *op) {
    size_t head_nbytes = kv_row_nbytes(op->pages.format, op->pages.head_dim), threads = (size_t)pool_threads();
    size_t share = op->pages.num_kv_heads / threads, group = op->num_heads / op->pages.num_kv_heads;
    size_t kv_heads = (NEIGHBOUR_NBYTES + head_nbytes - 1) / head_nbytes;
    if (!share) return (op->num_heads / threads + 3) / 4 * 4;
    return (kv_heads < share ? kv_heads : share) * group;
}

/* Keys that are values too may have more numbers than are mixed. */
static int expect_width(Py_ssize_t width, Py_ssize_t head_dim, size_t planes) {
    if (planes == 2) return expect(width, head_dim, "the head size of out");
    if (width >= 1 && width <= head_dim) return 1;
    PyErr_Format(PyExc_ValueError, "the head size of out is %zd, expected 1 to %zd", width, head_dim);
    return 0;
}

PyObject *py_attention(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    struct attention op;
    Py_buffer *queries, *out, *sinks = NULL;
    if (!count_is_between(count, 9, 11)) return NULL;
    double scale = count > 10 ? PyFloat_AsDouble(args[10]) : 0;
    Py_ssize_t window = PyLong_AsSsize_t(args[7]);
    if (PyErr_Occurred()) return NULL;
    if (window < 0) return PyErr_Format(PyExc_ValueError, "the window is %zd, expected at least 0 (none)", window);
    if (!(queries = take(&arrays, args[0], "queries", KIND_FLOAT32, 3, 0)) ||
        !take_pages(&arrays, args + 1, queries->shape[0], queries->shape[2], &op.pages) ||
        !(out = take(&arrays, args[8], "out", KIND_FLOAT32, 3, WRITABLE)) ||
        !expect(out->shape[0], queries->shape[0], "the number of rows of out") ||
        !expect(out->shape[1], queries->shape[1], "the number of heads of out") ||
        !expect_width(out->shape[2], queries->shape[2], op.pages.planes) ||
        (count > 9 && args[9] != Py_None &&
         (!(sinks = take(&arrays, args[9], "sinks", KIND_FLOAT32, 1, 0)) ||
          !expect(sinks->shape[0], queries->shape[1], "the length of sinks (query heads)"))) ||
        !expect(queries->shape[1] % (Py_ssize_t)op.pages.num_kv_heads, 0, "num_heads modulo num_kv_heads")) {
        release(&arrays);
        return NULL;
    }
    op.queries = queries->buf;
    op.out = out->buf;
    op.num_heads = (size_t)queries->shape[1];
    op.value_dim = (size_t)out->shape[2];
    op.sinks = sinks ? sinks->buf : NULL;
    op.window = (size_t)window;
    op.scale = count > 10 ? (float)scale : 1.0f / sqrtf((float)op.pages.head_dim);
    Py_BEGIN_ALLOW_THREADS
    double work = 0;
    for (size_t row = 0; row < (size_t)queries->shape[0]; row++)
        work += 2.0 * (double)((size_t)op.pages.positions[row] + 1 - attention_start(&op, row)) *
                (double)(op.num_heads * op.pages.head_dim);
    parallel_for((size_t)queries->shape[0] * op.num_heads, attention_grain(&op), work, attention_part, &op);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}
