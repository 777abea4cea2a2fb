/* hotset.shm._core.Router, and the callables made by its bind(). */
#ifndef HOTSET_BIND_ROUTING_H
#define HOTSET_BIND_ROUTING_H

#include "bind_affinity.h"
#include "histogram.h"
#include "route_batch.h"
#include "route_control.h"

typedef struct {
    PyObject_HEAD
    PyObject *arena, *affinity;
    uint32_t process;
    struct route_rule rule;
    uint32_t policy;                   /* of calls that name none */
    float strength[ROUTE_POLICIES];    /* by policy; the one of `policy` moves while `control` is enabled */
    struct route_control control;
    int prefer_loading, timing;
} RouterObject;

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

/* Above this many logits the GIL is released: it costs 34 ns, routing them some microseconds. */
#define ROUTE_GIL_LOGITS 16384u

/* The kernel that all routers of this process use. */
static const struct route_kernel *route_kernel;

/* Routes `rows` rows and accounts for them. 0 with an exception if the arena was closed meanwhile. */
static inline int router_run(RouterObject *router, uint32_t layer, const struct route_call *call,
                             enum route_epochs epochs, const float *logits, uint32_t rows, int32_t *ids, float *weights,
                             struct route_tally *tally) {
    struct arena *arena = owner_arena(router->arena);
    if (!arena) return 0;
    const struct route_rule *rule = &router->rule;
    struct route_context context = {arena, router->process, layer, rule, &((AffinityObject *)router->affinity)->law, epochs};
    struct route_boosts boosts = route_boosts(&context);
    struct route_snapshot snapshot;
    uint64_t begin = router->timing ? clock_nanoseconds() : 0, hits = 0;
    uint32_t room = epochs == EPOCH_PER_TOKEN ? AFFINITY_MAX_AGES : UINT32_MAX;
    route_snapshot_take(&snapshot, arena, layer, router->prefer_loading);
    route_tally_begin(tally, arena, &snapshot);
    for (uint32_t first = 0, part; first < rows; first += part) {
        struct route_call part_call = *call;
        part = rows - first < room ? rows - first : room;
        if (call->strengths) part_call.strengths = call->strengths + first;
        const float *part_logits = logits + (size_t)first * rule->num_experts;
        int32_t *part_ids = ids + (size_t)first * rule->top_k;
        float *part_weights = weights + (size_t)first * rule->top_k;
        uint64_t now = route_epoch(&context, part);
        if (part > 1) memset(tally->selections, 0, rule->num_experts * sizeof tally->selections[0]);
        if ((uint64_t)part * rule->num_experts >= ROUTE_GIL_LOGITS) {
            Py_BEGIN_ALLOW_THREADS
            route_kernel->rows(rule, &part_call, &snapshot, &boosts, part_logits, part, part_ids, part_weights, tally);
            Py_END_ALLOW_THREADS
            /* Counters and activations have one writer per process: they are written under the GIL. */
            if (!owner_arena(router->arena)) return 0;
        } else {
            route_kernel->rows(rule, &part_call, &snapshot, &boosts, part_logits, part, part_ids, part_weights, tally);
        }
        hits += route_account_selections(&context, now, part, part_ids, &snapshot, tally);
    }
    route_account_call(&context, rows, hits, &snapshot, tally);
    if (router->control.enabled && call->policy == router->policy)
        control_observe(&router->control, &router->strength[router->policy], hits, (uint64_t)rows * rule->top_k, rows,
                        tally->lost_mass);
    if (router->timing && rows)
        latency_record(arena, router->process, HISTOGRAM_ROUTING, clock_nanoseconds() - begin, rows);
    return 1;
}

static PyObject *id_set(const uint64_t *words, uint32_t count) {
    PyObject *ids = PyFrozenSet_New(NULL);
    for (uint32_t word = 0; ids && word < count; word++)
        for (uint64_t bits = words[word]; bits; bits &= bits - 1) {
            PyObject *id = PyLong_FromUnsignedLong(word * 64 + (uint32_t)__builtin_ctzll(bits));
            /* A new frozenset may still be filled: nobody else has seen it. */
            if (!id || PySet_Add(ids, id) < 0) {
                Py_XDECREF(id);
                Py_DECREF(ids);
                return NULL;
            }
            Py_DECREF(id);
        }
    return ids;
}

