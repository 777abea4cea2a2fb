/* hotset.shm._core: the Python type Arena over arena.h. The logic is in the headers without Python.h, so that the
 * same code runs under the sanitizers, the crash stepper and the benchmarks; bind_*.h check arguments and call it. */
#include "bind_demands.h"
#include "bind_kv_pages.h"
#include "bind_metrics.h"
#include "bind_residency.h"
#include "bind_slots.h"
#include "bind_routing.h"
#include "kv_page.h"
#include "module.h"

#include <string.h>
#include <sys/prctl.h>

static int arena_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    ArenaObject *object = (ArenaObject *)self;
    PyObject *memory;
    static char *names[] = {"memory", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &memory)) return -1;
    if (object->open) {
        PyErr_SetString(PyExc_ValueError, "the arena is open already");
        return -1;
    }
    if (PyObject_GetBuffer(memory, &object->buffer, PyBUF_WRITABLE) < 0) return -1;
    const char *problem = (uintptr_t)object->buffer.buf % 64
                              ? "is not aligned to 64 bytes"
                              : arena_attach(&object->arena, object->buffer.buf, (uint64_t)object->buffer.len);
    if (problem) {
        PyBuffer_Release(&object->buffer);
        PyErr_Format(PyExc_ValueError, "the memory %s", problem);
        return -1;
    }
    object->open = 1;
    return 0;
}

static PyObject *arena_close(PyObject *self, PyObject *ignored) {
    (void)ignored;
    ArenaObject *object = (ArenaObject *)self;
    if (object->open) PyBuffer_Release(&object->buffer);
    object->open = 0;
    Py_RETURN_NONE;
}

static void arena_dealloc(PyObject *self) {
    ArenaObject *object = (ArenaObject *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (object->open) PyBuffer_Release(&object->buffer);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* The address of one integer of a section; its size is the row stride divided among `columns` by the caller's word. */
static uint8_t *arena_integer(struct arena *arena, PyObject *const *args, uint64_t word) {
    uint64_t v[3];
    if (!parse_indices(args, 1, 1, (const char *[]){"section"}, (uint64_t[]){SECTION_COUNT}, v)) return NULL;
    const struct section_entry *entry = &arena->header->sections[v[0]];
    if (!parse_indices(args + 1, 2, 2, (const char *[]){"row", "column"},
                       (uint64_t[]){entry->count, entry->stride / word}, v + 1))
        return NULL;
    return arena->base + entry->offset + v[1] * entry->stride + v[2] * word;
}

static PyObject *arena_load_u64(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    if (!arena) return NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    uint8_t *at = arena_integer(arena, args, 8);
    return at ? PyLong_FromUnsignedLongLong(load_acquire((atomic_u64 *)at)) : NULL;
}

static PyObject *arena_store_u64(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    if (!arena) return NULL;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
    uint8_t *at = arena_integer(arena, args, 8);
    uint64_t value = at ? PyLong_AsUnsignedLongLong(args[3]) : 0;
    if (PyErr_Occurred()) return NULL;
    store_release((atomic_u64 *)at, value); /* release: what the caller wrote before is seen by who reads this */
    Py_RETURN_NONE;
}

static PyObject *arena_load_u32(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    if (!arena) return NULL;
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    uint8_t *at = arena_integer(arena, args, 4);
    return at ? PyLong_FromUnsignedLong(load_acquire((atomic_u32 *)at)) : NULL;
}

static PyObject *arena_store_u32(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    if (!arena) return NULL;
    if (count != 4) return PyErr_Format(PyExc_TypeError, "expected 4 arguments, got %zd", count);
    uint8_t *at = arena_integer(arena, args, 4);
    unsigned long value = at ? PyLong_AsUnsignedLong(args[3]) : 0;
    if (PyErr_Occurred()) return NULL;
    if (value > UINT32_MAX) return PyErr_Format(PyExc_OverflowError, "%lu does not fit 32 bits", value);
    store_release((atomic_u32 *)at, (uint32_t)value);
    Py_RETURN_NONE;
}

static PyObject *arena_count(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[3];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 3, (const char *[]){"process", "counter", "amount"},
                       (uint64_t[]){arena->num_processes, ARENA_COUNTERS, UINT64_C(1) << 62}, v))
        return NULL;
    atomic_u64 *counter = arena->counters + v[0] * ARENA_COUNTERS + v[1];
    /* Not a fetch_add: the row has one writer, so a load and a store cannot lose anything. */
    store_relaxed(counter, load_relaxed(counter) + v[2]);
    Py_RETURN_NONE;
}

static PyObject *arena_hand_out_page(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    struct arena *arena = arena_of(self);
    uint64_t v[2];
    if (!arena) return NULL;
    if (!parse_indices(args, count, 2, (const char *[]){"page", "generation"},
                       (uint64_t[]){arena->header->sections[SECTION_PAGE_GENERATIONS].count, UINT64_C(1) << 32}, v))
        return NULL;
    kv_page_hand_out(&arena->page_generations[v[0]], (uint32_t)v[1]);
    Py_RETURN_NONE;
}

static PyObject *arena_get_state(PyObject *self, void *closure) {
    (void)closure;
    struct arena *arena = arena_of(self);
    return arena ? PyLong_FromUnsignedLong(load_acquire(arena->state)) : NULL;
}

