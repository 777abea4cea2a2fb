/* Methods of Arena for the pager, the only writer of slots: its side of residency.h, with arguments checked. */
#ifndef HOTSET_BIND_SLOTS_H
#define HOTSET_BIND_SLOTS_H

#include "bind_residency.h"
#include "counters.h"

static PyObject *arena_evict_begin(PyObject *self, PyObject *arg) {
    SLOT_ARGUMENT
    return PyBool_FromLong(evict_begin(arena, (uint32_t)slot));
}

static PyObject *arena_slot_release(PyObject *self, PyObject *arg) {
    SLOT_ARGUMENT
    enum slot_state state = slot_word_state(load_relaxed(&arena->slot_words[slot]));
    if (state != SLOT_LOADING && state != SLOT_EVICTING)
        return PyErr_Format(PyExc_ValueError, "slot %d is in state %d, expected LOADING (1) or EVICTING (3) to release it",
                            (int)slot, (int)state);
    slot_release(arena, (uint32_t)slot);
    Py_RETURN_NONE;
}

static PyObject *begin_to_load(PyObject *self, PyObject *const *args, Py_ssize_t count,
                               void (*begin)(const struct arena *, uint32_t, uint32_t)) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 2, (const char *[]){"slot", "expert id"},
                       (uint64_t[]){arena->num_slots, expert_limit(arena)}, v))
        return NULL;
    enum slot_state state = slot_word_state(load_relaxed(&arena->slot_words[v[0]]));
    if (state != SLOT_EMPTY && state != SLOT_EVICTING) {
        PyErr_Format(PyExc_ValueError, "slot %d is in state %d, expected EMPTY (0) or EVICTING (3) to load into it",
                     (int)v[0], (int)state);
        return NULL;
    }
    uint32_t entry = load_relaxed(&arena->directory[v[1]]);
    if (entry && entry != v[0] + 1)
        return PyErr_Format(PyExc_ValueError, "expert %d is in slot %d already, expected one that is in no slot", (int)v[1],
                            (int)entry - 1);
    begin(arena, (uint32_t)v[0], (uint32_t)v[1]);
    Py_RETURN_NONE;
}

static PyObject *arena_load_begin(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    return begin_to_load(self, args, count, load_begin);
}

static PyObject *arena_prefetch_begin(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    return begin_to_load(self, args, count, prefetch_begin);
}

/* Evicts from RESIDENT slots until one goes, or finds an EMPTY one, and begins to load into it: one call for what each
 * page-in does. The slot; SLOT_NONE if all are pinned, SLOT_NONE - 1 with an exception. */
static int32_t load_first(const struct arena *arena, PyObject *slots, uint32_t id, int urgent, uint32_t process) {
    atomic_u64 *row = counter_row(arena, process);
    int32_t found = SLOT_NONE;
    PyObject *next, *iterator = PyObject_GetIter(slots);
    if (!iterator) return SLOT_NONE - 1;
    while (found == SLOT_NONE && (next = PyIter_Next(iterator))) {
        uint64_t slot;
        int is_slot = parse_indices(&next, 1, 1, (const char *[]){"slot"}, (uint64_t[]){arena->num_slots}, &slot);
        Py_DECREF(next);
        if (!is_slot) break;
        if (slot_word_state(load_relaxed(&arena->slot_words[slot])) != SLOT_EMPTY) {
            int evicted = evict_begin(arena, (uint32_t)slot);
            counter_add(row, evicted ? COUNTER_EVICTIONS : COUNTER_EVICTIONS_REFUSED, 1);
            if (!evicted) continue;
        }
        (urgent ? load_begin : prefetch_begin)(arena, (uint32_t)slot, id);
        found = (int32_t)slot;
    }
    Py_DECREF(iterator);
    return PyErr_Occurred() ? SLOT_NONE - 1 : found;
}

static PyObject *arena_load_first(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[3];
    if (!arena) return NULL;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
    if (!parse_indices(args + 1, 3, 3, (const char *[]){"expert id", "urgent", "process"},
                       (uint64_t[]){expert_limit(arena), 2, arena->num_processes}, v))
        return NULL;
    uint32_t entry = load_relaxed(&arena->directory[v[0]]);
    if (entry)
        return PyErr_Format(PyExc_ValueError, "expert %d is in slot %d already, expected one that is in no slot", (int)v[0],
                            (int)entry - 1);
    int32_t slot = load_first(arena, args[0], (uint32_t)v[0], (int)v[1], (uint32_t)v[2]);
    return slot < SLOT_NONE ? NULL : PyLong_FromLong(slot);
}

/* Whether there is anything left to do for an urgent request. What is resident, or cannot be had, needs no load: then
 * the request is answered. */
static int is_unanswered(const struct arena *arena, uint32_t id) {
    if (!mask_test(arena, arena->urgent_mask, id)) return 0;
    if (residency_find(arena, id) == SLOT_NONE && !mask_test(arena, arena->failed_mask, id)) return 1;
    mask_put(arena, arena->urgent_mask, id, 0);
    mask_put(arena, arena->prefetch_mask, id, 0);
    futex_bump_and_wake(&arena->layers[id / arena->num_experts].residency_generation);
    return 0;
}

