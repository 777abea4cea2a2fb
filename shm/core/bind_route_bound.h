/* Router.bind(): calls whose arrays are fixed, so that nothing is checked twice. */
#ifndef HOTSET_BIND_ROUTE_BOUND_H
#define HOTSET_BIND_ROUTE_BOUND_H

#include "bind_route.h"

/* A call whose arrays are fixed. */
typedef struct {
    PyObject_HEAD
    RouterObject *router;
    Py_buffer logits, experts, weights;
    uint32_t layer, rows;
    int by_row; /* the argument is the index of one row of logits */
    int own_strength;
    struct route_call call;
    enum route_epochs epochs;
} BindingObject;

static PyObject *binding_call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    BindingObject *binding = (BindingObject *)self;
    RouterObject *router = binding->router;
    uint64_t row = 0, rows = binding->by_row ? 1 : binding->rows;
    if (count || binding->by_row) {
        const char *name = binding->by_row ? "row" : "rows";
        uint64_t limit = (uint64_t)binding->rows + !binding->by_row;
        if (!parse_indices(args, count, 1, &name, &limit, binding->by_row ? &row : &rows)) return NULL;
    }
    struct route_call call = binding->call;
    call.selection_bias = router_selection_bias(router, binding->layer);
    if (!binding->own_strength) call.strength = router->strength[call.policy];
    struct route_tally tally;
    uint64_t hits = 0;
    uint32_t experts = router->rule.num_experts;
    const float *logits = (const float *)binding->logits.buf + row * experts;
    if (binding->by_row) /* rows mostly come in turn: the next one's lines, of 16 logits */
        for (uint32_t e = 0; e < experts; e += 16) __builtin_prefetch(logits + experts + e);
    if (!router_run(router, binding->layer, &call, binding->epochs, logits, (uint32_t)rows, binding->experts.buf,
                    binding->weights.buf, &tally, &hits))
        return NULL;
    if (rows == 1) return PyLong_FromLong((long)(router->rule.top_k - hits)); /* its experts are distinct */
    long missing = 0;
    for (uint32_t word = 0; word * 64 < router->rule.num_experts; word++)
        missing += __builtin_popcountll(tally.missing[word]);
    return PyLong_FromLong(missing);
}

static PyMethodDef binding_method = {
    "route", FASTCALL(binding_call),
    "Routes the bound rows; how many distinct experts of them are not resident.\n\n"
    "One row bound: no argument. Many rows, outputs for one: the row's index. Outputs for all: how many of them (all)."};

static void binding_dealloc(PyObject *self) {
    BindingObject *binding = (BindingObject *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (binding->logits.obj) PyBuffer_Release(&binding->logits);
    if (binding->experts.obj) PyBuffer_Release(&binding->experts);
    if (binding->weights.obj) PyBuffer_Release(&binding->weights);
    Py_XDECREF((PyObject *)binding->router);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *router_bind(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    RouterObject *router = (RouterObject *)self;
    const struct arena *arena = owner_arena(router->arena);
    uint64_t layer;
    if (!arena) return NULL;
    if (count != 7) return PyErr_Format(PyExc_TypeError, "expected 7 arguments, got %zd", count);
    if (!parse_indices(args + 3, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    allocfunc allocate = (allocfunc)PyType_GetSlot(core_types.binding, Py_tp_alloc);
    BindingObject *binding = (BindingObject *)allocate(core_types.binding, 0);
    if (!binding) return NULL;
    PyObject *bound = NULL;
    Py_INCREF(self);
    binding->router = router;
    binding->layer = (uint32_t)layer;
    Py_ssize_t experts = router->rule.num_experts, k = router->rule.top_k;
    /* Which of the three forms it is follows from the number of dimensions of logits and experts. */
    Py_buffer probe;
    int logits_ndim = 1, experts_ndim = 1;
    if (PyObject_GetBuffer(args[0], &probe, PyBUF_STRIDES | PyBUF_FORMAT) < 0) PyErr_Clear();
    else logits_ndim = probe.ndim == 2 ? 2 : 1, PyBuffer_Release(&probe);
    if (PyObject_GetBuffer(args[1], &probe, PyBUF_STRIDES | PyBUF_FORMAT) < 0) PyErr_Clear();
    else experts_ndim = probe.ndim == 2 && logits_ndim == 2 ? 2 : 1, PyBuffer_Release(&probe);
    Py_ssize_t in[2] = {ANY_LENGTH, experts};
    if (!take_array(args[0], "logits", &FLOAT32, 0, logits_ndim, in + 2 - logits_ndim, &binding->logits)) goto done;
    Py_ssize_t rows = logits_ndim == 2 ? binding->logits.shape[0] : 1, out[2] = {rows, k};
    if (rows > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "logits has %zd rows, expected fewer than 2**31", rows);
        goto done;
    }
    if (!take_array(args[1], "experts", &INT32, 1, experts_ndim, out + 2 - experts_ndim, &binding->experts)) goto done;
    if (!take_array(args[2], "weights", &FLOAT32, 1, experts_ndim, out + 2 - experts_ndim, &binding->weights)) goto done;
    binding->rows = (uint32_t)rows;
    binding->by_row = logits_ndim == 2 && experts_ndim == 1;
    binding->own_strength = args[5] != Py_None;
    if (binding->own_strength && !PyFloat_Check(args[5]) && !PyLong_Check(args[5])) {
        PyErr_SetString(PyExc_TypeError, "strength of a bound call is not a number, expected a number or None");
        goto done;
    }
    if (!parse_call(router, args[4], args[5], rows, &binding->call, NULL)) goto done;
    if (!parse_epochs(args[6], &binding->epochs)) goto done;
    bound = PyCFunction_New(&binding_method, (PyObject *)binding);
done:
    Py_DECREF((PyObject *)binding);
    return bound;
}

static PyType_Slot binding_slots[] = {
    {Py_tp_doc, "The arrays of a bound call."},
    {Py_tp_dealloc, binding_dealloc},
    {0, NULL},
};

static PyType_Spec binding_spec = {"hotset.shm._core.Binding", sizeof(BindingObject), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, binding_slots};

#endif
