/* Arena methods for what is measured: latencies, the rows of all processes added up, the norms of experts' outputs. */
#ifndef HOTSET_BIND_METRICS_H
#define HOTSET_BIND_METRICS_H

#include "bind_arrays.h"
#include "expert_norm.h"
#include "histogram.h"

static PyObject *arena_record_latency(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[3];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 3, (const char *[]){"process", "histogram", "nanoseconds"},
                       (uint64_t[]){arena->num_processes, HISTOGRAM_COUNT, UINT64_C(1) << 62}, v))
        return NULL;
    latency_record(arena, (uint32_t)v[0], (enum histogram)v[1], v[2], 1);
    Py_RETURN_NONE;
}

static PyObject *arena_counter_totals(PyObject *self, PyObject *out) {
    struct arena *arena = arena_of(self);
    Py_buffer view;
    if (!arena || !take_array(out, "out", &UINT64, 1, 1, (Py_ssize_t[]){ARENA_COUNTERS}, &view)) return NULL;
    uint64_t *totals = view.buf;
    for (uint32_t counter = 0; counter < ARENA_COUNTERS; counter++)
        totals[counter] = counter_total(arena, (enum counter)counter);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *arena_histogram_totals(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t histogram;
    Py_buffer view;
    if (!arena) return NULL;
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    if (!parse_indices(args, 1, 1, (const char *[]){"histogram"}, (uint64_t[]){HISTOGRAM_COUNT}, &histogram)) return NULL;
    if (!take_array(args[1], "out", &UINT64, 1, 1, (Py_ssize_t[]){ARENA_BUCKETS}, &view)) return NULL;
    uint64_t *totals = view.buf;
    memset(totals, 0, ARENA_BUCKETS * sizeof *totals);
    for (uint32_t process = 0; process < arena->num_processes; process++) {
        const atomic_u64 *row = histogram_row(arena, process, (enum histogram)histogram);
        for (uint32_t bucket = 0; bucket < ARENA_BUCKETS; bucket++) totals[bucket] += load_relaxed(&row[bucket]);
    }
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *arena_activation_totals(PyObject *self, PyObject *out) {
    struct arena *arena = arena_of(self);
    Py_buffer view;
    if (!arena) return NULL;
    Py_ssize_t shape[2] = {arena->num_layers, arena->num_experts};
    if (!take_array(out, "out", &UINT64, 1, 2, shape, &view)) return NULL;
    uint64_t *totals = view.buf;
    memset(totals, 0, (size_t)view.len);
    for (uint32_t process = 0; process < arena->num_processes; process++)
        for (uint32_t layer = 0; layer < arena->num_layers; layer++) {
            const atomic_u64 *row = activation_row(arena, process, layer);
            for (uint32_t expert = 0; expert < arena->num_experts; expert++)
                totals[(size_t)layer * arena->num_experts + expert] += load_relaxed(&row[expert]);
        }
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *arena_expert_norm(PyObject *self, PyObject *arg) {
    struct arena *arena = arena_of(self);
    uint64_t layer;
    if (!arena) return NULL;
    if (!parse_indices(&arg, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;
    return PyFloat_FromDouble(expert_norm(arena, (uint32_t)layer));
}

static PyObject *arena_note_expert_norm(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    if (!arena) return NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    PyObject *indices[2] = {args[0], args[2]};
    if (!parse_indices(indices, 2, 2, (const char *[]){"layer", "rows"}, (uint64_t[]){arena->num_layers, UINT32_MAX}, v))
        return NULL;
    double mean = PyFloat_AsDouble(args[1]);
    if (PyErr_Occurred()) return NULL;
    expert_norm_update(arena, (uint32_t)v[0], (float)mean, v[1]);
    Py_RETURN_NONE;
}

#define METRICS_METHODS                                                                                                \
    {"record_latency", FASTCALL(arena_record_latency), "record_latency(process, histogram, nanoseconds)"},             \
    {"counter_totals", arena_counter_totals, METH_O, "counter_totals(out u64[COUNTERS]): over all processes."},        \
    {"histogram_totals", FASTCALL(arena_histogram_totals), "histogram_totals(histogram, out u64[BUCKETS])."},          \
    {"activation_totals", arena_activation_totals, METH_O, "activation_totals(out u64[layers, experts])."}, \
    {"expert_norm", arena_expert_norm, METH_O, "expert_norm(layer): running mean of its outputs' norms; 0 is unknown."}, \
    {"note_expert_norm", FASTCALL(arena_note_expert_norm), "note_expert_norm(layer, mean, rows): moves it."}

#endif
