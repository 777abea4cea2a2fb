/* hotset.workers.eviction._core: the types Policy and Cache over policy.h and replay.h; see _core.pyi. */
#include "bind_cache.h"
#include "bind_victims.h"

static int policy_type_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    PolicyObject *object = (PolicyObject *)self;
    static char *names[] = {"num_layers", "num_experts", "num_streams", "base", "affinity_weight", "admission",
                            "slots_per_layer", NULL};
    unsigned layers, experts, streams, base, admission;
    double weight, slots;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "IIIIdId", names, &layers, &experts, &streams, &base, &weight,
                                     &admission, &slots))
        return -1;
    if (object->ready) {
        PyErr_SetString(PyExc_ValueError, "the policy exists already");
        return -1;
    }
    if (!in_range("num_layers", layers, 1, 0xFFFF) || !in_range("num_experts", experts, 1, TD_MAX_EXPERTS) ||
        !in_range("num_streams", streams, 1, DEMAND_NO_STREAM - 1) || !in_range("base", base, 0, POLICY_BASES - 1) ||
        !in_range("admission", admission, 0, ADMISSIONS - 1))
        return -1;
    if (!(weight >= 0 && weight <= 1 && slots > 0)) {
        PyErr_SetString(PyExc_ValueError, "expected 0 <= affinity_weight <= 1 and slots_per_layer > 0");
        return -1;
    }
    object->policy = (struct policy){.num_layers = layers, .num_experts = experts, .num_streams = streams,
                                     .base = base, .admission = admission, .affinity_weight = weight,
                                     .slots_per_layer = slots};
    if (!policy_init(&object->policy)) {
        policy_free(&object->policy);
        PyErr_NoMemory();
        return -1;
    }
    object->ready = 1;
    return 0;
}

