/* hotset.workers.reading._core: the type Lanes over lanes.h and read.h; see _core.pyi. */
#include "bind_checksum.h"
#include "bind_lanes.h"

static void lanes_type_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    close_lanes((LanesObject *)self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* ---- what to read */

enum { KNOWN_ID, PIECES, TRANSPOSED, FORMAT, KNOW_ARGUMENTS };
enum { LOAD_ID, SLOT, URGENT, BEGAN, EXPECTED, SOURCE, WARM_START, BEGIN_ARGUMENTS };

/* `known` with room for `id`; 0 with an exception. */
static int make_room(LanesObject *object, uint64_t id) {
    if (id < object->num_known) return 1;
    size_t count = 2 * (size_t)id + 8;
    struct load **known = realloc(object->known, count * sizeof *known);
    if (!known) return PyErr_NoMemory(), 0;
    memset(known + object->num_known, 0, (count - object->num_known) * sizeof *known);
    object->known = known;
    object->num_known = count;
    return 1;
}

static PyObject *lanes_type_know(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    LanesObject *object = lanes_of(self);
    if (!object) return NULL;
    if (count != KNOW_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", KNOW_ARGUMENTS, count);
    uint64_t v[2];
    Py_buffer pieces, transposed;
    if (!parse_indices((PyObject *const[]){args[KNOWN_ID], args[FORMAT]}, 2, 2, (const char *[]){"expert id", "format"},
                       (uint64_t[]){expert_limit_of(&object->lanes), 256}, v) ||
        !make_room(object, v[0]) ||
        !take_array(args[PIECES], "pieces", &INT64, 0, 2, (Py_ssize_t[]){ANY_LENGTH, PIECE_COLUMNS}, &pieces))
        return NULL;
    struct load *load = NULL;
    if (take_array(args[TRANSPOSED], "transposed", &INT64, 0, 2, (Py_ssize_t[]){ANY_LENGTH, TRANSPOSED_COLUMNS},
                   &transposed)) {
        load = new_load(&pieces, &transposed, object->lanes.alignment);
        PyBuffer_Release(&transposed);
    }
    PyBuffer_Release(&pieces);
    if (!load) return NULL;
    load->id = v[0];
    load->format = (uint16_t)v[1];
    free(object->known[v[0]]);
    object->known[v[0]] = load;
    Py_RETURN_NONE;
}

static int add_load(struct lanes *lanes, struct load *load) {
    int added = 0;
    pthread_mutex_lock(&lanes->lock);
    if (lanes->count == lanes->capacity) {
        size_t capacity = 2 * lanes->capacity + 8;
        struct load **loads = realloc(lanes->loads, capacity * sizeof *loads);
        if (loads) lanes->loads = loads, lanes->capacity = capacity;
    }
    if (lanes_find(lanes, load->id)) {
        PyErr_Format(PyExc_ValueError, "load %llu is under way", (unsigned long long)load->id);
    } else if (lanes->count == lanes->capacity) {
        PyErr_NoMemory();
    } else {
        lanes->loads[lanes->count++] = load;
        size_t wake = load->urgent ? load->num_chunks : 1;
        for (size_t i = 0; i < wake && i < lanes->num_threads; i++) pthread_cond_signal(&lanes->work);
        added = 1;
    }
    pthread_mutex_unlock(&lanes->lock);
    return added;
}

static PyObject *lanes_type_begin(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    LanesObject *object = lanes_of(self);
    if (!object) return NULL;
    uint64_t v[6], expected = 0;
    if (count != BEGIN_ARGUMENTS)
        return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", BEGIN_ARGUMENTS, count);
    if (!parse_indices((PyObject *const[]){args[LOAD_ID], args[SLOT], args[URGENT], args[BEGAN], args[SOURCE],
                                           args[WARM_START]}, 6, 6,
                       (const char *[]){"expert id", "slot", "urgent", "began", "source", "warm_start"},
                       (uint64_t[]){expert_limit_of(&object->lanes), (uint64_t)object->num_slots, 2, INT64_MAX,
                                    PREFETCH_SOURCES, 2}, v))
        return NULL;
    if (args[EXPECTED] != Py_None) expected = PyLong_AsUnsignedLongLong(args[EXPECTED]);
    if (PyErr_Occurred()) return NULL;
    const struct load *known = v[0] < object->num_known ? object->known[v[0]] : NULL;
    if (!known) return PyErr_Format(PyExc_ValueError, "where expert %llu lies is not known", (unsigned long long)v[0]);
    if (known->touched > (uint64_t)object->slots[v[1]].shape[0])
        return PyErr_Format(PyExc_ValueError, "a piece of expert %llu lies outside of slot %llu",
                            (unsigned long long)v[0], (unsigned long long)v[1]);
    struct load *load = load_copy(known);
    if (!load) return PyErr_NoMemory();
    load->slot = object->slots[v[1]].buf;
    load->slot_number = (uint32_t)v[1];
    load->urgent = v[2];
    load->began = v[3];
    load->source = (uint16_t)v[4];
    load->warm_start = v[5];
    load->is_known = args[EXPECTED] != Py_None;
    load->expected = expected;
    if (!add_load(&object->lanes, load)) return free(load), NULL;
    Py_RETURN_NONE;
}

/* ---- what becomes of it */

static PyObject *lanes_type_promote(PyObject *self, PyObject *argument) {
    LanesObject *object = lanes_of(self);
    unsigned long long id = object ? PyLong_AsUnsignedLongLong(argument) : 0;
    if (PyErr_Occurred()) return NULL;
    return PyBool_FromLong(lanes_promote(&object->lanes, id));
}

static PyObject *lanes_type_cancel(PyObject *self, PyObject *argument) {
    LanesObject *object = lanes_of(self);
    unsigned long long id = object ? PyLong_AsUnsignedLongLong(argument) : 0;
    if (PyErr_Occurred()) return NULL;
    lanes_cancel(&object->lanes, id);
    Py_RETURN_NONE;
}

static PyObject *lanes_type_tell_of_all(PyObject *self, PyObject *argument) {
    LanesObject *object = lanes_of(self);
    int all = object ? PyObject_IsTrue(argument) : -1;
    if (all < 0) return NULL;
    lanes_tell_of_all(&object->lanes, all);
    Py_RETURN_NONE;
}

static PyObject *lanes_type_take_finished(PyObject *self, PyObject *ignored) {
    (void)ignored;
    LanesObject *object = lanes_of(self);
    PyObject *finished = object ? PyList_New(0) : NULL;
    if (!finished) return NULL;
    eventfd_t events;
    eventfd_read(object->lanes.finished_fd, &events); /* before looking: what finishes later makes it readable again */
    for (struct load *load; finished && (load = lanes_take_finished(&object->lanes)); free(load)) {
        PyObject *row = Py_BuildValue("KNKNiiK", (unsigned long long)load->id, PyBool_FromLong(load->published),
                                      (unsigned long long)load->checksum, PyBool_FromLong(load->cancelled),
                                      load->error, load->error_fd, (unsigned long long)load->error_offset);
        if (!row || PyList_Append(finished, row) < 0) Py_CLEAR(finished);
        Py_XDECREF(row);
    }
    return finished;
}

/* ---- for tests, which are a lane themselves */

static PyObject *lanes_type_take(PyObject *self, PyObject *ignored) {
    (void)ignored;
    LanesObject *object = lanes_of(self);
    if (!object) return NULL;
    struct chunk run;
    pthread_mutex_lock(&object->lanes.lock);
    struct load *load = lanes_take(&object->lanes, &run);
    unsigned long long id = load ? load->id : 0;
    unsigned chunk = load ? load->next_chunk - 1 : 0;
    pthread_mutex_unlock(&object->lanes.lock);
    if (!load) Py_RETURN_NONE;
    return Py_BuildValue("KI", id, chunk);
}

static PyObject *lanes_type_read(PyObject *self, PyObject *args) {
    LanesObject *object = lanes_of(self);
    unsigned long long id;
    unsigned chunk;
    if (!object || !PyArg_ParseTuple(args, "KI", &id, &chunk)) return NULL;
    pthread_mutex_lock(&object->lanes.lock);
    struct load *load = lanes_find(&object->lanes, id);
    int is_read = load && load->reading && chunk < load->next_chunk;
    pthread_mutex_unlock(&object->lanes.lock);
    if (!is_read) return PyErr_Format(PyExc_ValueError, "chunk %u of load %llu was not taken", chunk, id);
    Py_BEGIN_ALLOW_THREADS
    lane_read(&object->lanes, load, &load->chunks[chunk]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *lanes_type_close(PyObject *self, PyObject *ignored) {
    (void)ignored;
    close_lanes((LanesObject *)self);
    Py_RETURN_NONE;
}

static PyObject *lanes_get_fd(PyObject *self, void *closure) {
    (void)closure;
    LanesObject *object = lanes_of(self);
    return object ? PyLong_FromLong(object->lanes.finished_fd) : NULL;
}

static PyMethodDef lanes_methods[] = {
    {"know", (PyCFunction)(void (*)(void))lanes_type_know, METH_FASTCALL, "know(id, ...): see _core.pyi."},
    {"begin", (PyCFunction)(void (*)(void))lanes_type_begin, METH_FASTCALL, "begin(id, slot, ...): see _core.pyi."},
    {"promote", lanes_type_promote, METH_O, "promote(id): whether it will be read to its end."},
    {"cancel", lanes_type_cancel, METH_O, "cancel(id): if it is a prefetch."},
    {"tell_of_all", lanes_type_tell_of_all, METH_O, "tell_of_all(all): see _core.pyi."},
    {"take_finished", lanes_type_take_finished, METH_NOARGS, "take_finished(): see _core.pyi."},
    {"close", lanes_type_close, METH_NOARGS, "close(): returns when nothing writes to a slot any more."},
    {"take", lanes_type_take, METH_NOARGS, "take() -> (id, chunk) or None: as a lane does."},
    {"read", lanes_type_read, METH_VARARGS, "read(id, chunk): what a lane does with what it took."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef lanes_getset[] = {
    {"fd", lanes_get_fd, NULL, "Readable while there are finished loads to be told of.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot lanes_slots[] = {
    {Py_tp_doc, "Lanes(slots, count, direct_alignment=0, memory=None, process=0)."},
    {Py_tp_init, lanes_type_init},
    {Py_tp_dealloc, lanes_type_dealloc},
    {Py_tp_methods, lanes_methods},
    {Py_tp_getset, lanes_getset},
    {0, NULL},
};

static PyType_Spec lanes_spec = {"hotset.workers.reading._core.Lanes", sizeof(LanesObject), 0, Py_TPFLAGS_DEFAULT,
                                 lanes_slots};

static PyMethodDef functions[] = {
    {"xxh3_64", py_xxh3_64, METH_VARARGS, "xxh3_64(data, instruction_set)"},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "instruction_sets(): this processor's, the widest last."},
    {NULL, NULL, 0, NULL},
};

static int core_exec(PyObject *module) {
    PyObject *lanes = PyType_FromSpec(&lanes_spec);
    if (!lanes || PyModule_AddObjectRef(module, "Lanes", lanes) < 0) return -1;
    Py_DECREF(lanes);
    return PyModule_AddIntConstant(module, "END_OF_FILE", END_OF_FILE);
}

static PyModuleDef_Slot core_slots[] = {{Py_mod_exec, core_exec}, {0, NULL}};

static struct PyModuleDef core_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "hotset.workers.reading._core",
    .m_doc = "The pager's read lanes.",
    .m_methods = functions,
    .m_slots = core_slots,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&core_module); }