static int router_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    RouterObject *router = (RouterObject *)self;
    static char *names[] = {"arena", "affinity", "process", "top_k", "gating", "renormalize", "weight_scale",
                            "num_groups", "top_groups", "policy", "bonus", "range", "mass", "resnorm", "keep_top",
                            "prefetch_threshold", "prefer_loading", "timing", "adaptive", "target_hit_rate",
                            "max_lost_mass", "max_strength", NULL};
    PyObject *owner, *affinity;
    unsigned process, top_k, gating, num_groups, top_groups, policy, keep_top;
    int renormalize, prefer_loading, timing, adaptive;
    float weight_scale, bonus, range, mass, resnorm, prefetch_threshold, max_strength;
    double target_hit_rate, max_lost_mass;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!IIIpfIIIffffIfpppddf", names, core_types.arena, &owner,
                                     core_types.affinity, &affinity, &process, &top_k, &gating, &renormalize,
                                     &weight_scale, &num_groups, &top_groups, &policy, &bonus, &range, &mass, &resnorm,
                                     &keep_top, &prefetch_threshold, &prefer_loading, &timing, &adaptive, &target_hit_rate,
                                     &max_lost_mass, &max_strength))
        return -1;
    const struct arena *arena = arena_of(owner);
    if (!arena) return -1;
    uint32_t experts = arena->num_experts;
    const char *problem = process >= arena->num_processes                   ? "process is out of range"
                          : experts > ROUTE_MAX_EXPERTS                     ? "there are more than 1024 experts"
                          : top_k < 1 || top_k > experts || top_k > ROUTE_MAX_TOP_K ? "top_k is out of range"
                          : gating > GATING_SIGMOID || policy >= ROUTE_POLICIES ? "gating or policy is unknown"
                          : keep_top > top_k                                ? "keep_top exceeds top_k"
                          : num_groups < 1 || num_groups > ROUTE_MAX_GROUPS || experts % num_groups ||
                                  top_groups < 1 || top_groups > num_groups || top_groups > ROUTE_MAX_TOP_K ||
                                  experts / num_groups * top_groups < top_k
                              ? "the groups do not divide the experts, or leave fewer than top_k"
                              : NULL;
    if (problem) {
        PyErr_SetString(PyExc_ValueError, problem);
        return -1;
    }
    router->rule = (struct route_rule){experts, top_k, gating, renormalize || gating == GATING_TOP_K_SOFTMAX,
                                       weight_scale, num_groups, top_groups, keep_top, prefetch_threshold};
    router->control = (struct route_control){.enabled = adaptive, .target_hit_rate = target_hit_rate,
                                             .max_lost_mass = max_lost_mass, .maximum = max_strength};
    router->strength[POLICY_OFF] = 0;
    router->strength[POLICY_BONUS] = bonus;
    router->strength[POLICY_RANGE] = range;
    router->strength[POLICY_MASS] = mass;
    router->strength[POLICY_RESNORM] = resnorm;
    router->process = process;
    router->policy = policy;
    router->prefer_loading = prefer_loading;
    router->timing = timing;
    Py_INCREF(owner);
    Py_INCREF(affinity);
    Py_XDECREF(router->arena);
    Py_XDECREF(router->affinity);
    router->arena = owner;
    router->affinity = affinity;
    return 0;
}

static void router_dealloc(PyObject *self) {
    RouterObject *router = (RouterObject *)self;
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(router->arena);
    Py_XDECREF(router->affinity);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* The last arguments of route() and bind(): policy (or None), strength (None, a number, or one per row) and epochs.
 * `strengths` is opened, and must be released, if strength is an array. */
static int parse_call(const RouterObject *router, PyObject *policy, PyObject *strength, PyObject *epochs,
                      Py_ssize_t rows, struct route_call *call, enum route_epochs *mode, Py_buffer *strengths) {
    uint64_t v[2] = {router->policy, 0};
    if (policy != Py_None && !parse_indices(&policy, 1, 1, (const char *[]){"policy"}, (uint64_t[]){ROUTE_POLICIES}, v))
        return 0;
    if (!parse_indices(&epochs, 1, 1, (const char *[]){"epochs"}, (uint64_t[]){3}, v + 1)) return 0;
    *call = (struct route_call){.policy = (uint32_t)v[0], .strength = router->strength[v[0]]};
    *mode = (enum route_epochs)v[1];
    if (strength == Py_None) return 1;
    if (PyFloat_Check(strength) || PyLong_Check(strength)) {
        double value = PyFloat_AsDouble(strength);
        if (PyErr_Occurred()) return 0;
        if (!(value >= 0 && value < INFINITY)) {
            PyErr_SetString(PyExc_ValueError, "strength is negative or not finite, expected a number >= 0");
            return 0;
        }
        call->strength = (float)value;
        return 1;
    }
    if (!take_array(strength, "strength", &FLOAT32, 0, 1, &rows, strengths)) return 0;
    call->strengths = strengths->buf;
    return 1;
}

static PyObject *router_route(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    RouterObject *router = (RouterObject *)self;
    const struct arena *arena = owner_arena(router->arena);
    uint64_t v[2];
    if (!arena) return NULL;
    if (count != 8) return PyErr_Format(PyExc_TypeError, "expected 8 arguments, got %zd", count);
    PyObject *indices[2] = {args[3], args[7]};
    if (!parse_indices(indices, 2, 2, (const char *[]){"layer", "prefetch"}, (uint64_t[]){arena->num_layers, 2}, v))
        return NULL;
    Py_buffer logits, experts, weights, strengths = {.obj = NULL};
    struct route_call call;
    enum route_epochs epochs;
    struct route_tally tally;
    PyObject *answer = NULL;
    if (!take_array(args[0], "logits", &FLOAT32, 0, 2, (Py_ssize_t[]){ANY_LENGTH, router->rule.num_experts}, &logits))
        return NULL;
    Py_ssize_t rows = logits.shape[0], shape[2] = {rows, router->rule.top_k};
    if (!take_array(args[1], "experts", &INT32, 1, 2, shape, &experts)) goto release_logits;
    if (!take_array(args[2], "weights", &FLOAT32, 1, 2, shape, &weights)) goto release_experts;
    if (rows > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "logits has %zd rows, expected fewer than 2**31", rows);
        goto release_weights;
    }
    if (!parse_call(router, args[4], args[5], args[6], rows, &call, &epochs, &strengths)) goto release_weights;
    call.want_prefetch = (int)v[1];
    if (router_run(router, (uint32_t)v[0], &call, epochs, logits.buf, (uint32_t)rows, experts.buf, weights.buf, &tally))
        answer = Py_BuildValue("(NNNdK)", id_set(tally.missing, arena->mask_words),
                               id_set(tally.displaced, arena->mask_words), id_set(tally.prefetch, arena->mask_words),
                               tally.lost_mass, (unsigned long long)tally.changed);
    if (strengths.obj) PyBuffer_Release(&strengths);
release_weights:
    PyBuffer_Release(&weights);
release_experts:
    PyBuffer_Release(&experts);
release_logits:
    PyBuffer_Release(&logits);
    return answer;
}

