/* RMS norm. A template: see vector.h for the lanes, kernels.c for the copies. */

/* out = x / sqrt(mean(x^2) + eps) * weight, for each of the rows [begin, end). */
static TARGET void V(rms_norm)(const struct rms_norm *op, size_t begin, size_t end) {
    size_t n = op->width;
    for (size_t row = begin; row < end; row++) {
        const float *x = op->x + row * n;
        float square;
        V(dot_tile)(1, 1, FORMAT_FLOAT32, x, 0, matrix_at(FORMAT_FLOAT32, (const uint8_t *)x, 1, n), n, &square, 0);
        float scale = 1.0f / sqrtf(square / (float)n + op->eps), *out = op->out + row * n;
        for (size_t i = 0; i < n; i++) out[i] = x[i] * scale * op->weight[i];
    }
}
