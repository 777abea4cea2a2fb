/* Experts: gate and up, what lies between, and down, on the weights of their slots. */
#include "bindings.h"
#include "kernels.h"
#include "threads.h"

#include <float.h>

/* Experts of so few rows are computed together, so that threads meet twice for all of them and not twice for each: one
 * row's product with a matrix takes less than it takes to wake a thread. */
#define ROWS_TOGETHER 32

struct expert { /* of `rows` rows; the products write into scratch memory */
    struct linear gate, up, down;
    struct gated gated;
    const float *down_bias; /* [width]; NULL: none */
};

struct group {
    struct expert experts[ROWS_TOGETHER];
    size_t count, rows;
    size_t stride; /* part i of the loop is output i % stride of expert i / stride; those beyond the last do not exist */
};

typedef void expert_part(const struct expert *expert, size_t begin, size_t end);

static void each_expert(const struct group *group, size_t outputs, size_t begin, size_t end, expert_part *part) {
    while (begin < end) {
        size_t index = begin / group->stride, first = index * group->stride;
        size_t last = end - first < outputs ? end - first : outputs;
        if (begin - first < last) part(&group->experts[index], begin - first, last);
        begin = first + group->stride;
    }
}

/* Parts are of the middle: with their gates and ups, the middle's values are computed by one thread. */
static void middle_of_expert(const struct expert *expert, size_t begin, size_t end) {
    kernels->linear(&expert->gate, begin, end);
    kernels->linear(&expert->up, begin, end);
    kernels->gated(&expert->gated, begin, end);
}

static void down_of_expert(const struct expert *expert, size_t begin, size_t end) {
    kernels->linear(&expert->down, begin, end);
}

static void middle_part(void *context, size_t begin, size_t end) {
    const struct group *group = context;
    each_expert(group, group->experts->gate.outputs, begin, end, middle_of_expert);
}

