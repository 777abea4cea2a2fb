/* What is done row by row besides products and attention: norms, rotary embedding, the sum over ranks. */
#include "bindings.h"
#include "kernels.h"

#include <math.h>

/* Half-split rotary embedding in place (transformers' rotate_half): x[rows][heads][dim], cos and sin [rows][dim / 2]. */
static void rotate(float *x, const float *cosine, const float *sine, size_t rows, size_t heads, size_t dim) {
    size_t half = dim / 2;
    for (size_t i = 0; i < rows * heads; i++, x += dim) {
        const float *c = cosine + i / heads * half, *s = sine + i / heads * half;
        for (size_t d = 0; d < half; d++) {
            float first = x[d], second = x[d + half];
            x[d] = first * c[d] - second * s[d];
            x[d + half] = second * c[d] + first * s[d];
        }
    }
}

/* out[row] = sum over rank of weights[row][rank] * outputs[row][rank], rank 0 first. */
static void combine(const float *outputs, const float *weights, float *out, size_t rows, size_t ranks,
                           size_t width) {
    for (size_t row = 0; row < rows; row++, out += width) {
        memset(out, 0, width * sizeof *out);
        for (size_t rank = 0; rank < ranks; rank++, outputs += width) {
            float weight = weights[row * ranks + rank];
            for (size_t d = 0; d < width; d++) out[d] += weight * outputs[d];
        }
    }
}

PyObject *py_combine(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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

/* Eight sums side by side, so that one does not wait for the other. */
static float norm(const float *x, size_t width) {
    float sums[8] = {0}, total = 0;
    size_t whole = width / 8 * 8;
    for (size_t d = 0; d < whole; d += 8)
        for (size_t i = 0; i < 8; i++) sums[i] += x[d + i] * x[d + i];
    for (size_t d = whole; d < width; d++) total += x[d] * x[d];
    for (size_t i = 0; i < 8; i++) total += sums[i];
    return sqrtf(total);
}

PyObject *py_row_norms(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    struct arrays arrays = {.count = 0};
    Py_buffer *x, *out;
    if (!count_is(count, 2)) return NULL;
    if (!(x = take(&arrays, args[0], "x", KIND_FLOAT32, 2, 0)) ||
        !(out = take(&arrays, args[1], "out", KIND_FLOAT32, 1, WRITABLE)) ||
        !expect(out->shape[0], x->shape[0], "the number of values of out")) {
        release(&arrays);
        return NULL;
    }
    const float *rows = x->buf;
    float *norms = out->buf;
    size_t width = (size_t)x->shape[1];
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = 0; row < x->shape[0]; row++) norms[row] = norm(rows + (size_t)row * width, width);
    Py_END_ALLOW_THREADS
    release(&arrays);
    Py_RETURN_NONE;
}

PyObject *py_rms_norm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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

PyObject *py_rotary_angles(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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

PyObject *py_rotate(PyObject *self, PyObject *const *args, Py_ssize_t count) {
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
