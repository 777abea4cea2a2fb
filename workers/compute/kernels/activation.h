/* What an expert does between its two products. A template: see vector.h for the lanes, kernels.c for the copies. */

/* silu(gate) * up with silu(a) = a / (1 + e^-a). Below -88, where e^-a is clamped, a is too: the result is under 1e-36
 * in size either way. */
INLINE TARGET V(vec) V(silu_times)(V(vec) gate, V(vec) up) {
    gate = V(max)(V(splat)(-88.0f), gate);
    V(vec) one_plus = V(add)(V(splat)(1.0f), V(exp)(V(sub)(V(zero)(), gate)));
    return V(mul)(V(div)(gate, one_plus), up);
}

/* gate[row][i] becomes the expert's middle activation for i in [begin, end). */
static TARGET void V(gated)(const struct gated *op, size_t begin, size_t end) {
    for (size_t row = 0; row < op->rows; row++) {
        float *gate = op->gate + row * op->width;
        const float *up = op->up + row * op->width;
        size_t i = begin, rest;
        for (; i + VEC_LANES <= end; i += VEC_LANES)
            V(store)(gate + i, V(silu_times)(V(load)(gate + i), V(load)(up + i)));
        if ((rest = end - i)) {
            float last_gate[VEC_LANES] = {0}, last_up[VEC_LANES] = {0};
            memcpy(last_gate, gate + i, rest * sizeof *gate);
            memcpy(last_up, up + i, rest * sizeof *up);
            V(store)(last_gate, V(silu_times)(V(load)(last_gate), V(load)(last_up)));
            memcpy(gate + i, last_gate, rest * sizeof *gate);
        }
    }
}
