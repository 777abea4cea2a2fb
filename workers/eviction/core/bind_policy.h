/* What the types of this module share: the Python type over struct policy, and argument checks. */
#ifndef HOTSET_BIND_POLICY_H
#define HOTSET_BIND_POLICY_H

#include "bind_arrays.h"
#include "replay.h"

typedef struct {
    PyObject_HEAD
    int ready;
    struct policy policy;
} PolicyObject;

static const struct array_kind WORDS = {"uint16", "H", 2};
static const struct array_kind BYTES = {"uint8", "B", 1};
static const struct array_kind FLOAT64 = {"float64", "d", 8};

static inline struct policy *policy_of(PyObject *self) {
    PolicyObject *object = (PolicyObject *)self;
    if (object->ready) return &object->policy;
    PyErr_SetString(PyExc_ValueError, "__init__ has not been called");
    return NULL;
}

static inline int in_range(const char *name, unsigned value, unsigned low, unsigned high) {
    if (value >= low && value <= high) return 1;
    PyErr_Format(PyExc_ValueError, "%s is %u, expected %u to %u", name, value, low, high);
    return 0;
}

/* Slots per layer, or of all layers together if the pool is shared; 0 with an exception. */
static inline int slots_in_range(const struct policy *policy, unsigned slots, int shared) {
    unsigned most = policy->num_experts * (shared ? policy->num_layers : 1);
    return in_range("slots", slots, 1, most);
}

/* Opens `object` as records that fit the policy's model; 0 with an exception. */
static inline int take_records(PyObject *object, const struct policy *policy, Py_buffer *view) {
    if (!take_array(object, "records", &WORDS, 0, 1, (Py_ssize_t[]){ANY_LENGTH}, view)) return 0;
    const uint16_t *words = view->buf;
    size_t count = (size_t)view->shape[0];
    for (size_t at = 0; at < count; at += words[at + DEMAND_LENGTH]) {
        const char *problem = demand_problem(words + at, count - at, policy->num_layers, policy->num_experts);
        if (!problem) continue;
        PyErr_Format(PyExc_ValueError, "the array of records %s, at word %zu", problem, at);
        PyBuffer_Release(view);
        return 0;
    }
    return 1;
}

#endif
