/* hotset.workers.eviction._core.Cache: a simulated cache that a Policy keeps, one demand at a time. */
#ifndef HOTSET_BIND_CACHE_H
#define HOTSET_BIND_CACHE_H

#include "bind_policy.h"

typedef struct {
    PyObject_HEAD
    PyObject *policy; /* NULL until __init__ */
    struct replay_pools pools;
} CacheObject;

static PyTypeObject *cache_policy_type;

static int cache_type_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    CacheObject *cache = (CacheObject *)self;
    static char *names[] = {"policy", "slots", "shared", NULL};
    PyObject *object;
    unsigned slots;
    int shared = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!I|p", names, cache_policy_type, &object, &slots, &shared))
        return -1;
    const struct policy *policy = policy_of(object);
    if (!policy || !slots_in_range(policy, slots, shared)) return -1;
    if (cache->policy) {
        PyErr_SetString(PyExc_ValueError, "the cache exists already");
        return -1;
    }
    if (!replay_pools_init(&cache->pools, policy, slots, shared)) {
        replay_pools_free(&cache->pools);
        PyErr_NoMemory();
        return -1;
    }
    Py_INCREF(object);
    cache->policy = object;
    return 0;
}

static void cache_type_dealloc(PyObject *self) {
    CacheObject *cache = (CacheObject *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (cache->policy) replay_pools_free(&cache->pools);
    Py_XDECREF(cache->policy);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Bit e of `words` is expert e of the layer. */
static void cache_mask(const struct replay_pools *pools, const struct policy *policy, uint32_t layer, uint64_t *words) {
    int shared = replay_is_shared(pools);
    const struct pool *pool = &pools->pools[shared ? 0 : layer];
    const uint32_t *place = pool->place + (shared ? (size_t)layer * policy->num_experts : 0);
    for (uint32_t e = 0; e < policy->num_experts; e++)
        words[e / 64] = (e % 64 ? words[e / 64] : 0) | (uint64_t)(place[e] != 0) << (e % 64);
}

/* Copies the distinct ones of `count` ids to `experts`. Returns how many, or -1 with an exception. */
static int distinct_experts(const int32_t *ids, Py_ssize_t count, uint32_t num_experts, uint16_t *experts) {
    uint64_t seen[TD_MAX_EXPERTS / 64] = {0};
    int distinct = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= num_experts) {
            PyErr_Format(PyExc_ValueError, "an expert id is %d, expected 0 <= id < %u", ids[i], num_experts);
            return -1;
        }
        uint64_t bit = UINT64_C(1) << (ids[i] % 64);
        if (!(seen[ids[i] / 64] & bit)) experts[distinct++] = (uint16_t)ids[i];
        seen[ids[i] / 64] |= bit;
    }
    return distinct;
}

static PyObject *cache_type_step(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    CacheObject *cache = (CacheObject *)self;
    Py_buffer record = {0}, used = {0}, mask = {0};
    uint16_t experts[TD_MAX_EXPERTS];
    PyObject *answer = NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    struct policy *policy = cache->policy ? policy_of(cache->policy) : NULL;
    if (!policy) {
        PyErr_SetString(PyExc_ValueError, "__init__ has not been called");
        return NULL;
    }
    Py_ssize_t shape[2] = {policy->num_layers, (policy->num_experts + 63) / 64};
    if (!take_records(args[0], policy, &record)) return NULL;
    if (!take_array(args[1], "used", &INT32, 0, 2, (Py_ssize_t[]){ANY_LENGTH, ANY_LENGTH}, &used)) goto done;
    if (!take_array(args[2], "mask", &UINT64, 1, 2, shape, &mask)) goto done;
    const uint16_t *words = record.buf;
    if (!record.shape[0] || words[DEMAND_LENGTH] != record.shape[0]) {
        PyErr_SetString(PyExc_ValueError, "expected one record");
        goto done;
    }
    int distinct = distinct_experts(used.buf, used.shape[0] * used.shape[1], policy->num_experts, experts);
    if (distinct < 0) goto done;
    struct replay_result result = {0};
    replay_record(policy, words, NULL, &(struct used_set){experts, (uint32_t)distinct}, &cache->pools, &result);
    for (uint32_t layer = 0; layer < policy->num_layers; layer++)
        cache_mask(&cache->pools, policy, layer, (uint64_t *)mask.buf + layer * shape[1]);
    answer = Py_BuildValue("KK", (unsigned long long)result.hits, (unsigned long long)result.misses);
done:
    if (mask.obj) PyBuffer_Release(&mask);
    if (used.obj) PyBuffer_Release(&used);
    PyBuffer_Release(&record);
    return answer;
}

static PyMethodDef cache_methods[] = {
    {"step", (PyCFunction)(void (*)(void))cache_type_step, METH_FASTCALL,
     "step(record u16[n], used i32[rows, k], mask u64[layers, words]) -> (hits, misses) of what was used.\n\n"
     "The policy learns from the record, what the gate chose; the mask then says what is resident."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_doc, "Cache(policy, slots, shared=False): empty; slots per layer, or of all layers together."},
    {Py_tp_init, cache_type_init},
    {Py_tp_dealloc, cache_type_dealloc},
    {Py_tp_methods, cache_methods},
    {0, NULL},
};

static PyType_Spec cache_spec = {"hotset.workers.eviction._core.Cache", sizeof(CacheObject), 0, Py_TPFLAGS_DEFAULT,
                                 cache_slots};

#endif
