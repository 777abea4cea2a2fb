#include "arguments.h"

void release(struct arrays *arrays) {
    while (arrays->count) PyBuffer_Release(&arrays->held[--arrays->count].view);
}

static enum kind kind_of(const Py_buffer *view) {
    const char *format = view->format ? view->format : "B";
    if (*format == '<' || *format == '=' || *format == '@') format++;
    if (!*format || format[1]) return KIND_OTHER;
    switch (*format) {
    case 'f': return KIND_FLOAT32;
    case 'e': return KIND_FLOAT16;
    case 'H': return KIND_UINT16;
    case 'B': return KIND_UINT8;
    case 'i': return KIND_INT32;
    case 'I': return KIND_UINT32;
    case 'l':
    case 'q': return view->itemsize == 8 ? KIND_INT64 : view->itemsize == 4 ? KIND_INT32 : KIND_OTHER;
    case 'L': return view->itemsize == 4 ? KIND_UINT32 : KIND_OTHER;
    default: return KIND_OTHER;
    }
}

static const char *const kind_names[] = {"float32", "float16", "uint16", "uint8", "int32", "uint32", "int64"};

Py_buffer *take(struct arrays *arrays, PyObject *object, const char *name, int kind, int dimensions, int flags) {
    struct array *array = &arrays->held[arrays->count];
    int request = PyBUF_FORMAT | PyBUF_STRIDES | (flags & WRITABLE ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object, &array->view, request) < 0) return NULL;
    arrays->count++;
    array->kind = kind_of(&array->view);
    if (kind != ANY_KIND && (int)array->kind != kind) {
        PyErr_Format(PyExc_TypeError, "%s has element format '%s', expected %s", name, array->view.format,
                     kind_names[kind]);
        return NULL;
    }
    if (array->view.ndim != dimensions) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected %d", name, array->view.ndim, dimensions);
        return NULL;
    }
    Py_ssize_t stride = array->view.itemsize;
    int first = flags & STRIDED ? 1 : 0;
    for (int d = dimensions - 1; d >= first; d--) {
        if (array->view.shape[d] > 1 && array->view.strides[d] != stride) {
            PyErr_Format(PyExc_ValueError, "%s is not contiguous", name);
            return NULL;
        }
        stride *= array->view.shape[d];
    }
    if (first && array->view.shape[0] > 1 && array->view.strides[0] < stride) {
        PyErr_Format(PyExc_ValueError, "%s has overlapping rows", name);
        return NULL;
    }
    return &array->view;
}

int expect(Py_ssize_t found, Py_ssize_t expected, const char *what) {
    if (found == expected) return 1;
    PyErr_Format(PyExc_ValueError, "%s is %zd, expected %zd", what, found, expected);
    return 0;
}

int count_is(Py_ssize_t count, Py_ssize_t expected) {
    if (count == expected) return 1;
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    return 0;
}

int count_is_between(Py_ssize_t count, Py_ssize_t least, Py_ssize_t most) {
    if (least <= count && count <= most) return 1;
    PyErr_Format(PyExc_TypeError, "expected %zd to %zd arguments, got %zd", least, most, count);
    return 0;
}

int is_format(long number) {
    if (number >= 0 && number < FORMAT_COUNT) return 1;
    PyErr_Format(PyExc_ValueError, "unknown weight format %ld, expected 0 to %d", number, FORMAT_COUNT - 1);
    return 0;
}

int fills_blocks(enum weight_format format, Py_ssize_t width, const char *what) {
    Py_ssize_t block = (Py_ssize_t)format_values_per_block(format);
    if (width % block == 0) return 1;
    PyErr_Format(PyExc_ValueError, "%s is %zd, expected a multiple of %zd for %s", what, width, block,
                 FORMAT_NAMES[format]);
    return 0;
}
