/* Methods of Arena for demands: demand_ring.h, with its arguments checked. */
#ifndef HOTSET_BIND_DEMANDS_H
#define HOTSET_BIND_DEMANDS_H

#include "bind_arrays.h"
#include "demand_ring.h"

static const struct array_kind UINT16 = {"uint16", "H", 2};

/* Whether all `count` numbers are in 0 ... limit - 1; an exception otherwise. */
static inline int demand_numbers(const char *name, const int32_t *numbers, Py_ssize_t count, uint32_t limit) {
    for (Py_ssize_t i = 0; i < count; i++)
        if (numbers[i] < 0 || (uint32_t)numbers[i] >= limit) {
            PyErr_Format(PyExc_ValueError, "%s is %d, expected 0 <= %s < %u", name, numbers[i], name, limit);
            return 0;
        }
    return 1;
}

static PyObject *arena_write_demand(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    Py_buffer experts, streams = {.buf = NULL};
    if (!arena) return NULL;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
    if (!parse_indices(args, 2, 2, (const char *[]){"process", "layer"},
                       (uint64_t[]){arena->num_processes, arena->num_layers}, v))
        return NULL;
    if (!take_array(args[2], "experts", &INT32, 0, 2, (Py_ssize_t[]){ANY_LENGTH, ANY_LENGTH}, &experts)) return NULL;
    if (args[3] != Py_None && !take_array(args[3], "streams", &INT32, 0, 1, experts.shape, &streams)) {
        PyBuffer_Release(&experts);
        return NULL;
    }
    int good = demand_numbers("expert", experts.buf, experts.shape[0] * experts.shape[1], arena->num_experts) &&
               (!streams.buf || demand_numbers("stream", streams.buf, experts.shape[0], DEMAND_NO_STREAM));
    if (good && !demand_write(arena, (uint32_t)v[0], (uint32_t)v[1], (uint32_t)experts.shape[0],
                              (uint32_t)experts.shape[1], streams.buf, experts.buf)) {
        PyErr_Format(PyExc_ValueError, "a demand of %zd rows of %zd experts does not fit half of the ring of %llu words",
                     experts.shape[0], experts.shape[1], (unsigned long long)demand_ring_capacity(arena));
        good = 0;
    }
    PyBuffer_Release(&experts);
    if (streams.buf) PyBuffer_Release(&streams);
    if (!good) return NULL;
    Py_RETURN_NONE;
}

static PyObject *arena_demands_written(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct arena *arena = arena_of(self);
    return arena ? PyLong_FromUnsignedLongLong(demands_written(arena)) : NULL;
}

static PyObject *arena_read_demands(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    Py_buffer out;
    if (!arena) return NULL;
    if (!parse_indices(args, count == 3 ? 2 : count, 2, (const char *[]){"process", "cursor"},
                       (uint64_t[]){arena->num_processes, INT64_MAX}, v))
        return NULL;
    Py_ssize_t capacity = (Py_ssize_t)demand_ring_capacity(arena);
    if (!take_array(args[2], "out", &UINT16, 1, 1, &capacity, &out)) return NULL;
    int lost;
    uint64_t words = demand_read(arena, (uint32_t)v[0], &v[1], out.buf, &lost);
    PyBuffer_Release(&out);
    return Py_BuildValue("KKN", (unsigned long long)words, (unsigned long long)v[1], PyBool_FromLong(lost));
}

#define DEMAND_METHODS                                                                                                \
    {"write_demand", FASTCALL(arena_write_demand),                                                                    \
     "write_demand(process, layer, experts i32[rows, n], streams i32[rows] or None): what a step of a layer uses."},   \
    {"demands_written", arena_demands_written, METH_NOARGS, "demands_written(): words, of all processes."},            \
    {"read_demands", FASTCALL(arena_read_demands),                                                                    \
     "read_demands(process, cursor, out u16[capacity]) -> (words, new cursor, whether some were lost)."}

#endif
