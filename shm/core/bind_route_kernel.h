/* Which kernel routes: hotset.shm._core.route_kernels and use_route_kernel. */
#ifndef HOTSET_BIND_ROUTE_KERNEL_H
#define HOTSET_BIND_ROUTE_KERNEL_H

#include "module.h"
#include "route_kernel.h"

/* The kernel that all routers of this process use. */
static const struct route_kernel *route_kernel;

/* The best one, when the module is imported. */
static inline void choose_route_kernel(void) {
    const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
    route_kernels(kernels);
    route_kernel = kernels[0];
}

static PyObject *core_route_kernels(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
    uint32_t count = route_kernels(kernels);
    PyObject *names = PyList_New(0);
    for (uint32_t i = 0; names && i < count; i++) {
        PyObject *name = PyUnicode_FromString(kernels[i]->name);
        if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *core_use_route_kernel(PyObject *module, PyObject *arg) {
    (void)module;
    const struct route_kernel *kernels[ROUTE_MAX_KERNELS];
    uint32_t count = route_kernels(kernels);
    for (uint32_t i = 0; i < count; i++)
        if (PyUnicode_Check(arg) && PyUnicode_CompareWithASCIIString(arg, kernels[i]->name) == 0) {
            PyObject *previous = PyUnicode_FromString(route_kernel->name);
            route_kernel = kernels[i];
            return previous;
        }
    return PyErr_Format(PyExc_ValueError, "there is no routing kernel %R on this processor, see route_kernels()", arg);
}

#define ROUTING_FUNCTIONS                                                                                              \
    {"route_kernels", core_route_kernels, METH_NOARGS, "Names of the routing kernels that run here, best first."},      \
    {"use_route_kernel", core_use_route_kernel, METH_O, "All routers use this kernel now; the name of the last one."}

#endif
