/* Matrix products of float32 rows with stored weights that have a row for each input. A template: see vector.h for the
 * lanes, kernels.c for the copies.
 *
 * Outputs are taken in blocks of 32, whose sums are registers while all inputs pass, ascending. Weights are few here (a
 * head's share of a projection), so a block's column of them is still in the cache for the next rows. */

/* The `block`th 32 outputs of `rows` rows from x and out on. `rows` and `format` are constants at every call. */
INLINE TARGET void V(transposed_tile)(const int rows, enum weight_format format, const struct linear_transposed *op,
                                      const float *x, float *out, size_t block) {
    V(vec) sum[MAX_TILE_ROWS][BLOCK_PARTS];
    for (int r = 0; r < rows; r++)
        for (int part = 0; part < BLOCK_PARTS; part++) sum[r][part] = V(zero)();
    size_t width = op->outputs - block * BLOCK_VALUES, nbytes = op->weight.row_stride;
    int whole = width >= BLOCK_VALUES;
    _Alignas(64) uint8_t last[BLOCK_VALUES * MAX_VALUE_NBYTES] = {0};
    size_t size = format_block_nbytes(format);
    for (size_t i = 0; i < op->inputs; i++) {
        const uint8_t *row = op->weight.bytes + i * nbytes;
        size_t at = block;
        if (!whole) { /* the last outputs, filled up to a block; only rows of single values end in one */
            memcpy(last, row + block * BLOCK_VALUES * size, width * size);
            row = last, at = 0;
        }
        V(vec) scale = V(load_scale)(format, row, op->weight.scales + i * op->weight.scale_stride, at);
        for (int part = 0; part < BLOCK_PARTS; part++) {
            V(vec) w = V(load_part)(format, row, at, part, scale);
            for (int r = 0; r < rows; r++)
                sum[r][part] = V(fma)(V(splat)(x[(size_t)r * op->inputs + i]), w, sum[r][part]);
        }
    }
    for (int r = 0; r < rows; r++) {
        _Alignas(64) float values[BLOCK_VALUES];
        for (int part = 0; part < BLOCK_PARTS; part++) V(store)(values + part * VEC_LANES, sum[r][part]);
        memcpy(out + (size_t)r * op->outputs + block * BLOCK_VALUES, values,
               (whole ? BLOCK_VALUES : width) * sizeof *values);
    }
}

/* Blocks [begin, end) of the outputs. */
INLINE TARGET void V(transposed_in)(enum weight_format format, const struct linear_transposed *op, size_t begin,
                                    size_t end) {
    for (size_t block = begin; block < end; block++) {
        size_t r = 0;
        for (; r + TILE_ROWS <= op->rows; r += TILE_ROWS)
            V(transposed_tile)(TILE_ROWS, format, op, op->x + r * op->inputs, op->out + r * op->outputs, block);
        for (; r < op->rows; r++)
            V(transposed_tile)(1, format, op, op->x + r * op->inputs, op->out + r * op->outputs, block);
    }
}

static TARGET void V(linear_transposed)(const struct linear_transposed *op, size_t begin, size_t end) {
    switch (op->weight.format) {
    case FORMAT_FLOAT32: V(transposed_in)(FORMAT_FLOAT32, op, begin, end); break;
    case FORMAT_FLOAT16: V(transposed_in)(FORMAT_FLOAT16, op, begin, end); break;
    case FORMAT_BFLOAT16: V(transposed_in)(FORMAT_BFLOAT16, op, begin, end); break;
    case FORMAT_Q8_0: V(transposed_in)(FORMAT_Q8_0, op, begin, end); break;
    case FORMAT_Q4_0: V(transposed_in)(FORMAT_Q4_0, op, begin, end); break;
    case FORMAT_MXFP4: V(transposed_in)(FORMAT_MXFP4, op, begin, end); break;
    case FORMAT_MXFP4_GGML: V(transposed_in)(FORMAT_MXFP4_GGML, op, begin, end); break;
    case FORMAT_COUNT: break;
    }
}
