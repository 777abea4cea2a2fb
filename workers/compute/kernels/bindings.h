/* The functions of the module, one file bind_*.c for each kind. */
#ifndef HOTSET_BINDINGS_H
#define HOTSET_BINDINGS_H

#include "arguments.h"

PyObject *py_linear(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_linear_transposed(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_experts(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_combine(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_row_norms(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_rms_norm(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_rotary_angles(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_rotate(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_write_kv(PyObject *self, PyObject *const *args, Py_ssize_t count);
PyObject *py_attention(PyObject *self, PyObject *const *args, Py_ssize_t count);

#endif