static int arena_set_state(PyObject *self, PyObject *value, void *closure) {
    (void)closure;
    struct arena *arena = arena_of(self);
    if (!arena) return -1;
    if (!value) {
        PyErr_SetString(PyExc_TypeError, "the state cannot be deleted");
        return -1;
    }
    unsigned long state = PyLong_AsUnsignedLong(value);
    if (PyErr_Occurred()) return -1;
    if (state > ARENA_CLOSED) {
        PyErr_Format(PyExc_ValueError, "state is %lu, expected 0 (building), 1 (ready) or 2 (closed)", state);
        return -1;
    }
    store_release(arena->state, (uint32_t)state); /* last of all: who sees READY sees the whole header */
    return 0;
}

static PyMethodDef arena_methods[] = {
    {"close", arena_close, METH_NOARGS, "Lets go of the memory."},
    {"load_u64", FASTCALL(arena_load_u64), "load_u64(section, row, column), acquire."},
    {"store_u64", FASTCALL(arena_store_u64), "store_u64(section, row, column, value), release."},
    {"load_u32", FASTCALL(arena_load_u32), "load_u32(section, row, column), acquire."},
    {"store_u32", FASTCALL(arena_store_u32), "store_u32(section, row, column, value), release."},
    {"hand_out_page", FASTCALL(arena_hand_out_page),
     "hand_out_page(page, generation): before the new owner writes the KV page; see kv_page.h."},
    {"count", FASTCALL(arena_count), "count(process, counter, amount): adds to a counter of the caller's own row."},
    RESIDENCY_METHODS,
    SLOT_METHODS,
    METRICS_METHODS,
    DEMAND_METHODS,
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef arena_getset[] = {
    {"state", arena_get_state, arena_set_state, "0 building, 1 ready, 2 closed; stored with release.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot arena_slots[] = {
    {Py_tp_doc, "Arena(memory): the atomic operations on an arena whose header is written."},
    {Py_tp_init, arena_init},
    {Py_tp_dealloc, arena_dealloc},
    {Py_tp_methods, arena_methods},
    {Py_tp_getset, arena_getset},
    {0, NULL},
};

static PyType_Spec arena_spec = {"hotset.shm._core.Arena", sizeof(ArenaObject), 0, Py_TPFLAGS_DEFAULT, arena_slots};

/* offsetof and sizeof as C sees them: a test compares them with shm/layout.py. */
static PyObject *core_offsets(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
#define FIELD(type, field) #type "." #field, (int)offsetof(struct type, field)
    return Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}",
        FIELD(arena_header, magic), FIELD(arena_header, abi_version), FIELD(arena_header, crc),
        FIELD(arena_header, total_nbytes), FIELD(arena_header, layout_hash), FIELD(arena_header, instance_uuid),
        FIELD(arena_header, boot_id), FIELD(arena_header, creator_pid), FIELD(arena_header, creator_start_time),
        FIELD(arena_header, num_layers), FIELD(arena_header, num_slots), FIELD(arena_header, section_count),
        FIELD(arena_header, sections), FIELD(section_entry, offset), FIELD(section_entry, stride),
        FIELD(layer_state, logit_range), FIELD(layer_state, expert_norm), FIELD(layer_state, residency_generation),
        FIELD(slot_info, nbytes), FIELD(slot_info, format), FIELD(slot_info, source),
        FIELD(sequence_state, granted_blocks), "state", (int)ARENA_STATE_OFFSET, "header", (int)ARENA_HEADER_BYTES);
#undef FIELD
}

/* The kernel kills the caller when the thread that started it ends; closes the race with a parent dead already. */
static PyObject *core_die_with_parent(PyObject *module, PyObject *arg) {
    (void)module;
    long parent = PyLong_AsLong(arg);
    if (PyErr_Occurred()) return NULL;
    if (prctl(PR_SET_PDEATHSIG, 9) < 0) return PyErr_SetFromErrno(PyExc_OSError);
    return PyBool_FromLong(getppid() == (pid_t)parent);
}

static PyMethodDef core_functions[] = {
    {"offsets", core_offsets, METH_NOARGS, "Offsets of the shared structs, as the C compiler sees them."},
    {"die_with_parent", core_die_with_parent, METH_O, "PR_SET_PDEATHSIG; False if the parent is not `pid` any more."},
    ROUTING_FUNCTIONS,
    KV_PAGE_FUNCTIONS,
    {NULL, NULL, 0, NULL},
};

static int core_exec(PyObject *module) {
    PyObject *type = PyType_FromSpec(&arena_spec);
    if (!type || PyModule_AddObjectRef(module, "Arena", type) < 0) return -1;
    if (add_routing_types(module, type) < 0) return -1;
    Py_DECREF(type);
    if (PyModule_AddIntConstant(module, "ABI_VERSION", ARENA_ABI_VERSION) < 0) return -1;
    if (PyModule_AddIntConstant(module, "SECTION_COUNT", SECTION_COUNT) < 0) return -1;
    if (PyModule_AddIntConstant(module, "COUNTERS", ARENA_COUNTERS) < 0) return -1;
    if (PyModule_AddIntConstant(module, "BUCKETS", ARENA_BUCKETS) < 0) return -1;
    return PyModule_AddIntConstant(module, "MAGIC", (long)ARENA_MAGIC);
}

static PyModuleDef_Slot core_slots[] = {{Py_mod_exec, core_exec}, {0, NULL}};

static struct PyModuleDef core_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "hotset.shm._core",
    .m_doc = "Atomic operations on the shared arena.",
    .m_methods = core_functions,
    .m_slots = core_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_module); }