static void down_part(void *context, size_t begin, size_t end) {
    const struct group *group = context;
    each_expert(group, group->experts->down.outputs, begin, end, down_of_expert);
}

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static void run(struct group *group) {
    const struct linear *down = &group->experts->down;
    double work = (double)group->rows * (double)down->inputs * (double)down->outputs;
    group->stride = round_up(down->inputs, LINEAR_GRAIN);
    parallel_for(group->count * group->stride, LINEAR_GRAIN, 2 * work, middle_part, group);
    group->stride = round_up(down->outputs, LINEAR_GRAIN);
    parallel_for(group->count * group->stride, LINEAR_GRAIN, work, down_part, group);
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

static int are_assignments(const int64_t *assignments, size_t count, Py_ssize_t limit) {
    for (size_t i = 0; i < count; i++)
        if (assignments[i] < 0 || assignments[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "assignments[%zu] is %lld, expected 0 <= it < %zd", i,
                         (long long)assignments[i], limit);
            return 0;
        }
    return 1;
}

/* A value for each output of a matrix, `stride` bytes from one to the next. */
struct biases {
    const uint8_t *first; /* NULL: there are none */
    size_t stride;
    enum weight_format format; /* of single values */
};

/* Where the parts of an expert lie in its slot, and how many bytes they are in all. */
struct parts {
    struct matrix gate, up, down;
    struct biases gate_bias, up_bias, down_bias;
    size_t nbytes;
};

static struct parts interleaved_parts(enum weight_format format, const uint8_t *slot, size_t width, size_t inner) {
    /* Biases are in the weights' format, or in bfloat16 beside quantised ones. */
    enum weight_format bias_format = format_values_per_block(format) == 1 ? format : FORMAT_BFLOAT16;
    size_t matrix = matrix_nbytes(format, inner, width), bias = matrix_nbytes(bias_format, 1, 1);
    struct matrix gate_up = matrix_at(format, slot, 2 * inner, width);
    const uint8_t *gate_up_bias = slot + 2 * matrix, *down = gate_up_bias + 2 * inner * bias;
    return (struct parts){
        .gate = matrix_every_other_row(gate_up),
        .up = matrix_every_other_row(matrix_from_row(gate_up, 1)),
        .down = matrix_at(format, down, width, inner),
        .gate_bias = {gate_up_bias, 2 * bias, bias_format},
        .up_bias = {gate_up_bias + bias, 2 * bias, bias_format},
        .down_bias = {down + matrix, bias, bias_format},
        .nbytes = 3 * matrix + (2 * inner + width) * bias,
    };
}

static struct parts parts_of(enum expert_layout layout, enum weight_format format, const uint8_t *slot, size_t width,
                             size_t inner) {
    if (layout == EXPERT_INTERLEAVED_WITH_BIASES) return interleaved_parts(format, slot, width, inner);
    size_t matrix = matrix_nbytes(format, inner, width);
    size_t bias = layout == EXPERT_GATE_UP_DOWN_WITH_BIASES ? matrix_nbytes(FORMAT_FLOAT32, 1, 1) : 0;
    const uint8_t *up = slot + matrix + inner * bias, *down = up + matrix + inner * bias;
    struct parts parts = {
        .gate = matrix_at(format, slot, inner, width),
        .up = matrix_at(format, up, inner, width),
        .down = matrix_at(format, down, width, inner),
        .nbytes = 3 * matrix + (2 * inner + width) * bias,
    };
    if (bias) {
        parts.gate_bias = (struct biases){slot + matrix, bias, FORMAT_FLOAT32};
        parts.up_bias = (struct biases){up + matrix, bias, FORMAT_FLOAT32};
        parts.down_bias = (struct biases){down + matrix, bias, FORMAT_FLOAT32};
    }
    return parts;
}

/* The first `count` of them in `out`; NULL if there are none. */
static const float *read_biases(struct biases biases, size_t count, float *out) {
    if (!biases.first) return NULL;
    for (size_t i = 0; i < count; i++) out[i] = single_value(biases.format, biases.first + i * biases.stride, 0);
    return out;
}

/* What one call computes with, besides the experts. */
struct job {
    const float *hidden; /* [rows][width] */
    float *outputs;      /* [rows][ranks][width] */
    size_t width, inner, ranks;
    float swiglu_limit;
};

struct selection { /* an expert and its rows */
    struct arrays held;
    struct parts parts;
    const int64_t *assignments; /* [rows]: row * ranks + rank */
    size_t rows;
};

/* Floats of scratch memory that an expert's step needs; a row more is for the biases. */
static size_t scratch_floats(const struct job *job, size_t rows) { return (rows + 1) * (2 * job->width + 2 * job->inner); }

/* The expert's step with its rows of hidden gathered in `memory`. */
static struct expert prepare(const struct job *job, const struct selection *selection, float *memory) {
    const struct parts *parts = &selection->parts;
    size_t width = job->width, inner = job->inner, rows = selection->rows;
    float *x = memory, *gate = x + rows * width, *up = gate + rows * inner, *result = up + rows * inner;
    float *gate_bias = result + rows * width, *up_bias = gate_bias + inner, *down_bias = up_bias + inner;
    for (size_t i = 0; i < rows; i++)
        memcpy(x + i * width, job->hidden + (size_t)selection->assignments[i] / job->ranks * width, width * sizeof *x);
    return (struct expert){
        .gate = {x, parts->gate, gate, rows, width, inner},
        .up = {x, parts->up, up, rows, width, inner},
        .gated = {gate, up, rows, inner, read_biases(parts->gate_bias, inner, gate_bias),
                  read_biases(parts->up_bias, inner, up_bias), job->swiglu_limit},
        .down = {gate, parts->down, result, rows, inner, width},
        .down_bias = read_biases(parts->down_bias, width, down_bias),
    };
}

/* The expert's results, to the places of outputs that the assignments name. */
static void scatter(const struct job *job, const struct selection *selection, const struct expert *expert) {
    for (size_t i = 0; i < selection->rows; i++) {
        float *out = job->outputs + (size_t)selection->assignments[i] * job->width;
        memcpy(out, expert->down.out + i * job->width, job->width * sizeof *out);
        for (size_t d = 0; expert->down_bias && d < job->width; d++) out[d] += expert->down_bias[d];
    }
}

/* How many selections, from the first on, are computed together: those with ROWS_TOGETHER rows in all, or one. */
static size_t count_together(const struct selection *selections, size_t count, size_t *floats, const struct job *job) {
    size_t together = 0, rows = 0;
    *floats = 0;
    while (together < count && together < ROWS_TOGETHER &&
           (!together || rows + selections[together].rows <= ROWS_TOGETHER)) {
        rows += selections[together].rows;
        *floats += scratch_floats(job, selections[together++].rows);
    }
    return together;
}

/* 0 if there is no memory. */
static int compute(const struct job *job, const struct selection *selections, size_t count) {
    struct group group;
    for (size_t floats; count; selections += group.count, count -= group.count) {
        group.count = count_together(selections, count, &floats, job);
        float *memory = scratch(floats);
        if (!memory) return 0;
        group.rows = 0;
        for (size_t i = 0; i < group.count; i++) {
            group.experts[i] = prepare(job, &selections[i], memory);
            memory += scratch_floats(job, selections[i].rows);
            group.rows += selections[i].rows;
        }
        run(&group);
        for (size_t i = 0; i < group.count; i++) scatter(job, &selections[i], &group.experts[i]);
    }
    return 1;
}

/* Item i of the lists assignments, slots and formats; 0 with an exception if they are not right. */
static int take_selection(struct selection *selection, PyObject *const *lists, Py_ssize_t i, const struct job *job,
                          enum expert_layout layout, Py_ssize_t places) {
    PyObject *items[3];
    for (int list = 0; list < 3; list++)
        if (!(items[list] = PyList_GetItem(lists[list], i))) return 0; /* borrowed */
    long format = PyLong_AsLong(items[2]);
    if (PyErr_Occurred() || !is_format(format)) return 0;
    Py_buffer *assignments, *slot;
    if (!(assignments = take(&selection->held, items[0], "assignments", KIND_INT64, 1, 0)) ||
        !(slot = take(&selection->held, items[1], "slot", KIND_UINT8, 1, 0)) ||
        !fills_blocks((enum weight_format)format, (Py_ssize_t)job->width, "the width of hidden") ||
        !fills_blocks((enum weight_format)format, (Py_ssize_t)job->inner, "intermediate_size"))
        return 0;
    selection->assignments = assignments->buf;
    selection->rows = (size_t)assignments->shape[0];
    selection->parts = parts_of(layout, (enum weight_format)format, slot->buf, job->width, job->inner);
    if ((size_t)slot->shape[0] < selection->parts.nbytes) {
        PyErr_Format(PyExc_ValueError, "slot has %zd bytes, expected at least %zu", slot->shape[0],
                     selection->parts.nbytes);
        return 0;
    }
    return are_assignments(selection->assignments, selection->rows, places);
}

/* Computes what the lists name; 0 with an exception if they are not right, and then nothing has been computed. */
static int compute_lists(const struct job *job, PyObject *const *lists, Py_ssize_t count, enum expert_layout layout,
                         Py_ssize_t places) {
    struct selection *selections = calloc((size_t)count + 1, sizeof *selections);
    if (!selections) return PyErr_NoMemory(), 0;
    int done = 1;
    for (Py_ssize_t i = 0; done && i < count; i++)
        done = take_selection(&selections[i], lists, i, job, layout, places);
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        done = compute(job, selections, (size_t)count);
        Py_END_ALLOW_THREADS
        if (!done) PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) release(&selections[i].held);
    free(selections);
    return done;
}

