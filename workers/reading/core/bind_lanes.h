/* hotset.workers.reading._core.Lanes: its beginning and its end. */
#ifndef HOTSET_BIND_LANES_H
#define HOTSET_BIND_LANES_H

#include "bind_load.h"

typedef struct {
    PyObject_HEAD
    int open;
    struct lanes lanes;
    struct arena arena; /* of `memory`, if there is any */
    Py_buffer memory, *slots;
    Py_ssize_t num_slots;
    struct load **known; /* by expert, what its loads are copies of; NULL where nothing is known */
    size_t num_known;
} LanesObject;

static uint64_t expert_limit_of(const struct lanes *lanes) {
    return lanes->arena ? (uint64_t)lanes->arena->num_layers * lanes->arena->num_experts : 1 << 24; /* of a slot word */
}

static LanesObject *lanes_of(PyObject *self) {
    if (((LanesObject *)self)->open) return (LanesObject *)self;
    PyErr_SetString(PyExc_ValueError, "the lanes are closed");
    return NULL;
}

static void close_lanes(LanesObject *object) {
    if (!object->open) return;
    object->open = 0;
    Py_BEGIN_ALLOW_THREADS
    lanes_close(&object->lanes);
    Py_END_ALLOW_THREADS
    while (object->num_slots) PyBuffer_Release(&object->slots[--object->num_slots]);
    free(object->slots);
    while (object->num_known) free(object->known[--object->num_known]);
    free(object->known);
    object->known = NULL;
    if (object->lanes.arena) PyBuffer_Release(&object->memory);
}

/* Attaches the arena in which the loads are published; 0 with an exception. */
static int take_arena(LanesObject *object, PyObject *memory, unsigned process) {
    if (PyObject_GetBuffer(memory, &object->memory, PyBUF_WRITABLE) < 0) return 0;
    const char *problem = arena_attach(&object->arena, object->memory.buf, (uint64_t)object->memory.len);
    if (problem) PyErr_Format(PyExc_ValueError, "the memory %s", problem);
    else if (process >= object->arena.num_processes)
        PyErr_Format(PyExc_IndexError, "process is %u, expected 0 <= process < %u", process, object->arena.num_processes);
    if (PyErr_Occurred()) return PyBuffer_Release(&object->memory), 0;
    object->lanes.arena = &object->arena;
    object->lanes.process = process;
    return 1;
}

static int take_slots(LanesObject *object, PyObject *slots) {
    Py_ssize_t count = PySequence_Size(slots);
    if (count < 0) return 0;
    object->slots = calloc((size_t)count + 1, sizeof *object->slots);
    if (!object->slots) return PyErr_NoMemory(), 0;
    for (; object->num_slots < count; object->num_slots++) {
        PyObject *slot = PySequence_GetItem(slots, object->num_slots);
        if (!slot) return 0;
        int taken = take_array(slot, "a slot", &BYTES, 1, 1, (Py_ssize_t[]){ANY_LENGTH},
                               &object->slots[object->num_slots]);
        Py_DECREF(slot);
        if (!taken) return 0;
    }
    return 1;
}

static int lanes_type_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    LanesObject *object = (LanesObject *)self;
    static char *names[] = {"slots", "count", "direct_alignment", "memory", "process", NULL};
    PyObject *slots, *memory = Py_None;
    unsigned count, alignment = 0, process = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OI|IOI", names, &slots, &count, &alignment, &memory, &process))
        return -1;
    if (object->open) return PyErr_SetString(PyExc_ValueError, "the lanes are open already"), -1;
    object->lanes = (struct lanes){.direct = alignment > 0, .alignment = alignment, .hash = xxh3_best()};
    atomic_init(&object->lanes.asks_page_cache, !alignment);
    if (memory != Py_None && !take_arena(object, memory, process)) return -1;
    int error = lanes_start(&object->lanes, count);
    object->open = 1;
    if (error) errno = error, PyErr_SetFromErrno(PyExc_OSError);
    if (error || !take_slots(object, slots)) {
        close_lanes(object);
        return -1;
    }
    return 0;
}

#endif
