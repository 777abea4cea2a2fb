/* hotset.workers.compute._kernels: checks arguments, lets go of the GIL, calls the kernels. See _kernels.pyi. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"
#include "kv_page.h" /* of shm/core */
#include "threads.h"

static const struct kernels *kernels;

/* --- Arguments --- */

struct array {
    Py_buffer view;
    enum { KIND_FLOAT32, KIND_FLOAT16, KIND_UINT16, KIND_UINT8, KIND_INT32, KIND_UINT32, KIND_INT64, KIND_OTHER } kind;
};

#define MAX_ARRAYS 8

struct arrays { /* all buffers that a call holds */
    struct array held[MAX_ARRAYS];
    int count;
};

static void release(struct arrays *arrays) {
    while (arrays->count) PyBuffer_Release(&arrays->held[--arrays->count].view);
}

static int kind_of(const Py_buffer *view) {
    const char *format = view->format ? view->format : "B";
    if (*format == '<' || *format == '=' || *format == '@') format++;
    if (!*format || format[1]) return KIND_OTHER;
    switch (*format) {
    case 'f': return KIND_FLOAT32;
    case 'e': return KIND_FLOAT16;
    case 'H': return KIND_UINT16;
    case 'B': return KIND_UINT8;
    case 'i': return KIND_INT32;
    case 'I': return KIND_UINT32;
    case 'l':
    case 'q': return view->itemsize == 8 ? KIND_INT64 : view->itemsize == 4 ? KIND_INT32 : KIND_OTHER;
    case 'L': return view->itemsize == 4 ? KIND_UINT32 : KIND_OTHER;
    default: return KIND_OTHER;
    }
}

static const char *const kind_names[] = {"float32", "float16", "uint16", "uint8", "int32", "uint32", "int64"};

#define ANY_KIND (-1)
#define WRITABLE 1
#define STRIDED 2 /* the first dimension may have gaps */

/* The buffer of `object`, of the given kind and number of dimensions, contiguous; NULL with an exception otherwise. */
static Py_buffer *take(struct arrays *arrays, PyObject *object, const char *name, int kind, int dimensions, int flags) {
    struct array *array = &arrays->held[arrays->count];
    int request = PyBUF_FORMAT | PyBUF_STRIDES | (flags & WRITABLE ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, &array->view, request) < 0) return NULL;
    arrays->count++;
    array->kind = kind_of(&array->view);
    if (kind != ANY_KIND && (int)array->kind != kind) {
        PyErr_Format(PyExc_TypeError, "%s has element format '%s', expected %s", name, array->view.format,
                     kind_names[kind]);
        return NULL;
    }
    if (array->view.ndim != dimensions) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected %d", name, array->view.ndim, dimensions);
        return NULL;
    }
    Py_ssize_t stride = array->view.itemsize;
    int first = flags & STRIDED ? 1 : 0;
    for (int d = dimensions - 1; d >= first; d--) {
        if (array->view.shape[d] > 1 && array->view.strides[d] != stride) {
            PyErr_Format(PyExc_ValueError, "%s is not contiguous", name);
            return NULL;
        }
        stride *= array->view.shape[d];
    }
    if (first && array->view.shape[0] > 1 && array->view.strides[0] < stride) {
        PyErr_Format(PyExc_ValueError, "%s has overlapping rows", name);
        return NULL;
    }
    return &array->view;
}

static int expect(Py_ssize_t found, Py_ssize_t expected, const char *what) {
    if (found == expected) return 1;
    PyErr_Format(PyExc_ValueError, "%s is %zd, expected %zd", what, found, expected);
    return 0;
}

static int count_is(Py_ssize_t count, Py_ssize_t expected) {
    if (count == expected) return 1;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return 0;
}

/* --- Kernels on threads --- */

static void linear_part(void *context, size_t begin, size_t end) { kernels->linear(context, begin, end); }
static void attention_part(void *context, size_t begin, size_t end) { kernels->attention(context, begin, end); }

static void run_linear(struct linear *op) {
    double work = (double)op->rows * (double)op->inputs * (double)op->outputs;
    parallel_for(op->outputs, MAX_TILE_OUTS, work, linear_part, op);
}

static PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *x, *weight, *out;
    if (!count_is(count, 3)) return NULL;
    if (!(x = take(&arrays, args[0], "x", KIND_FLOAT32, 2, 0)) ||
        !(weight = take(&arrays, args[1], "weight", ANY_KIND, 2, 0)) ||
        !(out = take(&arrays, args[2], "out", KIND_FLOAT32, 2, WRITABLE)) ||
        !expect(weight->shape[1], x->shape[1], "the width of weight") ||
        !expect(out->shape[0], x->shape[0], "the number of rows of out") ||
        !expect(out->shape[1], weight->shape[0], "the width of out"))
        goto failed;
    struct linear op = {x->buf, weight->buf, out->buf, (size_t)x->shape[0], (size_t)x->shape[1],
                        (size_t)weight->shape[0], FORMAT_FLOAT32};
    switch (arrays.held[1].kind) {
    case KIND_FLOAT32: break;
    case KIND_FLOAT16: op.format = FORMAT_FLOAT16; break;
    case KIND_UINT16: op.format = FORMAT_BFLOAT16; break;
    default:
        PyErr_Format(PyExc_TypeError, "weight has element format '%s', expected float32, float16 or uint16 (bfloat16)",
                     weight->format);
        goto failed;
    }
    Py_BEGIN_ALLOW_THREADS
    run_linear(&op);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
failed:
    release(&arrays);
    return NULL;
}

/* Memory of the calling thread that grows to what the largest expert step needed. */
static float *scratch(size_t floats) {
    static _Thread_local float *memory;
    static _Thread_local size_t size;
    if (floats > size) {
        free(memory);
        memory = malloc(floats * sizeof *memory);
        size = memory ? floats : 0;
    }
    return memory;
}

static PyObject *py_expert(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *hidden, *assignments, *slot, *outputs;
    if (!count_is(count, 6)) return NULL;
    long format = PyLong_AsLong(args[3]);
    Py_ssize_t inner = PyLong_AsSsize_t(args[4]);
    if (PyErr_Occurred()) return NULL;
    if (format < 0 || format >= FORMAT_COUNT) return PyErr_Format(PyExc_ValueError, "unknown weight format %ld", format);
    if (inner < 1) return PyErr_Format(PyExc_ValueError, "intermediate_size is %zd, expected at least 1", inner);
    if (!(hidden = take(&arrays, args[0], "hidden", KIND_FLOAT32, 2, 0)) ||
        !(assignments = take(&arrays, args[1], "assignments", KIND_INT64, 1, 0)) ||
        !(slot = take(&arrays, args[2], "slot", KIND_UINT8, 1, 0)) ||
        !(outputs = take(&arrays, args[5], "outputs", KIND_FLOAT32, 3, WRITABLE)))
        goto failed;
    size_t width = (size_t)hidden->shape[1], rows = (size_t)assignments->shape[0];
    size_t ranks = (size_t)outputs->shape[1], matrix = width * (size_t)inner * format_nbytes((enum weight_format)format);
    if (!expect(outputs->shape[0], hidden->shape[0], "the number of rows of outputs") ||
        !expect(outputs->shape[2], hidden->shape[1], "the width of outputs"))
        goto failed;
    if ((size_t)slot->shape[0] < 3 * matrix) {
        PyErr_Format(PyExc_ValueError, "slot has %zd bytes, expected at least %zu", slot->shape[0], 3 * matrix);
        goto failed;
    }
    const int64_t *assignment = assignments->buf;
    for (size_t i = 0; i < rows; i++)
        if (assignment[i] < 0 || assignment[i] >= hidden->shape[0] * (Py_ssize_t)ranks) {
            PyErr_Format(PyExc_ValueError, "assignments[%zu] is %lld, expected 0 <= it < %zd", i,
                         (long long)assignment[i], hidden->shape[0] * (Py_ssize_t)ranks);
            goto failed;
        }
    float *x = scratch(rows * (2 * width + 2 * (size_t)inner));
    if (!x && rows) {
        PyErr_NoMemory();
        goto failed;
    }
    Py_BEGIN_ALLOW_THREADS
    float *gate = x + rows * width, *up = gate + rows * (size_t)inner, *result = up + rows * (size_t)inner;
    for (size_t i = 0; i < rows; i++)
        memcpy(x + i * width, (const float *)hidden->buf + (size_t)assignment[i] / ranks * width, width * sizeof *x);
    struct linear op = {x, slot->buf, gate, rows, width, (size_t)inner, (enum weight_format)format};
    run_linear(&op);
    op.weight += matrix, op.out = up;
    run_linear(&op);
    kernels->silu_times(gate, up, 0, rows * (size_t)inner);
    op.weight += matrix, op.x = gate, op.out = result, op.inputs = (size_t)inner, op.outputs = width;
    run_linear(&op);
    for (size_t i = 0; i < rows; i++)
        memcpy((float *)outputs->buf + (size_t)assignment[i] * width, result + i * width, width * sizeof *x);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
failed:
    release(&arrays);
    return NULL;
}

