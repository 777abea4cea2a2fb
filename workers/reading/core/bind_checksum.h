/* hotset.workers.reading._core: the checksum by itself, with any of its instruction sets; for tests. */
#ifndef HOTSET_BIND_CHECKSUM_H
#define HOTSET_BIND_CHECKSUM_H

#include "bind_load.h"

/* xxh3_64(data, instruction_set), of a byte or more. */
static PyObject *py_xxh3_64(PyObject *self, PyObject *args) {
    (void)self;
    PyObject *array;
    const char *name;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "Os", &array, &name) ||
        !take_array(array, "data", &BYTES, 0, 1, (Py_ssize_t[]){ANY_LENGTH}, &data))
        return NULL;
    PyObject *checksum = NULL;
    for (size_t i = 0; i < xxh3_kernel_count && data.len; i++) {
        if (strcmp(xxh3_kernels[i].name, name) != 0 || !xxh3_kernels[i].supported()) continue;
        struct xxh3 sums;
        xxh3_begin(&sums);
        xxh3_kernels[i].blocks(sums.sums, data.buf, xxh3_whole_blocks((size_t)data.len));
        checksum = PyLong_FromUnsignedLongLong(xxh3_end(&sums, data.buf, (size_t)data.len));
    }
    if (!checksum && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%zd bytes, instruction set '%s': one of them does not go", data.len, name);
    PyBuffer_Release(&data);
    return checksum;
}

static PyObject *py_instruction_sets(PyObject *self, PyObject *ignored) {
    (void)self, (void)ignored;
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < xxh3_kernel_count; i++) {
        PyObject *name = xxh3_kernels[i].supported() ? PyUnicode_FromString(xxh3_kernels[i].name) : NULL;
        if (name && PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

#endif
