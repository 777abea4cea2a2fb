/* What the functions of the module take: contiguous arrays of the right kind and shape. */
#ifndef HOTSET_ARGUMENTS_H
#define HOTSET_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "formats.h"

enum kind { KIND_FLOAT32, KIND_FLOAT16, KIND_UINT16, KIND_UINT8, KIND_INT32, KIND_UINT32, KIND_INT64, KIND_OTHER };

struct array {
    Py_buffer view;
    enum kind kind;
};

#define MAX_ARRAYS 8

struct arrays { /* all buffers that a call holds */
    struct array held[MAX_ARRAYS];
    int count;
};

#define ANY_KIND (-1)
#define WRITABLE 1
#define STRIDED 2 /* the first dimension may have gaps */

/* The buffer of `object`, of the given kind and number of dimensions, contiguous; NULL with an exception otherwise. */
Py_buffer *take(struct arrays *arrays, PyObject *object, const char *name, int kind, int dimensions, int flags);

void release(struct arrays *arrays);

/* 1, or 0 with an exception that names what was found and what was expected. */
int expect(Py_ssize_t found, Py_ssize_t expected, const char *what);
int count_is(Py_ssize_t count, Py_ssize_t expected);
int count_is_between(Py_ssize_t count, Py_ssize_t least, Py_ssize_t most);
int is_format(long number);
int fills_blocks(enum weight_format format, Py_ssize_t width, const char *what);

#endif
