/* The routing kernel of every x86-64. */
#if defined(__x86_64__)
/* The vectors are explicit here; the compiler's own would only lengthen loops over a handful of experts. */
#pragma GCC optimize("no-tree-vectorize")
#define ROUTE_VECTOR 1
#include "route_lanes_sse2.h"

#include "route_rows.h"

const struct route_kernel route_kernel_sse2 = {"sse2", route_rows};
#endif
