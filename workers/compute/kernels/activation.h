/* What an expert does between its two products. A template: see vector.h for the lanes, kernels.c for the copies. */

#define SWIGLU_ALPHA 1.702f /* of gpt-oss */

/* a / (1 + e^(-alpha * a)). Where alpha * a is below -88, from where on the exponential is clamped, a is too: the result
 * is under 1e-36 in size either way. */
INLINE TARGET V(vec) V(silu)(V(vec) a, float alpha) {
    a = V(max)(V(splat)(-88.0f / alpha), a);
    V(vec) one_plus = V(add)(V(splat)(1.0f), V(exp)(V(mul)(V(splat)(-alpha), a)));
    return V(div)(a, one_plus);
}

INLINE TARGET V(vec) V(gate_times_up)(V(vec) gate, V(vec) up, float limit) {
    if (limit == 0) return V(mul)(V(silu)(gate, 1.0f), up);
    /* The limit first: like the instructions, min and max then let a NaN through. */
    gate = V(min)(V(splat)(limit), gate);
    up = V(max)(V(splat)(-limit), V(min)(V(splat)(limit), up));
    return V(mul)(V(silu)(gate, SWIGLU_ALPHA), V(add)(up, V(splat)(1.0f)));
}

/* Up to VEC_LANES values from `i` on. */
INLINE TARGET V(vec) V(load_some)(const float *values, size_t i, size_t count) {
    if (count >= VEC_LANES) return V(load)(values + i);
    float some[VEC_LANES] = {0};
    memcpy(some, values + i, count * sizeof *values);
    return V(load)(some);
}

/* gate[row][i] becomes the middle activation for i in [begin, end). */
static TARGET void V(gated)(const struct gated *op, size_t begin, size_t end) {
    for (size_t row = 0; row < op->rows; row++) {
        float *gates = op->gate + row * op->width;
        const float *ups = op->up + row * op->width;
        for (size_t i = begin; i < end; i += VEC_LANES) {
            size_t count = end - i;
            V(vec) gate = V(load_some)(gates, i, count), up = V(load_some)(ups, i, count);
            if (op->gate_bias) gate = V(add)(gate, V(load_some)(op->gate_bias, i, count));
            if (op->up_bias) up = V(add)(up, V(load_some)(op->up_bias, i, count));
            V(vec) result = V(gate_times_up)(gate, up, op->swiglu_limit);
            if (count >= VEC_LANES) {
                V(store)(gates + i, result);
                continue;
            }
            float some[VEC_LANES];
            V(store)(some, result);
            memcpy(gates + i, some, count * sizeof *gates);
        }
    }
}
