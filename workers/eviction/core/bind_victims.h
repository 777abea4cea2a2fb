/* hotset.workers.eviction._core.Policy.victims. */
#ifndef HOTSET_BIND_VICTIMS_H
#define HOTSET_BIND_VICTIMS_H

#include "bind_policy.h"
#include "victims.h"

static const struct array_kind INT64 = {"int64", "lq", 8};
static const struct array_kind BOOL = {"bool", "?", 1};

/* ([slots, the first victim's first], how many of them are not protected); NULL with an exception. */
static PyObject *list_victims(const struct policy *policy, const Py_buffer *experts, const uint8_t *among,
                              uint32_t newcomer, size_t most) {
    size_t slots = (size_t)experts->shape[0], unprotected = 0;
    struct victim *heap = malloc((slots + 1) * sizeof *heap);
    uint32_t *residents = malloc((policy->num_layers + 1) * sizeof *residents);
    double *nearness = malloc((policy->num_layers + 1) * sizeof *nearness);
    PyObject *list = heap && residents && nearness ? PyList_New(0) : PyErr_NoMemory();
    if (list) {
        size_t count = victims_heap(policy, experts->buf, among, slots, newcomer, residents, nearness, heap);
        while (list && count && most--) {
            struct victim victim = victims_pop(heap, &count);
            unprotected += !victim.protected;
            PyObject *slot = PyLong_FromUnsignedLong(victim.slot);
            if (!slot || PyList_Append(list, slot) < 0) Py_CLEAR(list);
            Py_XDECREF(slot);
        }
    }
    free(heap);
    free(residents);
    free(nearness);
    return list ? Py_BuildValue("Nn", list, (Py_ssize_t)unprotected) : NULL;
}

static PyObject *policy_type_victims(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct policy *policy = policy_of(self);
    if (!policy) return NULL;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
    int64_t ids = (int64_t)policy->num_layers * policy->num_experts;
    long long newcomer = args[2] == Py_None ? ids : PyLong_AsLongLong(args[2]), most = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred()) return NULL;
    if (newcomer < 0 || (newcomer >= ids && args[2] != Py_None) || most < 0)
        return PyErr_Format(PyExc_ValueError, "there is no expert %lld, or there are not %lld victims", newcomer, most);
    Py_buffer experts, among;
    if (!take_array(args[0], "experts", &INT64, 0, 1, (Py_ssize_t[]){ANY_LENGTH}, &experts)) return NULL;
    PyObject *victims = NULL;
    const int64_t *expert = experts.buf;
    for (Py_ssize_t i = 0; i < experts.shape[0]; i++)
        if (expert[i] >= ids) {
            PyErr_Format(PyExc_ValueError, "there is no expert %lld", (long long)expert[i]);
            goto done;
        }
    uint32_t layer = (uint32_t)(newcomer / policy->num_experts);
    if (args[1] == Py_None) {
        victims = list_victims(policy, &experts, NULL, layer, (size_t)most);
    } else if (take_array(args[1], "among", &BOOL, 0, 1, experts.shape, &among)) {
        victims = list_victims(policy, &experts, among.buf, layer, (size_t)most);
        PyBuffer_Release(&among);
    }
done:
    PyBuffer_Release(&experts);
    return victims;
}

#endif
