/* Methods of Arena for pins, requests and waiting: residency.h and futex.h, with their arguments checked. What the pager
 * does with slots is in bind_slots.h. */
#ifndef HOTSET_BIND_RESIDENCY_H
#define HOTSET_BIND_RESIDENCY_H

#include "futex.h"
#include "module.h"
#include "residency.h"

static inline uint64_t expert_limit(const struct arena *arena) {
    return (uint64_t)arena->num_layers * arena->num_experts;
}

#define FASTCALL(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

#define EXPERT_ARGUMENT                                                            \
    struct arena *arena = arena_of(self);                                          \
    uint64_t id;                                                                   \
    if (!arena) return NULL;                                                       \
    if (!parse_indices(&arg, 1, 1, (const char *[]){"expert id"}, (uint64_t[]){expert_limit(arena)}, &id)) return NULL;

#define SLOT_ARGUMENT                                                              \
    struct arena *arena = arena_of(self);                                          \
    uint64_t slot;                                                                 \
    if (!arena) return NULL;                                                       \
    if (!parse_indices(&arg, 1, 1, (const char *[]){"slot"}, (uint64_t[]){arena->num_slots}, &slot)) return NULL;

#define LAYER_ARGUMENT                                                             \
    struct arena *arena = arena_of(self);                                          \
    uint64_t layer;                                                                \
    if (!arena) return NULL;                                                       \
    if (!parse_indices(&arg, 1, 1, (const char *[]){"layer"}, (uint64_t[]){arena->num_layers}, &layer)) return NULL;

static PyObject *arena_want(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[3];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 3, (const char *[]){"process", "pin", "expert id"},
                       (uint64_t[]){arena->num_processes, arena->pins_per_process, expert_limit(arena)}, v))
        return NULL;
    pin_set(arena, (uint32_t)v[0], (uint32_t)v[1], (uint32_t)v[2]);
    return PyLong_FromLong(residency_find(arena, (uint32_t)v[2]));
}

static PyObject *arena_unpin(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 2, (const char *[]){"process", "pin"},
                       (uint64_t[]){arena->num_processes, arena->pins_per_process}, v))
        return NULL;
    pin_clear(arena, (uint32_t)v[0], (uint32_t)v[1]);
    Py_RETURN_NONE;
}

static PyObject *arena_unpin_all(PyObject *self, PyObject *arg) {
    struct arena *arena = arena_of(self);
    uint64_t process;
    if (!arena) return NULL;
    if (!parse_indices(&arg, 1, 1, (const char *[]){"process"}, (uint64_t[]){arena->num_processes}, &process)) return NULL;
    long cleared = 0;
    for (uint32_t pin = 0; pin < arena->pins_per_process; pin++)
        if (load_relaxed(&pin_row(arena, (uint32_t)process)[pin])) {
            pin_clear(arena, (uint32_t)process, pin);
            cleared++;
        }
    return PyLong_FromLong(cleared);
}

static PyObject *arena_pinned(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    return PyBool_FromLong(is_pinned(arena, (uint32_t)id));
}

static PyObject *arena_pin_for_user(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 2, (const char *[]){"expert id", "pinned"},
                       (uint64_t[]){expert_limit(arena), 2}, v))
        return NULL;
    user_pin_put(arena, (uint32_t)v[0], (int)v[1]);
    Py_RETURN_NONE;
}

static PyObject *arena_find(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    return PyLong_FromLong(residency_find(arena, (uint32_t)id));
}

static PyObject *arena_request_urgent(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    return PyBool_FromLong(request_set(arena, arena->urgent_mask, (uint32_t)id));
}

static PyObject *arena_request_prefetch(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    return PyBool_FromLong(request_set(arena, arena->prefetch_mask, (uint32_t)id));
}

static PyObject *arena_requested(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 2, (const char *[]){"expert id", "urgent"},
                       (uint64_t[]){expert_limit(arena), 2}, v))
        return NULL;
    return PyBool_FromLong(mask_test(arena, v[1] ? arena->urgent_mask : arena->prefetch_mask, (uint32_t)v[0]));
}

