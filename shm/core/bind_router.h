/* The object behind hotset.shm._core.Router: one process's rules and parameters on one arena. */
#ifndef HOTSET_BIND_ROUTER_H
#define HOTSET_BIND_ROUTER_H

#include "bind_affinity.h"
#include "route_control.h"
#include "route_kernel.h"

typedef struct {
    PyObject_HEAD
    PyObject *arena, *affinity;
    uint32_t process;
    struct route_rule rule;
    uint32_t policy;                   /* of calls that name none */
    float strength[ROUTE_POLICIES];    /* by policy; the one of `policy` moves while `control` is enabled */
    struct route_control control;
    int prefer_loading, timing;
    float *selection_bias; /* [layers][experts]; NULL: none */
} RouterObject;

/* A copy of `bias`, None or float32 [layers, experts]. 0 with an exception. */
static int router_take_bias(RouterObject *router, const struct arena *arena, uint32_t gating, PyObject *bias) {
    Py_buffer view;
    PyMem_Free(router->selection_bias);
    router->selection_bias = NULL;
    if (bias == Py_None) return 1;
    if (gating != GATING_SIGMOID) {
        PyErr_SetString(PyExc_ValueError, "selection_bias is given, which only a sigmoid gate has");
        return 0;
    }
    if (!take_array(bias, "selection_bias", &FLOAT32, 0, 2, (Py_ssize_t[]){arena->num_layers, arena->num_experts}, &view))
        return 0;
    router->selection_bias = PyMem_Malloc((size_t)view.len);
    if (router->selection_bias) memcpy(router->selection_bias, view.buf, (size_t)view.len);
    else PyErr_NoMemory();
    PyBuffer_Release(&view);
    return router->selection_bias != NULL;
}

/* Of one layer; NULL: none. */
static const float *router_selection_bias(const RouterObject *router, uint32_t layer) {
    return router->selection_bias ? router->selection_bias + (size_t)layer * router->rule.num_experts : NULL;
}

static int router_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    RouterObject *router = (RouterObject *)self;
    static char *names[] = {"arena", "affinity", "process", "top_k", "gating", "renormalize", "weight_scale",
                            "num_groups", "top_groups", "policy", "bonus", "range", "mass", "resnorm", "substitute",
                            "keep_top", "prefetch_threshold", "prefer_loading", "timing", "adaptive", "target_hit_rate",
                            "max_lost_mass", "max_strength", "selection_bias", NULL};
    PyObject *owner, *affinity, *bias = Py_None;
    unsigned process, top_k, gating, num_groups, top_groups, policy, keep_top;
    int renormalize, prefer_loading, timing, adaptive;
    float weight_scale, bonus, range, mass, resnorm, substitute, prefetch_threshold, max_strength;
    double target_hit_rate, max_lost_mass;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!IIIpfIIIfffffIfpppddf|O", names, core_types.arena, &owner,
                                     core_types.affinity, &affinity, &process, &top_k, &gating, &renormalize,
                                     &weight_scale, &num_groups, &top_groups, &policy, &bonus, &range, &mass, &resnorm,
                                     &substitute, &keep_top, &prefetch_threshold, &prefer_loading, &timing, &adaptive, &target_hit_rate,
                                     &max_lost_mass, &max_strength, &bias))
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
    if (!router_take_bias(router, arena, gating, bias)) return -1;
    router->rule = (struct route_rule){experts, top_k, gating, renormalize || gating == GATING_TOP_K_SOFTMAX,
                                       weight_scale, num_groups, top_groups, keep_top, prefetch_threshold};
    router->control = (struct route_control){.enabled = adaptive, .target_hit_rate = target_hit_rate,
                                             .max_lost_mass = max_lost_mass, .maximum = max_strength};
    router->strength[POLICY_OFF] = 0;
    router->strength[POLICY_BONUS] = bonus;
    router->strength[POLICY_RANGE] = range;
    router->strength[POLICY_MASS] = mass;
    router->strength[POLICY_RESNORM] = resnorm;
    router->strength[POLICY_SUBSTITUTE] = substitute;
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
    PyMem_Free(router->selection_bias);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *router_get_strength(PyObject *self, void *closure) {
    (void)closure;
    const RouterObject *router = (RouterObject *)self;
    return PyFloat_FromDouble(router->strength[router->policy]);
}

#endif
