/* hotset.workers.reading._core.Lanes: where experts lie, and the loads of them that begin. */
#ifndef HOTSET_BIND_BEGIN_H
#define HOTSET_BIND_BEGIN_H

#include "bind_lanes.h"

enum { KNOWN_ID, PIECES, TRANSPOSED, FORMAT, KNOW_ARGUMENTS };
enum { LOAD_ID, SLOT, URGENT, BEGAN, EXPECTED, SOURCE, WARM_START, BEGIN_ARGUMENTS };

/* `known` with room for `id`; 0 with an exception. */
static int make_room(LanesObject *object, uint64_t id) {
    if (id < object->num_known) return 1;
    size_t count = 2 * (size_t)id + 8;
    struct load **known = realloc(object->known, count * sizeof *known);
    if (!known) return PyErr_NoMemory(), 0;
    memset(known + object->num_known, 0, (count - object->num_known) * sizeof *known);
    object->known = known;
    object->num_known = count;
    return 1;
}

static PyObject *lanes_type_know(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    LanesObject *object = lanes_of(self);
    if (!object) return NULL;
    if (count != KNOW_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", KNOW_ARGUMENTS, count);
    uint64_t v[2];
    Py_buffer pieces, transposed;
    if (!parse_indices((PyObject *const[]){args[KNOWN_ID], args[FORMAT]}, 2, 2, (const char *[]){"expert id", "format"},
                       (uint64_t[]){expert_limit_of(&object->lanes), 256}, v) ||
        !make_room(object, v[0]) ||
        !take_array(args[PIECES], "pieces", &INT64, 0, 2, (Py_ssize_t[]){ANY_LENGTH, PIECE_COLUMNS}, &pieces))
        return NULL;
    struct load *load = NULL;
    if (take_array(args[TRANSPOSED], "transposed", &INT64, 0, 2, (Py_ssize_t[]){ANY_LENGTH, TRANSPOSED_COLUMNS},
                   &transposed)) {
        load = new_load(&pieces, &transposed, object->lanes.alignment);
        PyBuffer_Release(&transposed);
    }
    PyBuffer_Release(&pieces);
    if (!load) return NULL;
    load->id = v[0];
    load->format = (uint16_t)v[1];
    free(object->known[v[0]]);
    object->known[v[0]] = load;
    Py_RETURN_NONE;
}

static PyObject *lanes_type_begin(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    LanesObject *object = lanes_of(self);
    if (!object) return NULL;
    uint64_t v[6], expected = 0;
    if (count != BEGIN_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", BEGIN_ARGUMENTS, count);
    if (!parse_indices((PyObject *const[]){args[LOAD_ID], args[SLOT], args[URGENT], args[BEGAN], args[SOURCE],
                                           args[WARM_START]}, 6, 6,
                       (const char *[]){"expert id", "slot", "urgent", "began", "source", "warm_start"},
                       (uint64_t[]){expert_limit_of(&object->lanes), (uint64_t)object->num_slots, 2, INT64_MAX,
                                    PREFETCH_SOURCES, 2}, v))
        return NULL;
    if (args[EXPECTED] != Py_None) expected = PyLong_AsUnsignedLongLong(args[EXPECTED]);
    if (PyErr_Occurred()) return NULL;
    const struct load *known = v[0] < object->num_known ? object->known[v[0]] : NULL;
    if (!known) return PyErr_Format(PyExc_ValueError, "where expert %llu lies is not known", (unsigned long long)v[0]);
    if (known->touched > (uint64_t)object->slots[v[1]].shape[0])
        return PyErr_Format(PyExc_ValueError, "a piece of expert %llu lies outside of slot %llu",
                            (unsigned long long)v[0], (unsigned long long)v[1]);
    struct load *load = load_copy(known);
    if (!load) return PyErr_NoMemory();
    load->slot = object->slots[v[1]].buf;
    load->slot_number = (uint32_t)v[1];
    load->urgent = v[2];
    load->began = v[3];
    load->source = (uint16_t)v[4];
    load->warm_start = v[5];
    load->is_known = args[EXPECTED] != Py_None;
    load->expected = expected;
    int error = lanes_begin(&object->lanes, load);
    if (error) free(load);
    if (error == EEXIST) return PyErr_Format(PyExc_ValueError, "load %llu is under way", (unsigned long long)v[0]);
    if (error) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#endif