static PyObject *arena_withdraw_request(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    mask_put(arena, arena->urgent_mask, (uint32_t)id, 0);
    mask_put(arena, arena->prefetch_mask, (uint32_t)id, 0);
    Py_RETURN_NONE;
}

static PyObject *arena_withdraw_prefetch(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    mask_put(arena, arena->prefetch_mask, (uint32_t)id, 0);
    Py_RETURN_NONE;
}

static PyObject *arena_take_prefetched(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    return PyBool_FromLong(prefetched_take(arena, (uint32_t)id));
}

static PyObject *arena_failed(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    return PyBool_FromLong(mask_test(arena, arena->failed_mask, (uint32_t)id));
}

static PyObject *arena_set_failed(PyObject *self, PyObject *arg) {
    EXPERT_ARGUMENT
    mask_put(arena, arena->failed_mask, (uint32_t)id, 1);
    Py_RETURN_NONE;
}

static PyObject *arena_generation(PyObject *self, PyObject *arg) {
    LAYER_ARGUMENT
    return PyLong_FromUnsignedLong(load_seq_cst(&arena->layers[layer].residency_generation));
}

static PyObject *arena_wait(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[3];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 3, (const char *[]){"layer", "generation", "timeout in microseconds"},
                       (uint64_t[]){arena->num_layers, UINT64_C(1) << 32, UINT64_C(60000001)}, v))
        return NULL;
    atomic_u32 *word = &arena->layers[v[0]].residency_generation;
    Py_BEGIN_ALLOW_THREADS
    futex_wait(word, (uint32_t)v[1], v[2] * 1000);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *arena_wake(PyObject *self, PyObject *arg) {
    LAYER_ARGUMENT
    futex_bump_and_wake(&arena->layers[layer].residency_generation);
    Py_RETURN_NONE;
}

static PyObject *arena_slot(PyObject *self, PyObject *arg) {
    SLOT_ARGUMENT
    uint64_t word = load_acquire(&arena->slot_words[slot]);
    return Py_BuildValue("(Iii)", (unsigned)slot_word_generation(word), (int)slot_word_expert(word),
                         (int)slot_word_state(word));
}

#define RESIDENCY_METHODS                                                                                              \
    {"want", FASTCALL(arena_want), "want(process, pin, id): pin the expert, then its slot, or -1 if not resident."},    \
    {"unpin", FASTCALL(arena_unpin), "unpin(process, pin): the pin is free again."},                                   \
    {"unpin_all", arena_unpin_all, METH_O, "unpin_all(process): clears a dead worker's row; how many pins it held."},  \
    {"pinned", arena_pinned, METH_O, "pinned(id): whether any process, or the user, pins the expert."},                \
    {"pin_for_user", FASTCALL(arena_pin_for_user), "Coordinator: pin_for_user(id, pinned)."},                          \
    {"find", arena_find, METH_O, "find(id): the slot of a resident expert, or -1."},                                   \
    {"request_urgent", arena_request_urgent, METH_O, "Sets the urgent bit; True if the caller must send the message."},\
    {"request_prefetch", arena_request_prefetch, METH_O, "Sets the prefetch bit; True if it was clear."},              \
    {"requested", FASTCALL(arena_requested), "requested(id, urgent): whether the request bit is set."},                \
    {"withdraw_request", arena_withdraw_request, METH_O, "Pager: clears both request bits of an expert."},             \
    {"withdraw_prefetch", arena_withdraw_prefetch, METH_O, "Clears the prefetch bit of a request that was dropped."},  \
    {"take_prefetched", arena_take_prefetched, METH_O, "True for the first hit on a prefetched expert."},              \
    {"failed", arena_failed, METH_O, "failed(id): whether the pager gave the expert up."},                             \
    {"set_failed", arena_set_failed, METH_O, "Pager: the expert cannot be loaded."},                                   \
    {"generation", arena_generation, METH_O, "generation(layer): read before the last check, given to wait()."},       \
    {"wait", FASTCALL(arena_wait), "wait(layer, generation, timeout_us): sleep until the layer's residency changes."}, \
    {"wake", arena_wake, METH_O, "wake(layer): after load_publish() or set_failed()."},                                \
    {"slot", arena_slot, METH_O, "slot(index): (generation, expert id, state)."}

#endif
