/* hotset.shm._core.Router: its methods. */
#ifndef HOTSET_BIND_ROUTING_H
#define HOTSET_BIND_ROUTING_H

#include "bind_route_bound.h"

#define TOP_K_ROWS 64 /* of Router.top_k() at a time: it has to put their weights somewhere */

/* ---- the residency mask of a private arena ---- */

static PyObject *router_set_resident(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    const struct arena *arena = owner_arena(((RouterObject *)self)->arena);
    uint64_t v[3];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 3, (const char *[]){"layer", "expert", "resident"},
                       (uint64_t[]){arena->num_layers, arena->num_experts, 2}, v))
        return NULL;
    atomic_u64 *word = mask_word(arena, arena->resident_mask, (uint32_t)v[0], (uint32_t)v[1]);
    if (v[2]) fetch_or_seq_cst(word, mask_bit((uint32_t)v[1]));
    else fetch_and_seq_cst(word, ~mask_bit((uint32_t)v[1]));
    Py_RETURN_NONE;
}

static PyObject *router_resident(PyObject *self, PyObject *arg) {
    const struct arena *arena = owner_arena(((RouterObject *)self)->arena);
    uint64_t layer, words[ROUTE_WORDS] = {0};
    if (!arena) return NULL;
    if (!parse_indices(&arg, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    for (uint32_t word = 0; word < arena->mask_words; word++)
        words[word] = load_acquire(arena->resident_mask + layer * arena->mask_stride + word);
    return id_set(words, arena->mask_words);
}

static PyObject *router_select(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    const struct route_rule *rule = &((RouterObject *)self)->rule;
    Py_buffer scores, ids;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    if (!take_array(args[0], "scores", &FLOAT32, 0, 1, (Py_ssize_t[]){rule->num_experts}, &scores)) return NULL;
    if (!take_array(args[1], "ids", &INT32, 1, 1, (Py_ssize_t[]){rule->top_k}, &ids)) {
        PyBuffer_Release(&scores);
        return NULL;
    }
    select_top_k(scores.buf, rule->num_experts, rule->top_k, ids.buf);
    PyBuffer_Release(&scores);
    PyBuffer_Release(&ids);
    Py_RETURN_NONE;
}

static PyObject *router_top_k(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    const struct route_rule *rule = &((RouterObject *)self)->rule;
    const struct arena *arena = owner_arena(((RouterObject *)self)->arena);
    struct route_call call = {.policy = POLICY_OFF};
    const struct route_boosts uncounted = {.keep = UINT64_MAX};
    struct route_snapshot nothing_resident = {0};
    struct route_tally tally = {0};
    uint64_t layer;
    Py_buffer logits, ids;
    if (!arena) return NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    if (!parse_indices(args + 2, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    call.selection_bias = router_selection_bias((RouterObject *)self, (uint32_t)layer);
    if (!take_array(args[0], "logits", &FLOAT32, 0, 2, (Py_ssize_t[]){ANY_LENGTH, rule->num_experts}, &logits)) return NULL;
    Py_ssize_t rows = logits.shape[0], shape[2] = {rows, rule->top_k};
    if (!take_array(args[1], "ids", &INT32, 1, 2, shape, &ids)) {
        PyBuffer_Release(&logits);
        return NULL;
    }
    for (Py_ssize_t first = 0, part; first < rows; first += part) {
        float weights[TOP_K_ROWS * ROUTE_MAX_TOP_K];
        part = rows - first < TOP_K_ROWS ? rows - first : TOP_K_ROWS;
        route_kernel->rows(rule, &call, &nothing_resident, &uncounted, (const float *)logits.buf + first * rule->num_experts,
                           (uint32_t)part, (int32_t *)ids.buf + first * rule->top_k, weights, &tally);
    }
    PyBuffer_Release(&logits);
    PyBuffer_Release(&ids);
    Py_RETURN_NONE;
}

/* foresee(logits, experts, weights, layer, policy, strength): see _core.pyi. Reads the arena, and writes nothing to it. */
static PyObject *router_foresee(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    RouterObject *router = (RouterObject *)self;
    const struct route_rule *rule = &router->rule;
    const struct arena *arena = owner_arena(router->arena);
    const struct route_boosts uncounted = {.keep = UINT64_MAX};
    uint64_t layer;
    struct batch_arrays batch;
    Py_buffer strengths = {.obj = NULL};
    struct route_call call;
    struct route_tally tally = {0};
    struct route_snapshot snapshot;
    PyObject *missing = NULL;
    if (!arena) return NULL;
    if (count != 6) return PyErr_Format(PyExc_TypeError, "expected 6 arguments, got %zd", count);
    if (!parse_indices(args + 3, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    if (!take_batch(router, args, &batch)) return NULL;
    if (!parse_call(router, args[4], args[5], batch.rows, &call, &strengths)) goto done;
    call.selection_bias = router_selection_bias(router, (uint32_t)layer);
    route_snapshot_take(&snapshot, arena, (uint32_t)layer, 1);
    uint64_t at_hand[ROUTE_WORDS], words[ROUTE_WORDS] = {0};
    memcpy(at_hand, snapshot.preferred, sizeof at_hand); /* in memory, or on the way */
    if (!router->prefer_loading) memcpy(snapshot.preferred, snapshot.resident, sizeof snapshot.preferred);
    tally.range = snapshot.range;
    route_kernel->rows(rule, &call, &snapshot, &uncounted, batch.logits.buf, (uint32_t)batch.rows, batch.experts.buf,
                       batch.weights.buf, &tally);
    for (Py_ssize_t i = 0; i < batch.rows * rule->top_k; i++) {
        uint32_t expert = (uint32_t)((int32_t *)batch.experts.buf)[i];
        if (!bit_test(at_hand, expert)) bit_set(words, expert);
    }
    missing = id_set(words, arena->mask_words);
done:
    if (strengths.obj) PyBuffer_Release(&strengths);
    release_batch(&batch);
    return missing;
}

/* ---- the type ---- */

static PyMethodDef router_methods[] = {
    {"route", FASTCALL(router_route),
     "route(logits, experts, weights, layer, policy, strength, epochs, prefetch)\n\n"
     "(missing, displaced, prefetch, lost_mass, changed) of logits [n, experts]; fills experts and weights [n, top_k]."},
    {"bind", FASTCALL(router_bind), "bind(logits, experts, weights, layer, policy, strength, epochs): a callable."},
    {"set_resident", FASTCALL(router_set_resident), "set_resident(layer, expert, resident)"},
    {"resident", router_resident, METH_O, "resident(layer): the ids whose bit is set."},
    {"top_k", FASTCALL(router_top_k),
     "top_k(logits f32[n, experts], ids i32[n, top_k], layer): the true top k, best first. Reads and counts nothing."},
    {"foresee", FASTCALL(router_foresee), "foresee(logits, experts, weights, layer, policy, strength): what route() would do."},
    {"select", FASTCALL(router_select), "select(scores f32[experts], ids i32[top_k]): the top k, best first."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef router_getset[] = {
    {"strength", router_get_strength, NULL, "What calls without policy and strength of their own use now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot router_slots[] = {
    {Py_tp_doc, "Router(arena, affinity, ...): the routing kernel on one arena; see route.h."},
    {Py_tp_init, router_init},
    {Py_tp_dealloc, router_dealloc},
    {Py_tp_methods, router_methods},
    {Py_tp_getset, router_getset},
    {0, NULL},
};

static PyType_Spec router_spec = {"hotset.shm._core.Router", sizeof(RouterObject), 0, Py_TPFLAGS_DEFAULT, router_slots};

/* Adds Affinity and Router to the module; `arena` is its Arena type. -1 with an exception. */
static inline int add_routing_types(PyObject *module, PyObject *arena) {
    choose_route_kernel();
    core_types.arena = (PyTypeObject *)arena;
    core_types.affinity = (PyTypeObject *)PyType_FromSpec(&affinity_spec);
    core_types.router = (PyTypeObject *)PyType_FromSpec(&router_spec);
    core_types.binding = (PyTypeObject *)PyType_FromSpec(&binding_spec);
    if (!core_types.affinity || !core_types.router || !core_types.binding) return -1;
    if (PyModule_AddObjectRef(module, "Affinity", (PyObject *)core_types.affinity) < 0) return -1;
    return PyModule_AddObjectRef(module, "Router", (PyObject *)core_types.router);
}

#endif
