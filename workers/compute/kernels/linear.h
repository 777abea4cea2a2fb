/* Matrix products of float32 rows with stored weights. A template: see vector.h for the lanes, kernels.c for the copies.
 *
 * AVX512-BF16 and VNNI are not used. One row waits for memory either way. For 32 rows, tiles written by hand, measured in
 * turns on one core of a Sapphire Rapids, billions of multiply-adds per second and largest error against the largest
 * result: bfloat16 weights by these products 38.7 and 3e-7, by vdpbf16ps 33.6 and 2e-3, because activations have to
 * become bfloat16, and as sums of two bfloat16 each 20.4 and 3e-6. Q8_0 weights by these products 28.9 and 2e-7, by
 * vpdpbusd 31.1 and 2e-5, with activations as two bytes each and a scale for every 32 of them. */

/* Adds to each of rows x outs sums the products of one block of 32 elements, 16 lanes at a time. */
INLINE TARGET void V(dot_block)(const int rows, const int outs, enum weight_format format, const float *x,
                                size_t x_stride, struct matrix weight, size_t block,
                                V(vec) sum[MAX_TILE_ROWS * MAX_TILE_OUTS][VEC_PARTS]) {
    V(vec) scale[MAX_TILE_OUTS];
    for (int o = 0; o < outs; o++)
        scale[o] = V(load_scale)(format, weight.bytes + o * weight.row_stride, weight.scales + o * weight.scale_stride,
                                 block);
    for (int part = 0; part < BLOCK_PARTS; part++) {
        V(vec) w[MAX_TILE_OUTS];
        for (int o = 0; o < outs; o++)
            w[o] = V(load_part)(format, weight.bytes + o * weight.row_stride, block, part, scale[o]);
        for (int r = 0; r < rows; r++) {
            V(vec) a = V(load)(x + r * x_stride + part * VEC_LANES);
            for (int o = 0; o < outs; o++) {
                V(vec) *lanes = &sum[r * outs + o][part % VEC_PARTS];
                *lanes = V(fma)(a, w[o], *lanes);
            }
        }
    }
}

/* Asks memory for as much of the next tile's weights as a block is of this one's. With one row the processor does not run
 * ahead far enough by itself, and its own prefetching stops at every page, which is every few rows of weights. Lines of
 * the cache that hold a whole part of a block are asked for row after row, in the order in which they will be used;
 * smaller blocks, which share lines, from the first to the last line of the tile, each once. `share` is what of the tile
 * belongs to a block. */
INLINE void V(fetch_next_tile)(const int outs, enum weight_format format, struct matrix weight, size_t block,
                               size_t share) {
    size_t nbytes = BLOCK_VALUES / format_values_per_block(format) * format_block_nbytes(format);
    const uint8_t *next = matrix_from_row(weight, (size_t)outs).bytes;
    if (nbytes < 64) {
        for (size_t at = 0; at < outs * nbytes; at += 64) __builtin_prefetch(next + block * share + at);
        return;
    }
    for (int o = 0; o < outs; o++)
        for (size_t at = 0; at < nbytes; at += 64)
            __builtin_prefetch(next + o * weight.row_stride + block * nbytes + at);
}

/* rows x outs dot products of length n. `rows` and `outs` are constants at every call, so that the accumulators are
 * registers; the strides of x and out are in floats. `format` is weight.format as a constant. */
INLINE TARGET void V(dot_tile)(const int rows, const int outs, enum weight_format format, const float *x,
                               size_t x_stride, struct matrix weight, size_t n, float *out, size_t out_stride) {
    V(vec) sum[MAX_TILE_ROWS * MAX_TILE_OUTS][VEC_PARTS]; /* of row r and output o: r * outs + o */
    for (int t = 0; t < rows * outs; t++)
        for (int p = 0; p < VEC_PARTS; p++) sum[t][p] = V(zero)();
    size_t block = 0, blocks = n / BLOCK_VALUES, rest = n % BLOCK_VALUES;
    size_t share = blocks ? outs * weight.row_stride / blocks : 0;
    for (; block < blocks; block++) {
        if (rows == 1) V(fetch_next_tile)(outs, format, weight, block, share);
        V(dot_block)(rows, outs, format, x + block * BLOCK_VALUES, x_stride, weight, block, sum);
    }
    if (rest && format_values_per_block(format) == 1) { /* the last values, filled up with zeros to a block */
        _Alignas(64) float last_x[MAX_TILE_ROWS][BLOCK_VALUES] = {{0}};
        _Alignas(64) uint8_t last_weight[MAX_TILE_OUTS][BLOCK_VALUES * MAX_VALUE_NBYTES] = {{0}};
        size_t size = format_block_nbytes(format), done = n - rest;
        for (int r = 0; r < rows; r++) memcpy(last_x[r], x + r * x_stride + done, rest * sizeof *x);
        for (int o = 0; o < outs; o++)
            memcpy(last_weight[o], weight.bytes + o * weight.row_stride + done * size, rest * size);
        struct matrix last = {format, last_weight[0], sizeof *last_weight, NULL, 0};
        V(dot_block)(rows, outs, format, last_x[0], BLOCK_VALUES, last, 0, sum);
    }
    int t = 0;
    for (; t + 4 <= rows * outs; t += 4) {
        float sums[4];
        V(sum16_of_four)(sum + t, sums);
        for (int i = 0; i < 4; i++) out[(t + i) / outs * out_stride + (t + i) % outs] = sums[i];
    }
    for (; t < rows * outs; t++) out[t / outs * out_stride + t % outs] = V(sum16)(sum[t]);
}

