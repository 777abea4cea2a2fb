/* What the binding files share: the Python type over struct arena, and argument checks with one clear sentence. */
#ifndef HOTSET_MODULE_H
#define HOTSET_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "arena.h"

typedef struct {
    PyObject_HEAD
    Py_buffer buffer; /* held for as long as the arena is open: the memory cannot be unmapped under it */
    int open;
    struct arena arena;
} ArenaObject;

/* The open arena of `self`, or NULL with an exception. */
static inline struct arena *arena_of(PyObject *self) {
    ArenaObject *object = (ArenaObject *)self;
    if (object->open) return &object->arena;
    PyErr_SetString(PyExc_ValueError, "the arena is closed");
    return NULL;
}

/* Says of what is no integer, or one of more than 64 bits, what Python's own words do not: which argument it is. Leaves
 * any other exception, which the argument's __index__ may have raised. Cold: calls that fit are timed. */
__attribute__((cold, noinline, unused)) static void refuse_index(PyObject *given, const char *name, uint64_t limit) {
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_IndexError, "%s is %R, expected 0 <= %s < %llu", name, given, name,
                     (unsigned long long)limit);
    } else if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s is %R, expected an integer", name, given);
    }
}

/* Reads `count` non-negative integers, each below its limit; 0 with an exception naming the argument otherwise. */
static inline int parse_indices(PyObject *const *args, Py_ssize_t given, int count, const char *const *names,
                                const uint64_t *limits, uint64_t *values) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", count, given);
        return 0;
    }
    for (int i = 0; i < count; i++) {
        long long value = PyLong_AsLongLong(args[i]);
        if (value == -1 && PyErr_Occurred()) {
            refuse_index(args[i], names[i], limits[i]);
            return 0;
        }
        if (value < 0 || (uint64_t)value >= limits[i]) {
            PyErr_Format(PyExc_IndexError, "%s is %lld, expected 0 <= %s < %llu", names[i], value, names[i],
                         (unsigned long long)limits[i]);
            return 0;
        }
        values[i] = (uint64_t)value;
    }
    return 1;
}

#endif
