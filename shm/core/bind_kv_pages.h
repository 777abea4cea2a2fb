/* KV pages for Python: kv_format.h and what a reader needs of kv_page.h, with arguments checked. */
#ifndef HOTSET_BIND_KV_PAGES_H
#define HOTSET_BIND_KV_PAGES_H

#include "bind_arrays.h"
#include "kv_format.h"
#include "kv_page.h"

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
        ptrdiff_t refused = -1;
        if (codec->any_refused((enum kv_format)format, values.buf, rows * width))
            refused = kv_find_refused((enum kv_format)format, values.buf, rows * width);
        else
            kv_encode(codec, (enum kv_format)format, values.buf, rows, width, out.buf);
        result = PyLong_FromSsize_t(refused);
        PyBuffer_Release(&out);
    }
    PyBuffer_Release(&values);
    return result;
}

/* A function and not a method: an Arena needs memory that it may write, who only reads pages has none. */
static PyObject *core_page_generation(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    uint64_t page;
    Py_buffer generations;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    if (!take_array(args[0], "generations", &UINT32, 0, 2, (Py_ssize_t[]){ANY_LENGTH, 1}, &generations)) return NULL;
    PyObject *result = NULL;
    if (parse_indices(args + 1, 1, 1, (const char *[]){"page"}, (uint64_t[]){(uint64_t)generations.shape[0]}, &page))
        result = PyLong_FromUnsignedLong(kv_page_generation((const atomic_u32 *)generations.buf + page));
    PyBuffer_Release(&generations);
    return result;
}

#define KV_PAGE_FUNCTIONS                                                                                          \
    {"encode_kv_rows", FASTCALL(core_encode_kv_rows),                                                              \
     "encode_kv_rows(format, values, out, portable=False): float32 [rows, width] to uint8 [rows, nbytes]. Returns " \
     "-1, or the index of the first value that the format cannot hold, and then nothing is written."},             \
    {"page_generation", FASTCALL(core_page_generation),                                                            \
     "page_generation(generations, page): a page's number in the read-only section uint32 [pages, 1]."}

#endif
