/* RMS norm and attention over KV pages. A template: see vector.h for the lanes, kernels.h for the copies. */

/* out = x / sqrt(mean(x^2) + eps) * weight, for each of the rows [begin, end). */
static TARGET void V(rms_norm)(const struct rms_norm *op, size_t begin, size_t end) {
    size_t n = op->width;
    for (size_t row = begin; row < end; row++) {
        const float *x = op->x + row * n;
        float square;
        V(dot_tile)(1, 1, FORMAT_FLOAT32, x, 0, (const uint8_t *)x, 0, n, &square, 0);
        float scale = 1.0f / sqrtf(square / (float)n + op->eps), *out = op->out + row * n;
        for (size_t i = 0; i < n; i++) out[i] = x[i] * scale * op->weight[i];
    }
}

/* out += sum over j < count of p[j] * value[j], j ascending; value rows are `stride` floats apart. */
INLINE TARGET void V(add_values)(float *out, size_t width, const float *p, const float *value, size_t stride,
                                 size_t count) {
    size_t d = 0;
    for (; d + 4 * VEC_LANES <= width; d += 4 * VEC_LANES) {
        V(vec) sum[4];
        for (int c = 0; c < 4; c++) sum[c] = V(load)(out + d + c * VEC_LANES);
        for (size_t j = 0; j < count; j++) {
            V(vec) weight = V(splat)(p[j]);
            for (int c = 0; c < 4; c++)
                sum[c] = V(fma)(weight, V(load)(value + j * stride + d + c * VEC_LANES), sum[c]);
        }
        for (int c = 0; c < 4; c++) V(store)(out + d + c * VEC_LANES, sum[c]);
    }
    for (; d < width; d++)
        for (size_t j = 0; j < count; j++) out[d] = V(fma1)(p[j], value[j * stride + d], out[d]);
}

/* One query head of one row: softmax(q K^T * scale) V over the positions 0 .. position, in tiles of
 * ATTENTION_TILE positions counted from 0, with a running maximum and sum (Milakov and Gimelshein 2018; Flash
 * Attention). The tiles depend on the position only, so chunked prefill and decode give the same bits. */
INLINE TARGET void V(attend)(const struct attention *op, size_t row, size_t head) {
    size_t dim = op->head_dim, block = op->block_size, kv_stride = op->num_kv_heads * dim;
    size_t positions = (size_t)op->positions[row] + 1;
    const uint32_t *table = op->tables + op->table_starts[row];
    const float *query = op->queries + (row * op->num_heads + head) * dim;
    const float *keys = op->pages + op->layer * 2 * block * kv_stride + head / (op->num_heads / op->num_kv_heads) * dim;
    const float *values = keys + block * kv_stride;
    float *out = op->out + (row * op->num_heads + head) * dim;
    float highest = -INFINITY;
    V(vec) sum[VEC_PARTS];
    for (int p = 0; p < VEC_PARTS; p++) sum[p] = V(zero)();
    memset(out, 0, dim * sizeof *out);
    for (size_t from = 0; from < positions; from += ATTENTION_TILE) {
        size_t count = positions - from < ATTENTION_TILE ? positions - from : ATTENTION_TILE, run;
        _Alignas(64) float score[ATTENTION_TILE];
        for (size_t j = 0; j < count; j += run) { /* a run lies in one page */
            size_t offset = (from + j) % block;
            run = block - offset < count - j ? block - offset : count - j;
            const float *key = keys + table[(from + j) / block] * op->page_stride + offset * kv_stride;
            V(dot_rows)(1, MAX_TILE_OUTS, FORMAT_FLOAT32, query, 0, (const uint8_t *)key, kv_stride * sizeof *key, dim,
                        score + j, 0, 0, run);
        }
        float tile_highest = highest;
        for (size_t j = 0; j < count; j++) {
            score[j] *= op->scale;
            if (score[j] > tile_highest) tile_highest = score[j];
        }
        if (tile_highest > highest && from) {
            float shrink[VEC_LANES];
            V(store)(shrink, V(exp)(V(splat)(highest - tile_highest)));
            for (int p = 0; p < VEC_PARTS; p++) sum[p] = V(mul)(sum[p], V(splat)(shrink[0]));
            for (size_t d = 0; d < dim; d++) out[d] *= shrink[0];
        }
        highest = tile_highest;
        for (size_t j = count; j < ATTENTION_TILE; j++) score[j] = highest;
        for (size_t j = 0; j < ATTENTION_TILE; j += VEC_LANES)
            V(store)(score + j, V(exp)(V(sub)(V(load)(score + j), V(splat)(highest))));
        memset(score + count, 0, (ATTENTION_TILE - count) * sizeof *score);
        for (size_t j = 0; j < ATTENTION_TILE; j += VEC_LANES)
            sum[j / VEC_LANES % VEC_PARTS] = V(add)(sum[j / VEC_LANES % VEC_PARTS], V(load)(score + j));
        for (size_t j = 0; j < count; j += run) {
            size_t offset = (from + j) % block;
            run = block - offset < count - j ? block - offset : count - j;
            const float *value = values + table[(from + j) / block] * op->page_stride + offset * kv_stride;
            V(add_values)(out, dim, score + j, value, kv_stride, run);
        }
    }
    float total = V(sum16)(sum);
    for (size_t d = 0; d < dim; d++) out[d] /= total;
}

/* Task t is head t % num_heads of row t / num_heads. */
static TARGET void V(attention)(const struct attention *op, size_t begin, size_t end) {
    for (size_t task = begin; task < end; task++) V(attend)(op, task / op->num_heads, task % op->num_heads);
}
