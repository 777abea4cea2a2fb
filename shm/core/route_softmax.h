/* The exponential of the gate and its canonical sum; the vector kernels do the same operations on many lanes. */
#ifndef HOTSET_ROUTE_SOFTMAX_H
#define HOTSET_ROUTE_SOFTMAX_H

#include "route_select.h"

#define SOFTMAX_LOG2E 1.44269504f
#define SOFTMAX_LOWEST (-126.0f)    /* in powers of two: below it the result would be denormal */
#define SOFTMAX_ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, left in the low bits */
/* 2^r on [-0.5, 0.5], relative error 9e-8, 1 exactly at 0 (minimax fit) */
#define SOFTMAX_C1 0x1.62e42ap-1f
#define SOFTMAX_C2 0x1.ebf9bcp-3f
#define SOFTMAX_C3 0x1.c6b752p-5f
#define SOFTMAX_C4 0x1.3cea88p-7f
#define SOFTMAX_C5 0x1.5bba14p-10f

/* e^x for x <= 0, at least 2^-126. The relative error grows with |x| as that of x itself does. */
static inline float softmax_exp(float x) {
    float t = x * SOFTMAX_LOG2E;
    t = t > SOFTMAX_LOWEST ? t : SOFTMAX_LOWEST;
    float rounded = t + SOFTMAX_ROUNDER;
    float r = t - (rounded - SOFTMAX_ROUNDER);
    float square = r * r; /* Estrin's scheme: half as many results in a row that wait for each other as Horner's */
    float high = (SOFTMAX_C5 * r + SOFTMAX_C4) * square + (SOFTMAX_C3 * r + SOFTMAX_C2);
    float p = high * square + (SOFTMAX_C1 * r + 1.0f);
    return float_from_bits(bits_from_float(p) + (bits_from_float(rounded) << 23));
}

#define SUM_LANES 16u

/* Lane i sums the values i, i + 16, i + 32, ...; then the lanes are folded 8 apart, 4 apart, 2 apart, 1 apart. */
static inline float canonical_sum(const float *values, uint32_t count) {
    float lanes[SUM_LANES] = {0};
    for (uint32_t i = 0; i < count; i++) lanes[i % SUM_LANES] += values[i];
    for (uint32_t step = SUM_LANES / 2; step > 0; step /= 2)
        for (uint32_t i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
}

static inline float sigmoid(float x) {
    float e = softmax_exp(x < 0 ? x : -x);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

#endif