static PyObject *py_combine(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *outputs, *weights, *out;
    if (!count_is(count, 3)) return NULL;
    if (!(outputs = take(&arrays, args[0], "outputs", KIND_FLOAT32, 3, 0)) ||
        !(weights = take(&arrays, args[1], "weights", KIND_FLOAT32, 2, 0)) ||
        !(out = take(&arrays, args[2], "out", KIND_FLOAT32, 2, WRITABLE)) ||
        !expect(weights->shape[0], outputs->shape[0], "the number of rows of weights") ||
        !expect(weights->shape[1], outputs->shape[1], "the width of weights") ||
        !expect(out->shape[0], outputs->shape[0], "the number of rows of out") ||
        !expect(out->shape[1], outputs->shape[2], "the width of out")) {
        release(&arrays);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    combine(outputs->buf, weights->buf, out->buf, (size_t)outputs->shape[0], (size_t)outputs->shape[1],
            (size_t)outputs->shape[2]);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}

static PyObject *py_rms_norm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *x, *weight, *out;
    if (!count_is(count, 4)) return NULL;
    double eps = PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (!(x = take(&arrays, args[0], "x", KIND_FLOAT32, 2, 0)) ||
        !(weight = take(&arrays, args[1], "weight", KIND_FLOAT32, 1, 0)) ||
        !(out = take(&arrays, args[3], "out", KIND_FLOAT32, 2, WRITABLE)) ||
        !expect(weight->shape[0], x->shape[1], "the length of weight") ||
        !expect(out->shape[0], x->shape[0], "the number of rows of out") ||
        !expect(out->shape[1], x->shape[1], "the width of out")) {
        release(&arrays);
        return NULL;
    }
    struct rms_norm op = {x->buf, weight->buf, out->buf, (size_t)x->shape[1], (float)eps};
    Py_BEGIN_ALLOW_THREADS
    kernels->rms_norm(&op, 0, (size_t)x->shape[0]);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}

