/* hotset.shm._core.Affinity: the affinity slots of an arena under one decay law. */
#ifndef HOTSET_BIND_AFFINITY_H
#define HOTSET_BIND_AFFINITY_H

#include "affinity.h"
#include "bind_arrays.h"
#include "counters.h"

typedef struct {
    PyObject_HEAD
    PyObject *arena;
    uint32_t process;
    struct affinity_law law;
} AffinityObject;

/* The types of this module, for checking arguments; set once when it is imported. */
static struct {
    PyTypeObject *arena, *affinity, *router, *binding;
} core_types;

/* The open arena that an Affinity or Router was made on, or NULL with an exception. */
static inline struct arena *owner_arena(PyObject *owner) {
    if (owner) return arena_of(owner);
    PyErr_SetString(PyExc_ValueError, "__init__ has not been called");
    return NULL;
}

static int affinity_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    AffinityObject *object = (AffinityObject *)self;
    static char *names[] = {"arena", "process", "decay", "boost", "max", NULL};
    PyObject *owner;
    unsigned process;
    double decay, boost, max;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!Iddd", names, core_types.arena, &owner, &process, &decay, &boost,
                                     &max))
        return -1;
    const struct arena *arena = arena_of(owner);
    if (!arena) return -1;
    if (process >= arena->num_processes) {
        PyErr_Format(PyExc_IndexError, "process is %u, expected 0 <= process < %u", process, arena->num_processes);
        return -1;
    }
    if (!(decay >= 0 && decay <= 1 && boost >= 0 && max > 0)) {
        PyErr_SetString(PyExc_ValueError, "expected 0 <= decay <= 1, 0 <= boost and 0 < max");
        return -1;
    }
    affinity_law_init(&object->law, decay, boost, max);
    object->process = process;
    Py_INCREF(owner);
    Py_XDECREF(object->arena);
    object->arena = owner;
    return 0;
}

static void affinity_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(((AffinityObject *)self)->arena);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *affinity_update(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    AffinityObject *object = (AffinityObject *)self;
    const struct arena *arena = owner_arena(object->arena);
    uint64_t layer;
    Py_buffer ids;
    if (!arena) return NULL;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    if (!parse_indices(args, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    if (!take_array(args[1], "ids", &INT32, 0, 1, (Py_ssize_t[]){ANY_LENGTH}, &ids)) return NULL;
    const int32_t *expert = ids.buf;
    for (Py_ssize_t i = 0; i < ids.shape[0]; i++)
        if (expert[i] < 0 || (uint32_t)expert[i] >= arena->num_experts) {
            PyErr_Format(PyExc_ValueError, "expert id is %d, expected 0 <= id < %u", expert[i], arena->num_experts);
            PyBuffer_Release(&ids);
            return NULL;
        }
    uint64_t now = affinity_advance(arena, (uint32_t)layer, 1);
    atomic_u64 *activations = activation_row(arena, object->process, (uint32_t)layer);
    for (Py_ssize_t i = 0; i < ids.shape[0]; i++) {
        affinity_merge(&object->law, affinity_row(arena, (uint32_t)layer) + expert[i], object->law.boost_q24, now);
        store_relaxed(&activations[expert[i]], load_relaxed(&activations[expert[i]]) + 1);
    }
    PyBuffer_Release(&ids);
    Py_RETURN_NONE;
}

static PyObject *affinity_snapshot(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    AffinityObject *object = (AffinityObject *)self;
    const struct arena *arena = owner_arena(object->arena);
    Py_buffer scores, epochs;
    if (!arena) return NULL;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    Py_ssize_t shape[2] = {arena->num_layers, arena->num_experts};
    if (!take_array(args[0], "scores", &FLOAT32, 1, 2, shape, &scores)) return NULL;
    if (!take_array(args[1], "epochs", &UINT64, 1, 2, shape, &epochs)) {
        PyBuffer_Release(&scores);
        return NULL;
    }
    float *score = scores.buf;
    uint64_t *epoch = epochs.buf;
    double unit = object->law.max / AFFINITY_ONE;
    for (uint32_t layer = 0; layer < arena->num_layers; layer++) {
        uint64_t now = affinity_now(arena, layer);
        const atomic_u64 *slots = affinity_row(arena, layer);
        for (uint32_t expert = 0; expert < arena->num_experts; expert++) {
            uint64_t slot = load_relaxed(&slots[expert]);
            *score++ = (float)((double)affinity_score(&object->law, slot, now) * unit);
            *epoch++ = affinity_slot_epoch(slot);
        }
    }
    PyBuffer_Release(&scores);
    PyBuffer_Release(&epochs);
    Py_RETURN_NONE;
}

static PyObject *affinity_reset(PyObject *self, PyObject *arg) {
    const struct arena *arena = owner_arena(((AffinityObject *)self)->arena);
    uint64_t layer;
    if (!arena) return NULL;
    if (!parse_indices(&arg, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    /* Score 0 at the current epoch: an epoch never goes back (A1). */
    uint64_t now = affinity_now(arena, (uint32_t)layer) & AFFINITY_EPOCH_MASK;
    for (uint32_t expert = 0; expert < arena->num_experts; expert++)
        store_relaxed(affinity_row(arena, (uint32_t)layer) + expert, now);
    Py_RETURN_NONE;
}

static PyMethodDef affinity_methods[] = {
    {"update", FASTCALL(affinity_update), "update(layer, ids i32[n]): one epoch, in which `ids` were activated."},
    {"snapshot", FASTCALL(affinity_snapshot),
     "snapshot(scores f32[layers, experts], epochs u64[layers, experts]): scores now, epochs of the last activation."},
    {"reset", affinity_reset, METH_O, "reset(layer): all scores 0."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot affinity_slots[] = {
    {Py_tp_doc, "Affinity(arena, process, decay, boost, max): see affinity.h."},
    {Py_tp_init, affinity_init},
    {Py_tp_dealloc, affinity_dealloc},
    {Py_tp_methods, affinity_methods},
    {0, NULL},
};

static PyType_Spec affinity_spec = {"hotset.shm._core.Affinity", sizeof(AffinityObject), 0, Py_TPFLAGS_DEFAULT,
                                    affinity_slots};

#endif
