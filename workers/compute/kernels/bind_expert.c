/* One expert: gate and up, what lies between, and down, on the weights of its slot. */
#include "bindings.h"
#include "kernels.h"
#include "threads.h"

struct expert { /* of `rows` rows; the products write into scratch memory */
    struct linear gate, up, down;
    struct gated gated;
};

/* Parts are of the middle: with their gates and ups, the middle's values are computed by one thread. */
static void middle_part(void *context, size_t begin, size_t end) {
    const struct expert *expert = context;
    kernels->linear(&expert->gate, begin, end);
    kernels->linear(&expert->up, begin, end);
    kernels->gated(&expert->gated, begin, end);
}

static void down_part(void *context, size_t begin, size_t end) {
    const struct expert *expert = context;
    kernels->linear(&expert->down, begin, end);
}

static void run(struct expert *expert) {
    double work = (double)expert->down.rows * (double)expert->down.inputs * (double)expert->down.outputs;
    parallel_for(expert->gate.outputs, LINEAR_GRAIN, 2 * work, middle_part, expert);
    parallel_for(expert->down.outputs, LINEAR_GRAIN, work, down_part, expert);
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

PyObject *py_expert(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *hidden, *assignments, *slot, *outputs;
    if (!count_is(count, 6)) return NULL;
    long number = PyLong_AsLong(args[3]);
    Py_ssize_t intermediate_size = PyLong_AsSsize_t(args[4]);
    if (PyErr_Occurred() || !is_format(number)) return NULL;
    enum weight_format format = (enum weight_format)number;
    if (intermediate_size < 1)
        return PyErr_Format(PyExc_ValueError, "intermediate_size is %zd, expected at least 1", intermediate_size);
    if (!(hidden = take(&arrays, args[0], "hidden", KIND_FLOAT32, 2, 0)) ||
        !(assignments = take(&arrays, args[1], "assignments", KIND_INT64, 1, 0)) ||
        !(slot = take(&arrays, args[2], "slot", KIND_UINT8, 1, 0)) ||
        !(outputs = take(&arrays, args[5], "outputs", KIND_FLOAT32, 3, WRITABLE)) ||
        !expect(outputs->shape[0], hidden->shape[0], "the number of rows of outputs") ||
        !expect(outputs->shape[2], hidden->shape[1], "the width of outputs") ||
        !fills_blocks(format, hidden->shape[1], "the width of hidden") ||
        !fills_blocks(format, intermediate_size, "intermediate_size"))
        goto failed;
    size_t width = (size_t)hidden->shape[1], inner = (size_t)intermediate_size, rows = (size_t)assignments->shape[0];
    size_t ranks = (size_t)outputs->shape[1], stride = format_row_nbytes(format, width), matrix = inner * stride;
    const int64_t *assignment = assignments->buf;
    if (!are_assignments(assignment, rows, hidden->shape[0] * (Py_ssize_t)ranks)) goto failed;
    if ((size_t)slot->shape[0] < 3 * matrix) {
        PyErr_Format(PyExc_ValueError, "slot has %zd bytes, expected at least %zu", slot->shape[0], 3 * matrix);
        goto failed;
    }
    float *x = scratch(rows * (2 * width + 2 * inner));
    if (!x && rows) {
        PyErr_NoMemory();
        goto failed;
    }
    Py_BEGIN_ALLOW_THREADS
    float *gate = x + rows * width, *up = gate + rows * inner, *result = up + rows * inner;
    const uint8_t *bytes = slot->buf;
    struct expert expert = {
        .gate = {x, {format, bytes, stride}, gate, rows, width, inner},
        .up = {x, {format, bytes + matrix, stride}, up, rows, width, inner},
        .gated = {gate, up, rows, inner},
        .down = {gate, {format, bytes + 2 * matrix, format_row_nbytes(format, inner)}, result, rows, inner, width},
    };
    for (size_t i = 0; i < rows; i++)
        memcpy(x + i * width, (const float *)hidden->buf + (size_t)assignment[i] / ranks * width, width * sizeof *x);
    run(&expert);
    for (size_t i = 0; i < rows; i++)
        memcpy((float *)outputs->buf + (size_t)assignment[i] * width, result + i * width, width * sizeof *x);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
failed:
    release(&arrays);
    return NULL;
}