static PyObject *arena_unanswered(PyObject *self, PyObject *ids) {
    struct arena *arena = arena_of(self);
    PyObject *next, *iterator = arena ? PyObject_GetIter(ids) : NULL, *left = iterator ? PyList_New(0) : NULL;
    while (left && (next = PyIter_Next(iterator))) {
        uint64_t id;
        if (!parse_indices(&next, 1, 1, (const char *[]){"expert id"}, (uint64_t[]){expert_limit(arena)}, &id) ||
            (is_unanswered(arena, (uint32_t)id) && PyList_Append(left, next) < 0))
            Py_CLEAR(left);
        Py_DECREF(next);
    }
    Py_XDECREF(iterator);
    if (PyErr_Occurred()) Py_CLEAR(left);
    return left;
}

static PyObject *arena_load_publish(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    if (!arena) return NULL;
    if (count != 5) return PyErr_Format(PyExc_TypeError, "expected 5 arguments, got %zd", count);
    uint64_t checksum = PyLong_AsUnsignedLongLong(args[1]);
    if (PyErr_Occurred()) return NULL;
    PyObject *rest[4] = {args[0], args[2], args[3], args[4]};
    uint64_t v[4];
    if (!parse_indices(rest, 4, 4, (const char *[]){"slot", "nbytes", "format", "source"},
                       (uint64_t[]){arena->num_slots, UINT64_C(1) << 32, 256, 256}, v))
        return NULL;
    enum slot_state state = slot_word_state(load_relaxed(&arena->slot_words[v[0]]));
    if (state != SLOT_LOADING)
        return PyErr_Format(PyExc_ValueError, "slot %d is in state %d, expected LOADING (1) to publish it", (int)v[0],
                            (int)state);
    load_publish(arena, (uint32_t)v[0], checksum, (uint32_t)v[1], (uint16_t)v[2], (uint16_t)v[3]);
    Py_RETURN_NONE;
}

static PyObject *arena_recover(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct arena *arena = arena_of(self);
    if (!arena) return NULL;
    residency_recover(arena);
    Py_RETURN_NONE;
}

/* The ids whose bit is set in `mask`, ascending. */
static PyObject *mask_ids(const struct arena *arena, atomic_u64 *mask) {
    PyObject *ids = PyList_New(0);
    for (uint32_t layer = 0; ids && layer < arena->num_layers; layer++)
        for (uint32_t word = 0; word < arena->mask_words; word++) {
            uint64_t bits = load_acquire(mask + (size_t)layer * arena->mask_stride + word);
            for (; bits; bits &= bits - 1) {
                uint32_t expert = word * 64 + (uint32_t)__builtin_ctzll(bits);
                PyObject *id = PyLong_FromUnsignedLong(layer * arena->num_experts + expert);
                if (!id || PyList_Append(ids, id) < 0) {
                    Py_XDECREF(id);
                    Py_DECREF(ids);
                    return NULL;
                }
                Py_DECREF(id);
            }
        }
    return ids;
}

static PyObject *arena_urgent_requests(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct arena *arena = arena_of(self);
    return arena ? mask_ids(arena, arena->urgent_mask) : NULL;
}

static PyObject *arena_prefetch_requests(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct arena *arena = arena_of(self);
    return arena ? mask_ids(arena, arena->prefetch_mask) : NULL;
}

static PyObject *arena_resident_experts(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct arena *arena = arena_of(self);
    return arena ? mask_ids(arena, arena->resident_mask) : NULL;
}

static PyObject *arena_user_pins(PyObject *self, PyObject *ignored) {
    (void)ignored;
    struct arena *arena = arena_of(self);
    return arena ? mask_ids(arena, arena->user_pins) : NULL;
}

#define SLOT_METHODS \
    {"evict_begin", arena_evict_begin, METH_O, "Pager: RESIDENT to EVICTING; False if pinned or not resident."},       \
    {"slot_release", arena_slot_release, METH_O, "Pager: EVICTING or LOADING to EMPTY."},                              \
    {"load_begin", FASTCALL(arena_load_begin), "load_begin(slot, id): to LOADING, then clears the request bits."},     \
    {"prefetch_begin", FASTCALL(arena_prefetch_begin), "The same for a load that may be given up: keeps an urgent bit."},\
    {"load_first", FASTCALL(arena_load_first), "load_first(slots, id, urgent, process): see _core.pyi."},             \
    {"unanswered", arena_unanswered, METH_O, "unanswered(ids): which urgent requests need a load; answers the others."},\
    {"load_publish", FASTCALL(arena_load_publish), "load_publish(slot, checksum, nbytes, format, source)."},       \
    {"recover", arena_recover, METH_NOARGS, "Pager restart: rebuilds masks and directory from the slot words."},       \
    {"urgent_requests", arena_urgent_requests, METH_NOARGS, "Ids with the urgent bit set."},                           \
    {"prefetch_requests", arena_prefetch_requests, METH_NOARGS, "Ids with the prefetch bit set."},                     \
    {"resident_experts", arena_resident_experts, METH_NOARGS, "Ids with the residency bit set."},                     \
    {"user_pins", arena_user_pins, METH_NOARGS, "Ids that the user has pinned."}

#endif
