/* hotset.workers.reading._core: the type Lanes over lanes.h and read.h; see _core.pyi. */
#include "bind_begin.h"
#include "bind_checksum.h"

static void lanes_type_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    close_lanes((LanesObject *)self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
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
    bool more;
    pthread_mutex_lock(&object->lanes.lock);
    struct load *load = lanes_take(&object->lanes, &run, &more);
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
