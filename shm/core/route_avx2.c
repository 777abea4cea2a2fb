/* The routing kernel of x86-64 with AVX2. */
#if defined(__x86_64__)
/* The vectors are explicit here; the compiler's own would only lengthen loops over a handful of experts. */
#pragma GCC optimize("no-tree-vectorize")
#pragma GCC target("avx2,popcnt,bmi,bmi2")
#define ROUTE_VECTOR 1
#include "route_lanes_avx2.h"

#include "route_rows.h"

const struct route_kernel route_kernel_avx2 = {"avx2", route_rows};
#endif
