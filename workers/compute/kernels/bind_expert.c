/* One expert: gate and up, what lies between, and down, on the weights of its slot. */
#include "bindings.h"
#include "kernels.h"
#include "threads.h"

#include <float.h>

struct expert { /* of `rows` rows; the products write into scratch memory */
    struct linear gate, up, down;
    struct gated gated;
    const float *down_bias; /* [width]; NULL: none */
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

/* Biases are single values: those of the weights' format, or bfloat16 beside quantised ones, as in gpt-oss. */
static enum weight_format bias_format(enum weight_format format) {
    return format_values_per_block(format) == 1 ? format : FORMAT_BFLOAT16;
}

/* Where the parts of an expert lie in its slot, and how many bytes they are in all. */
struct parts {
    struct matrix gate, up, down;
    const uint8_t *gate_up_bias, *down_bias; /* NULL: none; gate and up alternate */
    size_t nbytes;
};

static struct parts parts_of(enum expert_layout layout, enum weight_format format, const uint8_t *slot, size_t width,
                             size_t inner) {
    size_t matrix = matrix_nbytes(format, inner, width);
    if (layout == EXPERT_GATE_UP_DOWN)
        return (struct parts){
            .gate = matrix_at(format, slot, inner, width),
            .up = matrix_at(format, slot + matrix, inner, width),
            .down = matrix_at(format, slot + 2 * matrix, width, inner),
            .nbytes = 3 * matrix,
        };
    size_t bias = matrix_nbytes(bias_format(format), 1, 1);
    struct matrix gate_up = matrix_at(format, slot, 2 * inner, width);
    const uint8_t *gate_up_bias = slot + 2 * matrix, *down = gate_up_bias + 2 * inner * bias;
    return (struct parts){
        .gate = matrix_every_other_row(gate_up),
        .up = matrix_every_other_row(matrix_from_row(gate_up, 1)),
        .down = matrix_at(format, down, width, inner),
        .gate_up_bias = gate_up_bias,
        .down_bias = down + matrix,
        .nbytes = 3 * matrix + (2 * inner + width) * bias,
    };
}

/* Every `step`th of the biases from `first` on; NULL if there are none. */
static const float *read_biases(const uint8_t *biases, enum weight_format format, size_t first, size_t step,
                                size_t count, float *out) {
    if (!biases) return NULL;
    for (size_t i = 0; i < count; i++) out[i] = single_value(bias_format(format), biases, first + i * step);
    return out;
}

/* The rows of hidden that are assigned to the expert, to the places of outputs that the assignments name. */
static void compute(const struct parts *parts, float swiglu_limit, size_t width, size_t inner, size_t rows,
                    size_t ranks, const int64_t *assignments, const float *hidden, float *outputs, float *memory) {
    enum weight_format format = parts->gate.format;
    float *x = memory, *gate = x + rows * width, *up = gate + rows * inner, *result = up + rows * inner;
    float *gate_bias = result + rows * width, *up_bias = gate_bias + inner, *down_bias = up_bias + inner;
    struct expert expert = {
        .gate = {x, parts->gate, gate, rows, width, inner},
        .up = {x, parts->up, up, rows, width, inner},
        .gated = {gate, up, rows, inner, read_biases(parts->gate_up_bias, format, 0, 2, inner, gate_bias),
                  read_biases(parts->gate_up_bias, format, 1, 2, inner, up_bias), swiglu_limit},
        .down = {gate, parts->down, result, rows, inner, width},
        .down_bias = read_biases(parts->down_bias, format, 0, 1, width, down_bias),
    };
    for (size_t i = 0; i < rows; i++)
        memcpy(x + i * width, hidden + (size_t)assignments[i] / ranks * width, width * sizeof *x);
    run(&expert);
    for (size_t i = 0; i < rows; i++) {
        float *out = outputs + (size_t)assignments[i] * width;
        memcpy(out, result + i * width, width * sizeof *out);
        for (size_t d = 0; expert.down_bias && d < width; d++) out[d] += expert.down_bias[d];
    }
}

PyObject *py_expert(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *hidden, *assignments, *slot, *outputs;
    if (!count_is_between(count, 6, 8)) return NULL;
    long number = PyLong_AsLong(args[3]), layout = count > 6 ? PyLong_AsLong(args[6]) : EXPERT_GATE_UP_DOWN;
    Py_ssize_t intermediate_size = PyLong_AsSsize_t(args[4]);
    double swiglu_limit = count > 7 ? PyFloat_AsDouble(args[7]) : 0;
    if (PyErr_Occurred() || !is_format(number)) return NULL;
    enum weight_format format = (enum weight_format)number;
    if (intermediate_size < 1)
        return PyErr_Format(PyExc_ValueError, "intermediate_size is %zd, expected at least 1", intermediate_size);
    if (layout != EXPERT_GATE_UP_DOWN && layout != EXPERT_INTERLEAVED_WITH_BIASES)
        return PyErr_Format(PyExc_ValueError, "unknown expert layout %ld", layout);
    if (!(swiglu_limit >= 0 && swiglu_limit <= FLT_MAX)) {
        PyErr_Format(PyExc_ValueError, "swiglu_limit is %R, expected a number of at least 0", args[7]);
        return NULL;
    }
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
    size_t ranks = (size_t)outputs->shape[1];
    if (!are_assignments(assignments->buf, rows, hidden->shape[0] * (Py_ssize_t)ranks)) goto failed;
    struct parts parts = parts_of((enum expert_layout)layout, format, slot->buf, width, inner);
    if ((size_t)slot->shape[0] < parts.nbytes) {
        PyErr_Format(PyExc_ValueError, "slot has %zd bytes, expected at least %zu", slot->shape[0], parts.nbytes);
        goto failed;
    }
    float *memory = scratch((rows + 1) * (2 * width + 2 * inner)); /* a row more for the biases */
    if (!memory) {
        PyErr_NoMemory();
        goto failed;
    }
    Py_BEGIN_ALLOW_THREADS
    compute(&parts, (float)swiglu_limit, width, inner, rows, ranks, assignments->buf, hidden->buf, outputs->buf, memory);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
failed:
    release(&arrays);
    return NULL;
}