/* ---- bound calls ---- */

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
    if (!binding->own_strength) call.strength = router->strength[call.policy];
    struct route_tally tally;
    const float *logits = (const float *)binding->logits.buf + row * router->rule.num_experts;
    if (!router_run(router, binding->layer, &call, binding->epochs, logits, (uint32_t)rows, binding->experts.buf,
                    binding->weights.buf, &tally))
        return NULL;
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
    if (!parse_call(router, args[4], args[5], args[6], rows, &binding->call, &binding->epochs, NULL)) goto done;
    bound = PyCFunction_New(&binding_method, (PyObject *)binding);
done:
    Py_DECREF((PyObject *)binding);
    return bound;
}

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

static PyObject *router_get_strength(PyObject *self, void *closure) {
    (void)closure;
    const RouterObject *router = (RouterObject *)self;
    return PyFloat_FromDouble(router->strength[router->policy]);
}

static PyMethodDef router_methods[] = {
    {"route", FASTCALL(router_route),
     "route(logits, experts, weights, layer, policy, strength, epochs, prefetch)\n\n"
     "(missing, displaced, prefetch, lost_mass, changed) of logits [n, experts]; fills experts and weights [n, top_k]."},
    {"bind", FASTCALL(router_bind), "bind(logits, experts, weights, layer, policy, strength, epochs): a callable."},
    {"set_resident", FASTCALL(router_set_resident), "set_resident(layer, expert, resident)"},
    {"resident", router_resident, METH_O, "resident(layer): the ids whose bit is set."},
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

static PyType_Slot binding_slots[] = {
    {Py_tp_doc, "The arrays of a bound call."},
    {Py_tp_dealloc, binding_dealloc},
    {0, NULL},
};

static PyType_Spec binding_spec = {"hotset.shm._core.Binding", sizeof(BindingObject), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, binding_slots};

/* ---- the choice of a kernel ---- */

static PyObject *core_route_kernels(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
    uint32_t count = route_kernels(kernels);
    PyObject *names = PyList_New(0);
    for (uint32_t i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(kernels[i]->name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *core_use_route_kernel(PyObject *module, PyObject *arg) {
    (void)module;
    const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
    uint32_t count = route_kernels(kernels);
    for (uint32_t i = 0; i < count; i++)
        if (PyUnicode_Check(arg) && PyUnicode_CompareWithASCIIString(arg, kernels[i]->name) == 0) {
            PyObject *previous = PyUnicode_FromString(route_kernel->name);
            route_kernel = kernels[i];
            return previous;
        }
    return PyErr_Format(PyExc_ValueError, "there is no routing kernel %R on this processor, see route_kernels()", arg);
}

#define ROUTING_FUNCTIONS                                                                                              \
    {"route_kernels", core_route_kernels, METH_NOARGS, "Names of the routing kernels that run here, best first."},      \
    {"use_route_kernel", core_use_route_kernel, METH_O, "All routers use this kernel now; the name of the last one."}

/* Adds Affinity and Router to the module; `arena` is its Arena type. -1 with an exception. */
static inline int add_routing_types(PyObject *module, PyObject *arena) {
    const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
    route_kernels(kernels);
    route_kernel = kernels[0];
    core_types.arena = (PyTypeObject *)arena;
    core_types.affinity = (PyTypeObject *)PyType_FromSpec(&affinity_spec);
    core_types.router = (PyTypeObject *)PyType_FromSpec(&router_spec);
    core_types.binding = (PyTypeObject *)PyType_FromSpec(&binding_spec);
    if (!core_types.affinity || !core_types.router || !core_types.binding) return -1;
    if (PyModule_AddObjectRef(module, "Affinity", (PyObject *)core_types.affinity) < 0) return -1;
    return PyModule_AddObjectRef(module, "Router", (PyObject *)core_types.router);
}

#endif