/* `rows` rows from `row` on against the outputs of [begin, end), tile after tile. */
INLINE TARGET void V(dot_rows)(const int rows, const int tile_outs, enum weight_format format, const struct linear *op,
                               size_t row, size_t begin, size_t end) {
    const float *x = op->x + row * op->inputs;
    float *out = op->out + row * op->outputs;
    size_t o = begin;
    for (; o + tile_outs <= end; o += tile_outs)
        V(dot_tile)(rows, tile_outs, format, x, op->inputs, matrix_from_row(op->weight, o), op->inputs, out + o,
                    op->outputs);
    for (; o < end; o++)
        V(dot_tile)(rows, 1, format, x, op->inputs, matrix_from_row(op->weight, o), op->inputs, out + o, op->outputs);
}

/* out[r, o] = x[r] . weight[o] for o in [begin, end). Weights are taken in blocks that stay in the second-level cache
 * while all rows pass over them; a tile's rows of x stay in the first level. */
INLINE TARGET void V(linear_in)(enum weight_format format, const struct linear *op, size_t begin, size_t end) {
    size_t block = WEIGHT_BLOCK_BYTES / op->weight.row_stride / MAX_TILE_OUTS * MAX_TILE_OUTS;
    if (block < MAX_TILE_OUTS) block = MAX_TILE_OUTS;
    for (size_t from = begin; from < end; from += block) {
        size_t to = end - from < block ? end : from + block, r = 0;
        for (; r + TILE_ROWS <= op->rows; r += TILE_ROWS) V(dot_rows)(TILE_ROWS, TILE_OUTS, format, op, r, from, to);
        for (; r < op->rows; r++) V(dot_rows)(1, MAX_TILE_OUTS, format, op, r, from, to);
    }
}

/* linear_in for each format, compiled apart: compilers take longest over one function of all of them. */
#define LINEAR_FUNCTION(format) \
    static TARGET __attribute__((noinline)) void V(linear_##format)(const struct linear *op, size_t begin, size_t end) { \
        V(linear_in)(format, op, begin, end); \
    }
LINEAR_FUNCTION(FORMAT_FLOAT32)
LINEAR_FUNCTION(FORMAT_FLOAT16)
LINEAR_FUNCTION(FORMAT_BFLOAT16)
LINEAR_FUNCTION(FORMAT_Q8_0)
LINEAR_FUNCTION(FORMAT_Q4_0)
LINEAR_FUNCTION(FORMAT_MXFP4)
LINEAR_FUNCTION(FORMAT_MXFP4_GGML)
#undef LINEAR_FUNCTION

static void V(linear)(const struct linear *op, size_t begin, size_t end) {
    switch (op->weight.format) {
    case FORMAT_FLOAT32: V(linear_FORMAT_FLOAT32)(op, begin, end); break;
    case FORMAT_FLOAT16: V(linear_FORMAT_FLOAT16)(op, begin, end); break;
    case FORMAT_BFLOAT16: V(linear_FORMAT_BFLOAT16)(op, begin, end); break;
    case FORMAT_Q8_0: V(linear_FORMAT_Q8_0)(op, begin, end); break;
    case FORMAT_Q4_0: V(linear_FORMAT_Q4_0)(op, begin, end); break;
    case FORMAT_MXFP4: V(linear_FORMAT_MXFP4)(op, begin, end); break;
    case FORMAT_MXFP4_GGML: V(linear_FORMAT_MXFP4_GGML)(op, begin, end); break;
    case FORMAT_COUNT: break;
    }
}
