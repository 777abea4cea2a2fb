/* Products with stored weights. */
#include "bindings.h"
#include "kernels.h"
#include "threads.h"

/* The format of a weight array: its element type says it, or for bytes the caller; -1 with an exception otherwise. */
static int format_of(const struct array *weight, PyObject *given) {
    static const enum weight_format of_kind[] = {
        [KIND_FLOAT32] = FORMAT_FLOAT32, [KIND_FLOAT16] = FORMAT_FLOAT16, [KIND_UINT16] = FORMAT_BFLOAT16};
    long format = given ? PyLong_AsLong(given) : -1;
    if (PyErr_Occurred()) return -1;
    if (given && !is_format(format)) return -1;
    int bytes = weight->kind == KIND_UINT8;
    if (weight->kind > KIND_UINT8 || (bytes && !given)) {
        PyErr_Format(PyExc_TypeError,
                     "weight has element format '%s', expected float32, float16, uint16 (bfloat16), or uint8 with the "
                     "number of a quantised format",
                     weight->view.format);
        return -1;
    }
    if (given && (bytes ? format_values_per_block((enum weight_format)format) == 1
                        : format != (long)of_kind[weight->kind])) {
        PyErr_Format(PyExc_TypeError, "weight has element format '%s', which is not how %s is stored",
                     weight->view.format, FORMAT_NAMES[format]);
        return -1;
    }
    return bytes ? (int)format : (int)of_kind[weight->kind];
}

/* Whether rows of `weight` are `width` values in the format; `what` names their width. */
static int is_row_of(const Py_buffer *weight, enum weight_format format, Py_ssize_t width, const char *what) {
    if (format_values_per_block(format) == 1) return expect(weight->shape[1], width, what);
    Py_ssize_t nbytes = (Py_ssize_t)matrix_nbytes(format, 1, (size_t)width);
    return expect(weight->shape[1], nbytes, "the number of bytes in a row of weight");
}

/* The arguments x, weight, out[, format] of a product; the weight's format, or -1 with an exception. */
static int take_product(struct arrays *arrays, PyObject *const *args, Py_ssize_t count, Py_buffer **x,
                        Py_buffer **weight, Py_buffer **out) {
    if (!count_is_between(count, 3, 4) || !(*x = take(arrays, args[0], "x", KIND_FLOAT32, 2, 0)) ||
        !(*weight = take(arrays, args[1], "weight", ANY_KIND, 2, 0)) ||
        !(*out = take(arrays, args[2], "out", KIND_FLOAT32, 2, WRITABLE)))
        return -1;
    return format_of(&arrays->held[1], count > 3 ? args[3] : NULL);
}

static void linear_part(void *op, size_t begin, size_t end) { kernels->linear(op, begin, end); }

static void linear_transposed_part(void *op, size_t begin, size_t end) { kernels->linear_transposed(op, begin, end); }

PyObject *py_linear_transposed(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *x, *weight, *out;
    int format = take_product(&arrays, args, count, &x, &weight, &out);
    if (format < 0 || !fills_blocks((enum weight_format)format, out->shape[1], "the width of out") ||
        !is_row_of(weight, (enum weight_format)format, out->shape[1], "the width of weight") ||
        !expect(weight->shape[0], x->shape[1], "the number of rows of weight") ||
        !expect(out->shape[0], x->shape[0], "the number of rows of out"))
        goto failed;
    struct linear_transposed op = {
        .x = x->buf,
        .weight = matrix_at((enum weight_format)format, weight->buf, (size_t)weight->shape[0], (size_t)out->shape[1]),
        .out = out->buf,
        .rows = (size_t)x->shape[0],
        .inputs = (size_t)x->shape[1],
        .outputs = (size_t)out->shape[1],
    };
    size_t blocks = (op.outputs + BLOCK_VALUES - 1) / BLOCK_VALUES;
    Py_BEGIN_ALLOW_THREADS
    parallel_for(blocks, 1, (double)op.rows * (double)op.inputs * (double)op.outputs, linear_transposed_part, &op);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
failed:
    release(&arrays);
    return NULL;
}

PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *x, *weight, *out;
    int format = take_product(&arrays, args, count, &x, &weight, &out);
    if (format < 0 || !fills_blocks((enum weight_format)format, x->shape[1], "the width of x")) goto failed;
    size_t inputs = (size_t)x->shape[1];
    if (!is_row_of(weight, (enum weight_format)format, x->shape[1], "the width of weight") ||
        !expect(out->shape[0], x->shape[0], "the number of rows of out") ||
        !expect(out->shape[1], weight->shape[0], "the width of out"))
        goto failed;
    struct linear op = {
        .x = x->buf,
        .weight = matrix_at((enum weight_format)format, weight->buf, (size_t)weight->shape[0], inputs),
        .out = out->buf,
        .rows = (size_t)x->shape[0],
        .inputs = inputs,
        .outputs = (size_t)weight->shape[0],
    };
    Py_BEGIN_ALLOW_THREADS
    parallel_for(op.outputs, LINEAR_GRAIN, (double)op.rows * (double)op.inputs * (double)op.outputs, linear_part, &op);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
failed:
    release(&arrays);
    return NULL;
}
