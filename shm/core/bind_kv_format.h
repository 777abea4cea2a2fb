/* encode_kv_rows for Python: kv_format.h, with its arguments checked. */
#ifndef HOTSET_BIND_KV_FORMAT_H
#define HOTSET_BIND_KV_FORMAT_H

#include "bind_arrays.h"
#include "kv_format.h"

static const struct array_kind UINT8 = {"uint8", "B", 1};

static PyObject *core_encode_kv_rows(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    uint64_t format;
    Py_buffer values, out;
    if (count != 3 && count != 4) return PyErr_Format(PyExc_TypeError, "expected 3 or 4 arguments, got %zd", count);
    int portable = count == 4 ? PyObject_IsTrue(args[3]) : 0;
    if (portable < 0) return NULL;
    if (!parse_indices(args, 1, 1, (const char *[]){"format"}, (uint64_t[]){KV_FORMAT_COUNT}, &format)) return NULL;
    if (!take_array(args[1], "values", &FLOAT32, 0, 2, (Py_ssize_t[]){ANY_LENGTH, ANY_LENGTH}, &values)) return NULL;
    size_t rows = (size_t)values.shape[0], width = (size_t)values.shape[1];
    Py_ssize_t shape[] = {values.shape[0], (Py_ssize_t)kv_row_nbytes((enum kv_format)format, width)};
    PyObject *result = NULL;
    if (take_array(args[2], "out", &UINT8, 1, 2, shape, &out)) {
        const struct kv_codec *codec = portable ? &KV_CODEC_PLAIN : kv_fastest_codec();
        result = PyLong_FromSsize_t(kv_encode(codec, (enum kv_format)format, values.buf, rows, width, out.buf));
        PyBuffer_Release(&out);
    }
    PyBuffer_Release(&values);
    return result;
}

#define KV_FORMAT_FUNCTIONS                                                                                        \
    {"encode_kv_rows", FASTCALL(core_encode_kv_rows),                                                              \
     "encode_kv_rows(format, values, out, portable=False): float32 [rows, width] to uint8 [rows, nbytes]. Returns " \
     "-1, or the index of the first value that the format cannot hold, and then nothing is written."}

#endif
