/* The routing kernel of x86-64 with AVX-512 as servers have had it from the first on: F, BW, DQ, VL. */
#if defined(__x86_64__)
/* The vectors are explicit here; the compiler's own would only lengthen loops over a handful of experts. */
#pragma GCC optimize("no-tree-vectorize")
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,popcnt,bmi,bmi2")
#define ROUTE_VECTOR 1
#include "route_lanes_avx512.h"

#include "route_rows.h"

/* A row of eight would leave half of the lanes empty, and folding them takes a step more. */
static void route_wide_rows(const struct route_rule *rule, const struct route_call *call,
                            const struct route_snapshot *snapshot, const struct route_boosts *boosts,
                            const float *logits, uint32_t rows, int32_t *ids, float *weights, struct route_tally *tally) {
    int narrow = rows == 1 && rule->num_experts <= BLOCK_LANES / 2;
    (narrow ? route_kernel_avx2.rows : route_rows)(rule, call, snapshot, boosts, logits, rows, ids, weights, tally);
}

const struct route_kernel route_kernel_avx512 = {"avx512", route_wide_rows};
#endif
