/* hotset.workers.compute._kernels: checks arguments, lets go of the GIL, calls the kernels. See _kernels.pyi. */
#include "bindings.h"
#include "kernels.h"
#include "threads.h"

#include <pthread.h>

static PyObject *py_set_num_threads(PyObject *self, PyObject *argument) {
    (void)self;
    long threads = PyLong_AsLong(argument);
    if (PyErr_Occurred()) return NULL;
    if (threads < 1 || threads > MAX_THREADS)
        return PyErr_Format(PyExc_ValueError, "the number of threads is %ld, expected 1 to %d", threads, MAX_THREADS);
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = pool_resize((int)threads);
    Py_END_ALLOW_THREADS
    if (error) return PyErr_Format(PyExc_OSError, "could not start %ld threads: %s", threads, strerror(error));
    Py_RETURN_NONE;
}

static PyObject *py_instruction_sets(PyObject *self, PyObject *ignored) {
    (void)self, (void)ignored;
    PyObject *names = PyList_New(0);
    for (size_t isa = 0; names && isa < kernels_count; isa++) {
        PyObject *name = kernels_supported(isa) ? PyUnicode_FromString(every_kernels[isa].name) : NULL;
        if (name && PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_use_instruction_set(PyObject *self, PyObject *argument) {
    (void)self;
    for (size_t isa = 0; isa < kernels_count; isa++)
        if (kernels_supported(isa)) {
            PyObject *name = PyUnicode_FromString(every_kernels[isa].name);
            int same = name ? PyObject_RichCompareBool(name, argument, Py_EQ) : -1;
            Py_XDECREF(name);
            if (same < 0) return NULL;
            if (same) {
                kernels = &every_kernels[isa];
                Py_RETURN_NONE;
            }
        }
    return PyErr_Format(PyExc_ValueError, "this processor has no instruction set %R", argument);
}

#define FASTCALL(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    {"linear", FASTCALL(py_linear), "linear(x, weight, out[, format])"},
    {"linear_transposed", FASTCALL(py_linear_transposed), "linear_transposed(x, weight, out[, format])"},
    {"experts", FASTCALL(py_experts),
     "experts(hidden, assignments, slots, formats, intermediate_size, outputs[, layout[, swiglu_limit]])"},
    {"combine", FASTCALL(py_combine), "combine(outputs, weights, out)"},
    {"row_norms", FASTCALL(py_row_norms), "row_norms(x, out)"},
    {"rms_norm", FASTCALL(py_rms_norm), "rms_norm(x, weight, eps, out)"},
    {"rotary_angles", FASTCALL(py_rotary_angles), "rotary_angles(positions, inverse_frequencies, cos, sin)"},
    {"rotate", FASTCALL(py_rotate), "rotate(x, cos, sin)"},
    {"write_kv", FASTCALL(py_write_kv),
     "write_kv(keys, values, kv_pages, format, layer, block_tables, table_starts, positions)"},
    {"attention", FASTCALL(py_attention),
     "attention(queries, kv_pages, format, layer, block_tables, table_starts, positions, window, out[, sinks[, scale]])"},
    {"set_num_threads", py_set_num_threads, METH_O, "set_num_threads(threads)"},
    {"instruction_sets", py_instruction_sets, METH_NOARGS, "instruction_sets()"},
    {"use_instruction_set", py_use_instruction_set, METH_O, "use_instruction_set(name)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", "The forward pass's inner loops; see _kernels.pyi.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void) {
    kernels_prepare();
    pthread_atfork(NULL, NULL, pool_forget);
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    static const struct { const char *name; int value; } constants[] = {
        {"FLOAT32", FORMAT_FLOAT32}, {"FLOAT16", FORMAT_FLOAT16}, {"BFLOAT16", FORMAT_BFLOAT16},
        {"Q8_0", FORMAT_Q8_0}, {"Q4_0", FORMAT_Q4_0}, {"MXFP4", FORMAT_MXFP4},
        {"MXFP4_GGML", FORMAT_MXFP4_GGML},
        {"GATE_UP_DOWN", EXPERT_GATE_UP_DOWN}, {"INTERLEAVED_WITH_BIASES", EXPERT_INTERLEAVED_WITH_BIASES},
        {"GATE_UP_DOWN_WITH_BIASES", EXPERT_GATE_UP_DOWN_WITH_BIASES},
        {"MAX_THREADS", MAX_THREADS},
        {"KV_FLOAT32", KV_FLOAT32}, {"KV_FLOAT16", KV_FLOAT16}, {"KV_BFLOAT16", KV_BFLOAT16},
        {"KV_Q8_0", KV_Q8_0}, {"KV_Q4_0", KV_Q4_0},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0) {
            Py_DECREF(module);
            return NULL;
        }
    return module;
}
