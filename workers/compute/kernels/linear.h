/* Matrix products of float32 rows with stored weights, and the expert step made of three of them.
 * A template: see vector.h for the lanes, kernels.h for the copies. */

/* rows x outs dot products of length n. `rows` and `outs` are constants at every call, so that the accumulators are
 * registers; strides are in floats for x and out, in bytes for the weights. */
INLINE TARGET void V(dot_tile)(const int rows, const int outs, enum weight_format format, const float *x,
                               size_t x_stride, const uint8_t *weight, size_t weight_stride, size_t n, float *out,
                               size_t out_stride) {
    V(vec) sum[MAX_TILE_ROWS * MAX_TILE_OUTS][VEC_PARTS]; /* of row r and output o: r * outs + o */
    for (int t = 0; t < rows * outs; t++)
        for (int p = 0; p < VEC_PARTS; p++) sum[t][p] = V(zero)();
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int p = 0; p < VEC_PARTS; p++) {
            V(vec) w[MAX_TILE_OUTS];
            for (int o = 0; o < outs; o++)
                w[o] = V(load_weights)(format, weight + o * weight_stride, i + p * VEC_LANES);
            for (int r = 0; r < rows; r++) {
                V(vec) a = V(load)(x + r * x_stride + i + p * VEC_LANES);
                for (int o = 0; o < outs; o++) sum[r * outs + o][p] = V(fma)(a, w[o], sum[r * outs + o][p]);
            }
        }
    if (i < n) { /* the last elements, filled up with zeros to the full 16 lanes */
        size_t rest = n - i, size = format_nbytes(format);
        for (int o = 0; o < outs; o++) {
            _Alignas(64) uint8_t padded_weight[64] = {0};
            memcpy(padded_weight, weight + o * weight_stride + i * size, rest * size);
            for (int r = 0; r < rows; r++) {
                _Alignas(64) float padded[16] = {0};
                memcpy(padded, x + r * x_stride + i, rest * sizeof *x);
                for (int p = 0; p < VEC_PARTS; p++)
                    sum[r * outs + o][p] =
                        V(fma)(V(load)(padded + p * VEC_LANES),
                               V(load_weights)(format, padded_weight, p * VEC_LANES), sum[r * outs + o][p]);
            }
        }
    }
    int t = 0;
    for (; t + 4 <= rows * outs; t += 4) {
        float sums[4];
        V(sum16_of_four)(sum + t, sums);
        for (int i = 0; i < 4; i++) out[(t + i) / outs * out_stride + (t + i) % outs] = sums[i];
    }
    for (; t < rows * outs; t++) out[t / outs * out_stride + t % outs] = V(sum16)(sum[t]);
}

/* `rows` rows against all outputs of [begin, end), tile after tile. */
INLINE TARGET void V(dot_rows)(const int rows, const int tile_outs, enum weight_format format, const float *x,
                               size_t x_stride, const uint8_t *weight, size_t weight_stride, size_t n, float *out,
                               size_t out_stride, size_t begin, size_t end) {
    size_t o = begin;
    for (; o + tile_outs <= end; o += tile_outs)
        V(dot_tile)(rows, tile_outs, format, x, x_stride, weight + o * weight_stride, weight_stride, n, out + o,
                    out_stride);
    for (; o < end; o++)
        V(dot_tile)(rows, 1, format, x, x_stride, weight + o * weight_stride, weight_stride, n, out + o, out_stride);
}

/* out[r, o] = x[r] . weight[o] for o in [begin, end). Weights are taken in blocks that stay in the second-level cache
 * while all rows pass over them; a tile's rows of x stay in the first level. */
INLINE TARGET void V(linear_in)(enum weight_format format, const struct linear *op, size_t begin, size_t end) {
    size_t weight_stride = op->inputs * format_nbytes(format);
    size_t block = WEIGHT_BLOCK_BYTES / weight_stride / MAX_TILE_OUTS * MAX_TILE_OUTS;
    if (block < MAX_TILE_OUTS) block = MAX_TILE_OUTS;
    for (size_t from = begin; from < end; from += block) {
        size_t to = end - from < block ? end : from + block, r = 0;
        for (; r + TILE_ROWS <= op->rows; r += TILE_ROWS)
            V(dot_rows)(TILE_ROWS, TILE_OUTS, format, op->x + r * op->inputs, op->inputs, op->weight, weight_stride,
                        op->inputs, op->out + r * op->outputs, op->outputs, from, to);
        for (; r < op->rows; r++)
            V(dot_rows)(1, MAX_TILE_OUTS, format, op->x + r * op->inputs, op->inputs, op->weight, weight_stride,
                        op->inputs, op->out + r * op->outputs, op->outputs, from, to);
    }
}

static TARGET void V(linear)(const struct linear *op, size_t begin, size_t end) {
    if (op->format == FORMAT_FLOAT32) V(linear_in)(FORMAT_FLOAT32, op, begin, end);
    else if (op->format == FORMAT_FLOAT16) V(linear_in)(FORMAT_FLOAT16, op, begin, end);
    else V(linear_in)(FORMAT_BFLOAT16, op, begin, end);
}

/* gate[i] = silu(gate[i]) * up[i], silu(a) = a / (1 + e^-a), for i in [begin, end). Below -88, where e^-a is clamped,
 * a is too: the result is under 1e-36 in size either way. */
static TARGET void V(silu_times)(float *gate, const float *up, size_t begin, size_t end) {
    for (size_t i = begin; i < end; i += VEC_LANES) {
        float padded_gate[VEC_LANES] = {0}, padded_up[VEC_LANES] = {0};
        int whole = i + VEC_LANES <= end;
        if (!whole) {
            memcpy(padded_gate, gate + i, (end - i) * sizeof *gate);
            memcpy(padded_up, up + i, (end - i) * sizeof *up);
        }
        V(vec) a = V(load)(whole ? gate + i : padded_gate), b = V(load)(whole ? up + i : padded_up);
        a = V(max)(V(splat)(-88.0f), a);
        V(vec) one_plus = V(add)(V(splat)(1.0f), V(exp)(V(sub)(V(zero)(), a)));
        V(vec) result = V(mul)(V(div)(a, one_plus), b);
        if (whole) V(store)(gate + i, result);
        else {
            V(store)(padded_gate, result);
            memcpy(gate + i, padded_gate, (end - i) * sizeof *gate);
        }
    }
}
