/* Router.route(): a call from its arguments to its answer, and the run that it shares with bound calls. */
#ifndef HOTSET_BIND_ROUTE_H
#define HOTSET_BIND_ROUTE_H

#include "bind_route_kernel.h"
#include "bind_router.h"
#include "histogram.h"
#include "route_batch.h"

/* Above this many logits the GIL is released: it costs 34 ns, routing them some microseconds. */
#define ROUTE_GIL_LOGITS 16384u

/* What the rows of a run have in common, and their arrays. */
struct route_run {
    struct route_context context;
    struct route_boosts boosts;
    struct route_snapshot snapshot;
    const float *logits;
    int32_t *ids;
    float *weights;
    struct route_tally *tally;
};

/* Routes `count` rows from `first` on, as one epoch range, and accounts for their selections: adds to `hits`. 0 with an
 * exception if the arena was closed meanwhile. */
static inline int run_rows(const RouterObject *router, const struct route_run *run, const struct route_call *call,
                           uint32_t first, uint32_t count, uint64_t *hits) {
    const struct route_rule *rule = &router->rule;
    const float *logits = run->logits + (size_t)first * rule->num_experts;
    int32_t *ids = run->ids + (size_t)first * rule->top_k;
    float *weights = run->weights + (size_t)first * rule->top_k;
    uint64_t now = route_epoch(&run->context, count);
    if (count > 1) memset(run->tally->selections, 0, rule->num_experts * sizeof run->tally->selections[0]);
    if ((uint64_t)count * rule->num_experts >= ROUTE_GIL_LOGITS) {
        Py_BEGIN_ALLOW_THREADS
        route_kernel->rows(rule, call, &run->snapshot, &run->boosts, logits, count, ids, weights, run->tally);
        Py_END_ALLOW_THREADS
        /* Counters and activations have one writer per process: they are written under the GIL. */
        if (!owner_arena(router->arena)) return 0;
    } else {
        route_kernel->rows(rule, call, &run->snapshot, &run->boosts, logits, count, ids, weights, run->tally);
    }
    *hits += route_account_selections(&run->context, now, count, ids, &run->snapshot, run->tally);
    return 1;
}

/* Routes `rows` rows and accounts for them; adds to `hits`. 0 with an exception if the arena was closed meanwhile. */
static inline int router_run(RouterObject *router, uint32_t layer, const struct route_call *call,
                             enum route_epochs epochs, const float *logits, uint32_t rows, int32_t *ids, float *weights,
                             struct route_tally *tally, uint64_t *hits) {
    struct arena *arena = owner_arena(router->arena);
    if (!arena) return 0;
    uint64_t begin = router->timing ? clock_nanoseconds() : 0;
    struct route_run run; /* field by field: clearing the snapshot would cost more than filling it */
    run.logits = logits;
    run.ids = ids;
    run.weights = weights;
    run.tally = tally;
    run.context = (struct route_context){arena, router->process, layer, &router->rule,
                                         &((AffinityObject *)router->affinity)->law, epochs};
    run.boosts = route_boosts(&run.context);
    route_snapshot_take(&run.snapshot, arena, layer, router->prefer_loading);
    route_tally_begin(tally, arena, &run.snapshot);
    uint32_t room = epochs == EPOCH_PER_TOKEN ? AFFINITY_MAX_AGES : UINT32_MAX;
    if (rows <= room) {
        if (rows && !run_rows(router, &run, call, 0, rows, hits)) return 0;
    } else {
        struct route_call part = *call;
        for (uint32_t first = 0, count; first < rows; first += count) {
            count = rows - first < room ? rows - first : room;
            if (call->strengths) part.strengths = call->strengths + first;
            if (!run_rows(router, &run, &part, first, count, hits)) return 0;
        }
    }
    route_account_call(&run.context, rows, *hits, &run.snapshot, tally);
    if (router->control.enabled && call->policy == router->policy)
        control_observe(&router->control, &router->strength[router->policy], *hits, (uint64_t)rows * router->rule.top_k,
                        rows, tally->lost_mass);
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

static int parse_epochs(PyObject *epochs, enum route_epochs *mode) {
    uint64_t v;
    if (!parse_indices(&epochs, 1, 1, (const char *[]){"epochs"}, (uint64_t[]){3}, &v)) return 0;
    *mode = (enum route_epochs)v;
    return 1;
}

/* Policy (or None) and strength (None, a number, or one per row) of route(), bind() and foresee(). `strengths` is opened,
 * and must be released, if strength is an array. */
static int parse_call(const RouterObject *router, PyObject *policy, PyObject *strength, Py_ssize_t rows,
                      struct route_call *call, Py_buffer *strengths) {
    uint64_t v = router->policy;
    if (policy != Py_None && !parse_indices(&policy, 1, 1, (const char *[]){"policy"}, (uint64_t[]){ROUTE_POLICIES}, &v))
        return 0;
    *call = (struct route_call){.policy = (uint32_t)v, .strength = router->strength[v]};
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

/* The first arguments of route() and foresee(): logits, and where experts and weights go. */
struct batch_arrays {
    Py_buffer logits, experts, weights;
    Py_ssize_t rows;
};

static void release_batch(struct batch_arrays *batch) {
    PyBuffer_Release(&batch->weights); /* those that are not open are passed over */
    PyBuffer_Release(&batch->experts);
    PyBuffer_Release(&batch->logits);
}

/* 0 with an exception, and then nothing is open. */
static int take_batch(const RouterObject *router, PyObject *const *args, struct batch_arrays *batch) {
    Py_ssize_t shape[2] = {ANY_LENGTH, router->rule.num_experts};
    *batch = (struct batch_arrays){.rows = 0};
    if (!take_array(args[0], "logits", &FLOAT32, 0, 2, shape, &batch->logits)) return 0;
    shape[0] = batch->rows = batch->logits.shape[0];
    shape[1] = router->rule.top_k;
    if (take_array(args[1], "experts", &INT32, 1, 2, shape, &batch->experts) &&
        take_array(args[2], "weights", &FLOAT32, 1, 2, shape, &batch->weights)) {
        if (batch->rows <= INT32_MAX) return 1;
        PyErr_Format(PyExc_ValueError, "logits has %zd rows, expected fewer than 2**31", batch->rows);
    }
    release_batch(batch);
    return 0;
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
    struct batch_arrays batch;
    Py_buffer strengths = {.obj = NULL};
    struct route_call call;
    enum route_epochs epochs;
    struct route_tally tally;
    uint64_t hits = 0;
    PyObject *answer = NULL;
    if (!take_batch(router, args, &batch)) return NULL;
    if (!parse_call(router, args[4], args[5], batch.rows, &call, &strengths) || !parse_epochs(args[6], &epochs)) goto done;
    call.want_prefetch = (int)v[1];
    call.selection_bias = router_selection_bias(router, (uint32_t)v[0]);
    if (router_run(router, (uint32_t)v[0], &call, epochs, batch.logits.buf, (uint32_t)batch.rows, batch.experts.buf,
                   batch.weights.buf, &tally, &hits))
        answer = Py_BuildValue("(NNNdK)", id_set(tally.missing, arena->mask_words),
                               id_set(tally.displaced, arena->mask_words), id_set(tally.prefetch, arena->mask_words),
                               tally.lost_mass, (unsigned long long)tally.changed);
done:
    if (strengths.obj) PyBuffer_Release(&strengths);
    release_batch(&batch);
    return answer;
}

#endif
