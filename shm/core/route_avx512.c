/* The routing kernel of x86-64 with AVX-512 as servers have had it from the first on: F, BW, DQ, VL. */
#if defined(__x86_64__)
/* The vectors are explicit here; the compiler's own would only lengthen loops over a handful of experts. */
#pragma GCC optimize("no-tree-vectorize")
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,bmi2")
#define ROUTE_VECTOR 1
#include "route_lanes_avx512.h"

#include "route_rows.h"

const struct route_kernel route_kernel_avx512 = {"avx512", route_rows};
#endif
