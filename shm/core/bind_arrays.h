/* Arrays as arguments: any object with the buffer protocol, checked against one expected type and shape. */
#ifndef HOTSET_BIND_ARRAYS_H
#define HOTSET_BIND_ARRAYS_H

#include "module.h"

#include <stdio.h>
#include <string.h>

#define ANY_LENGTH (-1)

struct array_kind {
    const char *dtype;
    const char *formats; /* the buffer protocol's letters for it */
    Py_ssize_t itemsize;
};

static const struct array_kind FLOAT32 = {"float32", "f", 4};
static const struct array_kind INT32 = {"int32", "il", 4};
static const struct array_kind UINT32 = {"uint32", "IL", 4};
static const struct array_kind UINT64 = {"uint64", "LQ", 8};

static inline void describe_shape(char *text, size_t size, int ndim, const Py_ssize_t *shape) {
    size_t at = (size_t)snprintf(text, size, "(");
    for (int i = 0; i < ndim && at < size; i++) {
        const char *separator = i + 1 < ndim ? ", " : ndim == 1 ? "," : "";
        if (shape[i] == ANY_LENGTH) at += (size_t)snprintf(text + at, size - at, "n%s", separator);
        else at += (size_t)snprintf(text + at, size - at, "%zd%s", shape[i], separator);
    }
    if (at < size) snprintf(text + at, size - at, ")");
}

static inline const char *dtype_name(const Py_buffer *view) {
    const char *format = view->format ? view->format : "B";
    char letter = format[strlen(format) - 1];
    switch (letter) {
    case 'f': return "float32";
    case 'd': return "float64";
    case 'e': return "float16";
    case 'l': case 'q': case 'i': return view->itemsize == 8 ? "int64" : "int32";
    case 'L': case 'Q': case 'I': return view->itemsize == 8 ? "uint64" : "uint32";
    case 'h': return "int16";
    case 'b': return "int8";
    case 'B': return "uint8";
    case '?': return "bool";
    default: return format;
    }
}

/* Opens `object` as a C-contiguous array of `kind`; ANY_LENGTH in `shape` fits every length. 0 with an exception that
 * names what was given and what was expected. */
static inline int take_array(PyObject *object, const char *name, const struct array_kind *kind, int writable, int ndim,
                             const Py_ssize_t *shape, Py_buffer *view) {
    char expected[96], given[96];
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT) < 0) {
        PyErr_Clear();
        describe_shape(expected, sizeof expected, ndim, shape);
        PyObject *type = PyType_GetName(Py_TYPE(object));
        PyErr_Format(PyExc_TypeError, "%s is a %U, expected a %s array of shape %s", name, type, kind->dtype, expected);
        Py_XDECREF(type);
        return 0;
    }
    const char *format = view->format ? view->format : "B";
    if (view->itemsize != kind->itemsize || !strchr(kind->formats, format[strlen(format) - 1])) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %s, expected %s", name, dtype_name(view), kind->dtype);
        goto refused;
    }
    int fits = view->ndim == ndim;
    for (int i = 0; fits && i < ndim; i++) fits = shape[i] == ANY_LENGTH || view->shape[i] == shape[i];
    if (!fits) {
        describe_shape(expected, sizeof expected, ndim, shape);
        describe_shape(given, sizeof given, view->ndim, view->shape);
        PyErr_Format(PyExc_ValueError, "%s has shape %s, expected %s", name, given, expected);
        goto refused;
    }
    if (!PyBuffer_IsContiguous(view, 'C')) {
        describe_shape(expected, sizeof expected, ndim, shape);
        PyErr_Format(PyExc_ValueError, "%s is not contiguous, expected a C-contiguous array of shape %s", name, expected);
        goto refused;
    }
    if (writable && view->readonly) {
        describe_shape(expected, sizeof expected, ndim, shape);
        PyErr_Format(PyExc_ValueError, "%s is read-only, expected a writable array of shape %s", name, expected);
        goto refused;
    }
    return 1;
refused:
    PyBuffer_Release(view);
    return 0;
}

#endif
