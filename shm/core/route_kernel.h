/* The kernels: one for each instruction set, all with the same results bit for bit. The best one that this processor
 * runs is chosen at load; tests choose others. */
#ifndef HOTSET_ROUTE_KERNEL_H
#define HOTSET_ROUTE_KERNEL_H

#include "route.h"

struct route_kernel {
    const char *name;
    /* Routes `rows` rows of num_experts logits. Reads no shared memory. A single row leaves tally->selections alone. */
    void (*rows)(const struct route_rule *rule, const struct route_call *call, const struct route_snapshot *snapshot,
                 const struct route_boosts *boosts, const float *logits, uint32_t rows, int32_t *ids, float *weights,
                 struct route_tally *tally);
};

extern const struct route_kernel route_kernel_plain;
#if defined(__x86_64__)
extern const struct route_kernel route_kernel_sse2, route_kernel_avx2, route_kernel_avx512;
#endif

#define ROUTE_MAX_KERNELS 4

/* Those that run here, best first; how many. */
static inline uint32_t route_kernels(const struct route_kernel **kernels) {
    uint32_t count = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        kernels[count++] = &route_kernel_avx512;
    if (__builtin_cpu_supports("avx2")) kernels[count++] = &route_kernel_avx2;
    kernels[count++] = &route_kernel_sse2;
#endif
    kernels[count++] = &route_kernel_plain;
    return count;
}

#endif