static void policy_type_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (((PolicyObject *)self)->ready) policy_free(&((PolicyObject *)self)->policy);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *policy_type_observe(PyObject *self, PyObject *argument) {
    struct policy *policy = policy_of(self);
    Py_buffer view;
    if (!policy || !take_records(argument, policy, &view)) return NULL;
    const uint16_t *words = view.buf;
    for (Py_ssize_t at = 0, end; at < view.shape[0]; at = end) {
        end = at + words[at + DEMAND_LENGTH];
        policy_observe(policy, words + at, end < view.shape[0] ? words + end : NULL);
    }
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *policy_type_values(PyObject *self, PyObject *argument) {
    struct policy *policy = policy_of(self);
    Py_buffer view;
    if (!policy) return NULL;
    Py_ssize_t shape[2] = {policy->num_layers, policy->num_experts};
    if (!take_array(argument, "values", &FLOAT64, 1, 2, shape, &view)) return NULL;
    policy_worth(policy, view.buf);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *policy_type_seed(PyObject *self, PyObject *argument) {
    struct policy *policy = policy_of(self);
    Py_buffer view;
    if (!policy) return NULL;
    Py_ssize_t shape[2] = {policy->num_layers, policy->num_experts};
    if (!take_array(argument, "scores", &FLOAT64, 0, 2, shape, &view)) return NULL;
    policy_seed_affinity(policy, view.buf);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *policy_type_last_used(PyObject *self, PyObject *argument) {
    struct policy *policy = policy_of(self);
    Py_buffer view;
    if (!policy) return NULL;
    Py_ssize_t shape[2] = {policy->num_layers, policy->num_experts};
    if (!take_array(argument, "out", &UINT64, 1, 2, shape, &view)) return NULL;
    memcpy(view.buf, policy->last_used, (size_t)view.len);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *policy_type_estimates(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct policy *policy = policy_of(self);
    uint64_t place[2];
    Py_buffer view;
    if (!policy) return NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    if (policy->base != POLICY_TD) return PyErr_Format(PyExc_ValueError, "only a td policy estimates");
    if (!parse_indices(args, 2, 2, (const char *[]){"stream", "layer"},
                       (uint64_t[]){policy->num_streams, policy->num_layers}, place))
        return NULL;
    if (!take_array(args[2], "out", &FLOAT32, 1, 1, (Py_ssize_t[]){policy->num_experts}, &view)) return NULL;
    memcpy(view.buf, policy->td.estimate + (place[0] * policy->num_layers + place[1]) * policy->td.stride,
           (size_t)view.len);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

/* Copies the weights out, or in: sets u8 [layers, sets, experts, bytes of a row], traits f32 [layers, traits, stride]. */
static int copy_learned(struct policy *policy, PyObject *sets, PyObject *traits, int out) {
    struct td *td = &policy->td;
    Py_ssize_t set_shape[] = {td->num_layers, TD_SETS, td->num_experts, td->row_nbytes};
    Py_ssize_t trait_shape[] = {td->num_layers, TD_TRAITS, td->stride};
    Py_buffer set_view, trait_view;
    if (policy->base != POLICY_TD) {
        PyErr_SetString(PyExc_ValueError, "only a td policy learns");
        return 0;
    }
    if (!take_array(sets, "sets", &BYTES, out, 4, set_shape, &set_view)) return 0;
    if (!take_array(traits, "traits", &FLOAT32, out, 3, trait_shape, &trait_view)) {
        PyBuffer_Release(&set_view);
        return 0;
    }
    memcpy(out ? set_view.buf : td->set_weights, out ? td->set_weights : set_view.buf, (size_t)set_view.len);
    memcpy(out ? trait_view.buf : td->trait_weights, out ? td->trait_weights : trait_view.buf, (size_t)trait_view.len);
    PyBuffer_Release(&set_view);
    PyBuffer_Release(&trait_view);
    return 1;
}

static PyObject *policy_type_learned(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct policy *policy = policy_of(self);
    if (!policy) return NULL;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    if (!copy_learned(policy, args[0], args[1], 1)) return NULL;
    Py_RETURN_NONE;
}

static PyObject *policy_type_set_learned(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct policy *policy = policy_of(self);
    if (!policy) return NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    int leads = PyObject_IsTrue(args[2]);
    if (leads < 0 || !copy_learned(policy, args[0], args[1], 0)) return NULL;
    policy_lead(policy, leads);
    Py_RETURN_NONE;
}

static PyObject *policy_type_kept(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct policy *policy = policy_of(self);
    if (!policy) return NULL;
    int keeps = policy->count && policy_kept(policy, policy_td_leads(policy));
    PyObject *kept = PyList_New(0);
    for (uint32_t i = 0; kept && keeps && i < policy->count; i++) {
        PyObject *id = PyLong_FromUnsignedLong(policy->layer * policy->num_experts + policy->experts[i]);
        if (!id || PyList_Append(kept, id) < 0) Py_CLEAR(kept);
        Py_XDECREF(id);
    }
    return kept;
}

static PyObject *policy_type_forget_streams(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct policy *policy = policy_of(self);
    if (!policy) return NULL;
    if (policy->base == POLICY_TD) td_forget_streams(&policy->td);
    Py_RETURN_NONE;
}

static PyObject *replay(PyObject *self, PyObject *args, PyObject *kwargs, int clairvoyant) {
    struct policy *policy = policy_of(self);
    static char *names[] = {"records", "slots", "shared", NULL};
    PyObject *records;
    unsigned slots;
    int shared = 0;
    if (!policy) return NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OI|p", names, &records, &slots, &shared)) return NULL;
    if (!slots_in_range(policy, slots, shared)) return NULL;
    Py_buffer view;
    if (!take_records(records, policy, &view)) return NULL;
    struct replay_pools pools;
    struct replay_result result = {0};
    int done;
    Py_BEGIN_ALLOW_THREADS
    done = replay_pools_init(&pools, policy, slots, shared);
    if (done && clairvoyant) done = replay_min(policy, view.buf, (size_t)view.shape[0], &pools, &result);
    else if (done) replay_policy(policy, view.buf, (size_t)view.shape[0], &pools, &result);
    replay_pools_free(&pools);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&view);
    if (!done) return PyErr_NoMemory();
    return Py_BuildValue("KKK", (unsigned long long)result.events, (unsigned long long)result.hits,
                         (unsigned long long)result.misses);
}

static PyObject *policy_type_replay(PyObject *self, PyObject *args, PyObject *kwargs) {
    return replay(self, args, kwargs, 0);
}

static PyObject *policy_type_replay_min(PyObject *self, PyObject *args, PyObject *kwargs) {
    return replay(self, args, kwargs, 1);
}

static PyObject *policy_get_crowd(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    return policy ? PyFloat_FromDouble(policy_crowd(policy)) : NULL;
}

static PyObject *policy_get_steps(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    return policy ? PyLong_FromUnsignedLongLong(policy->steps) : NULL;
}

static PyObject *policy_get_learns(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    return policy ? PyBool_FromLong(policy->base == POLICY_TD) : NULL;
}

static PyObject *policy_get_learned_shapes(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    if (!policy) return NULL;
    const struct td *td = &policy->td;
    return Py_BuildValue("(IIII)(III)", td->num_layers, TD_SETS, td->num_experts, td->row_nbytes, td->num_layers,
                         TD_TRAITS, td->stride);
}

static PyObject *policy_get_floor(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    return policy ? PyLong_FromUnsignedLong(policy_floor(policy)) : NULL;
}

static PyObject *policy_get_td_leads(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    return policy ? PyBool_FromLong(policy_td_leads(policy)) : NULL;
}

static PyObject *policy_get_divergences(PyObject *self, void *closure) {
    (void)closure;
    struct policy *policy = policy_of(self);
    return policy ? PyLong_FromUnsignedLongLong(policy->td.divergences) : NULL;
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))(function), METH_VARARGS | METH_KEYWORDS
#define POSITIONAL(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef policy_methods[] = {
    {"observe", policy_type_observe, METH_O, "observe(records u16[n]): what the steps used."},
    {"values", policy_type_values, METH_O, "values(out f64[layers, experts]) now: the least goes first."},
    {"last_used", policy_type_last_used, METH_O, "last_used(out u64[layers, experts]): demand numbers, 0 is never."},
    {"victims", POSITIONAL(policy_type_victims), "victims(experts i64[slots], among, newcomer, most): see _core.pyi."},
    {"kept", policy_type_kept, METH_NOARGS, "kept(): ids that the latest demand does not let go, because it is admitted."},
    {"seed_affinity", policy_type_seed, METH_O, "seed_affinity(scores f64[layers, experts]): from an earlier run."},
    {"forget_streams", policy_type_forget_streams, METH_NOARGS, "forget_streams(): after a gap in the demands."},
    {"estimates", POSITIONAL(policy_type_estimates), "estimates(stream, layer, out f32[experts]) of a td policy."},
    {"learned", POSITIONAL(policy_type_learned), "learned(out u8[sets], out f32[traits]): a td policy's weights."},
    {"set_learned", POSITIONAL(policy_type_set_learned), "set_learned(sets, traits, leads): from an earlier run."},
    {"replay", KEYWORDS(policy_type_replay), "replay(records, slots, shared=False) -> (events, hits, misses)."},
    {"replay_min", KEYWORDS(policy_type_replay_min), "replay_min(records, slots, shared=False): Belady's MIN."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef policy_getset[] = {
    {"crowd", policy_get_crowd, NULL, "r: distinct experts per step / slots per layer, lately.", NULL},
    {"steps", policy_get_steps, NULL, "Demands observed, of all layers.", NULL},
    {"learns", policy_get_learns, NULL, "Whether this is td.", NULL},
    {"learned_shapes", policy_get_learned_shapes, NULL, "Of td's weights: sets u8, traits f32.", NULL},
    {"floor", policy_get_floor, NULL, "Experts that a layer keeps of a shared pool as long as others have more.", NULL},
    {"td_leads", policy_get_td_leads, NULL, "Whether the learned values decide, and not the guard's affinity.", NULL},
    {"divergences", policy_get_divergences, NULL, "How often a layer's weights were thrown away.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot policy_slots[] = {
    {Py_tp_doc, "Policy(num_layers, num_experts, num_streams, base, affinity_weight, admission, slots_per_layer)."},
    {Py_tp_init, policy_type_init},
    {Py_tp_dealloc, policy_type_dealloc},
    {Py_tp_methods, policy_methods},
    {Py_tp_getset, policy_getset},
    {0, NULL},
};

static PyType_Spec policy_spec = {"hotset.workers.eviction._core.Policy", sizeof(PolicyObject), 0, Py_TPFLAGS_DEFAULT,
                                  policy_slots};

static int core_exec(PyObject *module) {
    PyObject *policy = PyType_FromSpec(&policy_spec), *cache = PyType_FromSpec(&cache_spec);
    if (!policy || PyModule_AddObjectRef(module, "Policy", policy) < 0) return -1;
    if (!cache || PyModule_AddObjectRef(module, "Cache", cache) < 0) return -1;
    cache_policy_type = (PyTypeObject *)policy; /* keeps the reference: the type lives as long as the process */
    Py_DECREF(cache);
    return 0;
}

static PyModuleDef_Slot core_slots[] = {{Py_mod_exec, core_exec}, {0, NULL}};

static struct PyModuleDef core_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "hotset.workers.eviction._core",
    .m_doc = "Eviction policies and their replay.",
    .m_slots = core_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_module); }