PyObject *py_experts(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *hidden, *outputs;
    if (!count_is_between(count, 6, 8)) return NULL;
    for (int list = 1; list <= 3; list++)
        if (!PyList_Check(args[list]) || PyList_Size(args[list]) != PyList_Size(args[1]))
            return PyErr_Format(PyExc_TypeError, "expected lists of equal length: assignments, slots, formats");
    Py_ssize_t intermediate_size = PyLong_AsSsize_t(args[4]);
    long layout = count > 6 ? PyLong_AsLong(args[6]) : EXPERT_GATE_UP_DOWN;
    double swiglu_limit = count > 7 ? PyFloat_AsDouble(args[7]) : 0;
    if (PyErr_Occurred()) return NULL;
    if (intermediate_size < 1)
        return PyErr_Format(PyExc_ValueError, "intermediate_size is %zd, expected at least 1", intermediate_size);
    if (layout < 0 || layout >= EXPERT_LAYOUTS)
        return PyErr_Format(PyExc_ValueError, "unknown expert layout %ld", layout);
    if (!(swiglu_limit >= 0 && swiglu_limit <= FLT_MAX)) {
        PyErr_Format(PyExc_ValueError, "swiglu_limit is %R, expected a number of at least 0", args[7]);
        return NULL;
    }
    PyObject *result = NULL;
    if ((hidden = take(&arrays, args[0], "hidden", KIND_FLOAT32, 2, 0)) &&
        (outputs = take(&arrays, args[5], "outputs", KIND_FLOAT32, 3, WRITABLE)) &&
        expect(outputs->shape[0], hidden->shape[0], "the number of rows of outputs") &&
        expect(outputs->shape[2], hidden->shape[1], "the width of outputs")) {
        struct job job = {hidden->buf, outputs->buf, (size_t)hidden->shape[1], (size_t)intermediate_size,
                          (size_t)outputs->shape[1], (float)swiglu_limit};
        if (compute_lists(&job, args + 1, PyList_Size(args[1]), (enum expert_layout)layout,
                          outputs->shape[0] * outputs->shape[1]))
            result = Py_NewRef(Py_None);
    }
    release(&arrays);
    return result;
}