static PyObject *py_rotary_angles(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *positions, *frequencies, *cosine, *sine;
    if (!count_is(count, 4)) return NULL;
    if (!(positions = take(&arrays, args[0], "positions", KIND_INT32, 1, 0)) ||
        !(frequencies = take(&arrays, args[1], "inverse_frequencies", KIND_FLOAT32, 1, 0)) ||
        !(cosine = take(&arrays, args[2], "cos", KIND_FLOAT32, 2, WRITABLE)) ||
        !(sine = take(&arrays, args[3], "sin", KIND_FLOAT32, 2, WRITABLE)) ||
        !expect(cosine->shape[0], positions->shape[0], "the number of rows of cos") ||
        !expect(sine->shape[0], positions->shape[0], "the number of rows of sin") ||
        !expect(cosine->shape[1], frequencies->shape[0], "the width of cos") ||
        !expect(sine->shape[1], frequencies->shape[0], "the width of sin")) {
        release(&arrays);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    const int32_t *position = positions->buf;
    const float *frequency = frequencies->buf;
    float *c = cosine->buf, *s = sine->buf;
    for (Py_ssize_t row = 0; row < positions->shape[0]; row++)
        for (Py_ssize_t i = 0; i < frequencies->shape[0]; i++) {
            float angle = (float)position[row] * frequency[i]; /* rounded to float32, as transformers does */
            *c++ = (float)cos((double)angle);
            *s++ = (float)sin((double)angle);
        }
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}

static PyObject *py_rotate(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *x, *cosine, *sine;
    if (!count_is(count, 3)) return NULL;
    if (!(x = take(&arrays, args[0], "x", KIND_FLOAT32, 3, WRITABLE)) ||
        !(cosine = take(&arrays, args[1], "cos", KIND_FLOAT32, 2, 0)) ||
        !(sine = take(&arrays, args[2], "sin", KIND_FLOAT32, 2, 0)) ||
        !expect(cosine->shape[0], x->shape[0], "the number of rows of cos") ||
        !expect(sine->shape[0], x->shape[0], "the number of rows of sin") ||
        !expect(2 * cosine->shape[1], x->shape[2], "twice the width of cos") ||
        !expect(2 * sine->shape[1], x->shape[2], "twice the width of sin")) {
        release(&arrays);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    rotate(x->buf, cosine->buf, sine->buf, (size_t)x->shape[0], (size_t)x->shape[1], (size_t)x->shape[2]);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}

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
        !expect(bytes->shape[2], 2, "the third dimension of kv_pages (keys, values)") ||
        !expect(bytes->shape[5], head_nbytes, "the last dimension of kv_pages (bytes of a head)") ||
        !expect(starts->shape[0], rows, "the length of table_starts") ||
        !expect(positions->shape[0], rows, "the length of positions"))
        return 0;
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

/* Writes all rows, or none: the first row that the format cannot hold, -1 if there is none. */
static Py_ssize_t write_rows(const struct kv_pages *pages, const float *keys, const float *values, size_t rows) {
    const struct kv_codec *codec = kv_fastest_codec();
    size_t heads = pages->num_kv_heads, dim = pages->head_dim, width = heads * dim;
    if (codec->any_refused(pages->format, keys, rows * width) || codec->any_refused(pages->format, values, rows * width))
        for (size_t row = 0; row < rows; row++)
            if (kv_find_refused(pages->format, keys + row * width, width) >= 0 ||
                kv_find_refused(pages->format, values + row * width, width) >= 0)
                return (Py_ssize_t)row;
    size_t token_nbytes = heads * kv_row_nbytes(pages->format, dim), half = pages->block_size * token_nbytes;
    kv_page_begin_rows();
    for (size_t row = 0; row < rows; row++) {
        size_t position = (size_t)pages->positions[row];
        size_t page = pages->tables[pages->table_starts[row] + (int64_t)(position / pages->block_size)];
        uint8_t *at = pages->bytes + page * pages->page_stride + pages->layer * 2 * half +
                      position % pages->block_size * token_nbytes;
        kv_encode(codec, pages->format, keys + row * width, heads, dim, at);
        kv_encode(codec, pages->format, values + row * width, heads, dim, at + half);
    }
    return -1;
}

static PyObject *py_write_kv(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    struct kv_pages pages;
    Py_buffer *keys, *values;
    if (!count_is(count, 8)) return NULL;
    if (!(keys = take(&arrays, args[0], "keys", KIND_FLOAT32, 3, 0)) ||
        !(values = take(&arrays, args[1], "values", KIND_FLOAT32, 3, 0)) ||
        !expect(values->shape[0], keys->shape[0], "the number of rows of values") ||
        !take_pages(&arrays, args + 2, keys->shape[0], keys->shape[2], &pages) ||
        !expect(keys->shape[1], (Py_ssize_t)pages.num_kv_heads, "the number of heads of keys") ||
        !expect(values->shape[1], (Py_ssize_t)pages.num_kv_heads, "the number of heads of values") ||
        !expect(values->shape[2], (Py_ssize_t)pages.head_dim, "the head size of values")) {
        release(&arrays);
        return NULL;
    }
    Py_ssize_t refused;
    Py_BEGIN_ALLOW_THREADS
    refused = write_rows(&pages, keys->buf, values->buf, (size_t)keys->shape[0]);
    Py_END_ALLOW_THREADS
    release(&arrays);
    return PyLong_FromSsize_t(refused);
}

static PyObject *py_attention(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    struct attention op;
    Py_buffer *queries, *out;
    if (!count_is(count, 9)) return NULL;
    Py_ssize_t window = PyLong_AsSsize_t(args[7]);
    if (PyErr_Occurred()) return NULL;
    if (window < 0) return PyErr_Format(PyExc_ValueError, "the window is %zd, expected at least 0 (none)", window);
    if (!(queries = take(&arrays, args[0], "queries", KIND_FLOAT32, 3, 0)) ||
        !take_pages(&arrays, args + 1, queries->shape[0], queries->shape[2], &op.pages) ||
        !(out = take(&arrays, args[8], "out", KIND_FLOAT32, 3, WRITABLE)) ||
        !expect(out->shape[0], queries->shape[0], "the number of rows of out") ||
        !expect(out->shape[1], queries->shape[1], "the number of heads of out") ||
        !expect(out->shape[2], queries->shape[2], "the head size of out") ||
        !expect(queries->shape[1] % (Py_ssize_t)op.pages.num_kv_heads, 0, "num_heads modulo num_kv_heads")) {
        release(&arrays);
        return NULL;
    }
    op.queries = queries->buf;
    op.out = out->buf;
    op.num_heads = (size_t)queries->shape[1];
    op.window = (size_t)window;
    op.scale = 1.0f / sqrtf((float)op.pages.head_dim);
    Py_BEGIN_ALLOW_THREADS
    double work = 0;
    for (size_t row = 0; row < (size_t)queries->shape[0]; row++)
        work += 2.0 * (double)((size_t)op.pages.positions[row] + 1 - attention_start(&op, row)) *
                (double)(op.num_heads * op.pages.head_dim);
    /* Whole groups, so that two threads do not convert the same rows. */
    size_t grain = op.num_heads / op.pages.num_kv_heads;
    parallel_for((size_t)queries->shape[0] * op.num_heads, grain, work, attention_part, &op);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}

/* --- Settings --- */

static PyObject *py_set_num_threads(PyObject *self, PyObject *argument) {
    (void)self;
    long threads = PyLong_AsLong(argument);
    if (PyErr_Occurred()) return NULL;
    if (threads < 1 || threads > MAX_THREADS)
        return PyErr_Format(PyExc_ValueError, "the number of threads is %ld, expected 1 to %d", threads, MAX_THREADS);
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = pool_resize((int)threads);
    Py_END_ALLOW_THREADS
    if (error) return PyErr_Format(PyExc_OSError, "could not start %ld threads: %s", threads, strerror(error));
    Py_RETURN_NONE;
}

static PyObject *py_instruction_sets(PyObject *self, PyObject *ignored) {
    (void)self, (void)ignored;
    PyObject *names = PyList_New(0);
    for (size_t isa = 0; names && isa < KERNELS_COUNT; isa++) {
        PyObject *name = kernels_supported(isa) ? PyUnicode_FromString(every_kernels[isa].name) : NULL;
        if (name && PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_use_instruction_set(PyObject *self, PyObject *argument) {
    (void)self;
    for (size_t isa = 0; isa < KERNELS_COUNT; isa++)
        if (kernels_supported(isa)) {
            PyObject *name = PyUnicode_FromString(every_kernels[isa].name);
            int same = name ? PyObject_RichCompareBool(name, argument, Py_EQ) : -1;
            Py_XDECREF(name);
            if (same < 0) return NULL;
            if (same) {
                kernels = &every_kernels[isa];
                Py_RETURN_NONE;
            }
        }
    return PyErr_Format(PyExc_ValueError, "this processor has no instruction set %R", argument);
}

#define FASTCALL(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    {"linear", FASTCALL(py_linear), "linear(x, weight, out)"},
    {"expert", FASTCALL(py_expert), "expert(hidden, assignments, slot, format, intermediate_size, outputs)"},
    {"combine", FASTCALL(py_combine), "combine(outputs, weights, out)"},
    {"rms_norm", FASTCALL(py_rms_norm), "rms_norm(x, weight, eps, out)"},
    {"rotary_angles", FASTCALL(py_rotary_angles), "rotary_angles(positions, inverse_frequencies, cos, sin)"},
    {"rotate", FASTCALL(py_rotate), "rotate(x, cos, sin)"},
    {"write_kv", FASTCALL(py_write_kv),
     "write_kv(keys, values, kv_pages, format, layer, block_tables, table_starts, positions)"},
    {"attention", FASTCALL(py_attention),
     "attention(queries, kv_pages, format, layer, block_tables, table_starts, positions, window, out)"},
    {"set_num_threads", py_set_num_threads, METH_O, "set_num_threads(threads)"},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "instruction_sets()"},
    {"use_instruction_set", py_use_instruction_set, METH_O, "use_instruction_set(name)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "The forward pass's inner loops; see _kernels.pyi.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    for (size_t isa = 0; isa < KERNELS_COUNT; isa++)
        if (kernels_supported(isa)) kernels = &every_kernels[isa]; /* the last is the widest */
    pthread_atfork(NULL, NULL, pool_forget);
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    if (PyModule_AddIntConstant(module, "FLOAT32", FORMAT_FLOAT32) < 0 ||
        PyModule_AddIntConstant(module, "FLOAT16", FORMAT_FLOAT16) < 0 ||
        PyModule_AddIntConstant(module, "BFLOAT16", FORMAT_BFLOAT16) < 0 ||
        PyModule_AddIntConstant(module, "KV_FLOAT32", KV_FLOAT32) < 0 ||
        PyModule_AddIntConstant(module, "KV_FLOAT16", KV_FLOAT16) < 0 ||
        PyModule_AddIntConstant(module, "KV_BFLOAT16", KV_BFLOAT16) < 0 ||
        PyModule_AddIntConstant(module, "KV_Q8_0", KV_Q8_0) < 0 ||
        PyModule_AddIntConstant(module, "KV_Q4_0", KV_Q4_0) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
