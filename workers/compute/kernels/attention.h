/* Attention over KV pages in place, in any of their formats. A template: see vector.h for the lanes, kernels.h for the
 * copies.
 *
 * softmax(q K^T / sqrt(head_dim)) V in tiles of ATTENTION_TILE positions counted from 0, with a running maximum and sum
 * (Milakov and Gimelshein 2018; Flash Attention). The tiles depend on the position only, and each score and each lane
 * of the mixture is summed in an order of its own row only, so chunked prefill and decode give the same bits. Stored
 * values become floats as they are loaded, so a page of any format gives the bits of a float32 page with its values.
 *
 * A tile's keys are read for all heads of the part before the next tile's: tokens lie one after another in a page and
 * a head is a small piece of each, which no prefetcher would follow alone. The query heads that share a key-value head
 * are taken up to four at once, so that its rows are loaded and converted once. */

/* Where the rows of one tile's positions lie, for one key-value head. */
struct V(tile_rows) {
    const uint8_t *row[ATTENTION_TILE]; /* those outside [first, end) repeat one inside */
    float scale[ATTENTION_TILE][MAX_HEAD_BLOCKS]; /* of each block, for formats that have them */
};

INLINE TARGET void V(load_scales)(enum kv_format format, struct V(tile_rows) *rows, size_t blocks) {
    _Alignas(64) uint16_t halves[ATTENTION_TILE * MAX_HEAD_BLOCKS];
    _Alignas(64) float floats[ATTENTION_TILE * MAX_HEAD_BLOCKS];
    size_t nbytes = kv_block_nbytes(format);
    for (size_t j = 0; j < ATTENTION_TILE; j++)
        for (size_t b = 0; b < blocks; b++) memcpy(&halves[j * blocks + b], rows->row[j] + b * nbytes, 2);
    for (size_t i = 0; i < ATTENTION_TILE * blocks; i += VEC_LANES) V(store)(floats + i, V(load_f16)(halves + i));
    for (size_t j = 0; j < ATTENTION_TILE; j++)
        for (size_t b = 0; b < blocks; b++) rows->scale[j][b] = floats[j * blocks + b];
}

/* The 16 values from `unit` * 16 on of the tile's row `j`, zeros from `width` on. */
INLINE TARGET void V(load_unit)(enum kv_format format, const struct V(tile_rows) *rows, size_t j, size_t unit,
                                size_t width, V(vec) x[VEC_PARTS]) {
    const uint8_t *row = rows->row[j];
    if (format == KV_Q8_0 || format == KV_Q4_0) {
        V(vec) scale = V(splat)(rows->scale[j][unit / 2]);
        const uint8_t *numbers = row + unit / 2 * kv_block_nbytes(format) + 2;
        if (format == KV_Q8_0) V(load_int8)((const int8_t *)numbers + unit % 2 * 16, x);
        else V(load_int4)(numbers, unit % 2, x);
        for (int p = 0; p < VEC_PARTS; p++) x[p] = V(mul)(x[p], scale);
        return;
    }
    enum weight_format stored = format == KV_FLOAT32   ? FORMAT_FLOAT32
                                : format == KV_FLOAT16 ? FORMAT_FLOAT16
                                                       : FORMAT_BFLOAT16;
    size_t from = unit * 16;
    uint8_t padded[64] = {0}; /* the values beyond may belong to nobody, and be no numbers */
    if (__builtin_expect(from + 16 > width, 0)) {
        memcpy(padded, row + from * format_nbytes(stored), (width - from) * format_nbytes(stored));
        row = padded, from = 0;
    }
    for (int p = 0; p < VEC_PARTS; p++) x[p] = V(load_weights)(stored, row, from + p * VEC_LANES);
}

/* score[query][j] = query . row j, for `queries` queries and `keys` rows from `first` on; the two make 4 together and
 * are constants at every call, so that the accumulators are registers. */
INLINE TARGET void V(score_keys)(const int queries, const int keys, enum kv_format format, const struct V(tile_rows) *rows,
                                 size_t first, size_t units, size_t width, const float *query, float *score) {
    V(vec) sum[4][VEC_PARTS]; /* of query q and key k: q * keys + k */
    for (int t = 0; t < 4; t++)
        for (int p = 0; p < VEC_PARTS; p++) sum[t][p] = V(zero)();
    for (size_t unit = 0; unit < units; unit++)
        for (int k = 0; k < keys; k++) {
            V(vec) x[VEC_PARTS];
            V(load_unit)(format, rows, first + k, unit, width, x);
            for (int q = 0; q < queries; q++)
                for (int p = 0; p < VEC_PARTS; p++)
                    sum[q * keys + k][p] = V(fma)(V(load)(query + (q * units + unit) * 16 + p * VEC_LANES), x[p],
                                                  sum[q * keys + k][p]);
        }
    float sums[4];
    V(sum16_of_four)((const V(vec) (*)[VEC_PARTS])sum, sums);
    for (int t = 0; t < 4; t++) score[t / keys * ATTENTION_TILE + first + t % keys] = sums[t];
}

/* mixed[query][unit ...] += sum over j in [first, end) of weight[query][j] * row j, j ascending. */
INLINE TARGET void V(mix_values)(const int queries, const int units_at_once, enum kv_format format,
                                 const struct V(tile_rows) *rows, size_t first, size_t end, size_t unit, size_t units,
                                 size_t width, const float *weight, float *mixed) {
    V(vec) sum[4][VEC_PARTS]; /* of query q and unit u: q * units_at_once + u */
    for (int t = 0; t < queries * units_at_once; t++)
        for (int p = 0; p < VEC_PARTS; p++)
            sum[t][p] = V(load)(mixed + (t / units_at_once * units + unit + t % units_at_once) * 16 + p * VEC_LANES);
    for (size_t j = first; j < end; j++)
        for (int u = 0; u < units_at_once; u++) {
            V(vec) x[VEC_PARTS];
            V(load_unit)(format, rows, j, unit + u, width, x);
            for (int q = 0; q < queries; q++) {
                V(vec) w = V(splat)(weight[q * ATTENTION_TILE + j]);
                for (int p = 0; p < VEC_PARTS; p++)
                    sum[q * units_at_once + u][p] = V(fma)(w, x[p], sum[q * units_at_once + u][p]);
            }
        }
    for (int t = 0; t < queries * units_at_once; t++)
        for (int p = 0; p < VEC_PARTS; p++)
            V(store)(mixed + (t / units_at_once * units + unit + t % units_at_once) * 16 + p * VEC_LANES, sum[t][p]);
}

/* What is known of one query head after some tiles. */
struct V(softmax) {
    float highest;
    V(vec) sum[VEC_PARTS];
};

/* Scores in [first, end) become weights relative to the highest score so far, others 0; what was mixed before shrinks
 * with it. */
INLINE TARGET void V(weigh)(struct V(softmax) *state, float *score, size_t first, size_t end, float *mixed,
                            size_t units) {
    for (size_t j = 0; j < first; j++) score[j] = -INFINITY;
    for (size_t j = end; j < ATTENTION_TILE; j++) score[j] = -INFINITY;
    V(vec) high = V(splat)(state->highest);
    for (size_t j = 0; j < ATTENTION_TILE; j += VEC_LANES) high = V(max)(V(load)(score + j), high);
    float lanes[VEC_LANES], highest = state->highest;
    V(store)(lanes, high);
    for (int l = 0; l < VEC_LANES; l++)
        if (lanes[l] > highest) highest = lanes[l];
    if (highest > state->highest) {
        V(vec) shrink = V(exp)(V(splat)(state->highest - highest));
        for (int p = 0; p < VEC_PARTS; p++) state->sum[p] = V(mul)(state->sum[p], shrink);
        for (size_t d = 0; d < units * 16; d += VEC_LANES) V(store)(mixed + d, V(mul)(V(load)(mixed + d), shrink));
        state->highest = highest;
    }
    for (size_t j = 0; j < ATTENTION_TILE; j += VEC_LANES)
        V(store)(score + j, V(exp)(V(sub)(V(load)(score + j), V(splat)(highest))));
    memset(score, 0, first * sizeof *score); /* the exponential of -inf is tiny, not 0 */
    memset(score + end, 0, (ATTENTION_TILE - end) * sizeof *score);
    for (size_t j = 0; j < ATTENTION_TILE; j += VEC_LANES)
        state->sum[j / VEC_LANES % VEC_PARTS] = V(add)(state->sum[j / VEC_LANES % VEC_PARTS], V(load)(score + j));
}

/* One tile for `queries` query heads (1, 2 or 4) that share a key-value head. */
INLINE TARGET void V(attend_tile)(const int queries, enum kv_format format, const struct V(tile_rows) *keys,
                                  const struct V(tile_rows) *values, size_t first, size_t end, size_t units,
                                  size_t width, const float *query, struct V(softmax) *state, float *mixed) {
    _Alignas(64) float score[4 * ATTENTION_TILE];
    for (size_t j = first / 4 * 4; j < end; j += 4 / queries)
        V(score_keys)(queries, 4 / queries, format, keys, j, units, width, query, score);
    for (int q = 0; q < queries; q++)
        V(weigh)(state + q, score + q * ATTENTION_TILE, first, end, mixed + q * units * 16, units);
    size_t unit = 0;
    for (; unit + 4 / queries <= units; unit += 4 / queries)
        V(mix_values)(queries, 4 / queries, format, values, first, end, unit, units, width, score, mixed);
    for (; unit < units; unit++)
        V(mix_values)(queries, 1, format, values, first, end, unit, units, width, score, mixed);
}

/* Query heads [head, head_end) of one row. */
INLINE TARGET void V(attend)(enum kv_format format, const struct attention *op, size_t row, size_t head,
                             size_t head_end) {
    const struct kv_pages *pages = &op->pages;
    size_t dim = pages->head_dim, units = attention_units(format, dim), group = op->num_heads / pages->num_kv_heads;
    size_t block = pages->block_size, head_nbytes = kv_row_nbytes(format, dim);
    size_t token_nbytes = pages->num_kv_heads * head_nbytes, layer_nbytes = 2 * block * token_nbytes;
    size_t end = (size_t)pages->positions[row] + 1, start = attention_start(op, row);
    const uint32_t *table = pages->tables + pages->table_starts[row];
    size_t count = head_end - head;

    _Alignas(64) float query[ATTENTION_FLOATS], mixed[ATTENTION_FLOATS]; /* [count][units * 16] */
    struct V(softmax) state[ATTENTION_HEADS];
    memset(query, 0, count * units * 16 * sizeof *query);
    memset(mixed, 0, count * units * 16 * sizeof *mixed);
    for (size_t h = 0; h < count; h++) {
        const float *from = op->queries + (row * op->num_heads + head + h) * dim;
        for (size_t d = 0; d < dim; d++) query[h * units * 16 + d] = from[d] * op->scale;
        state[h].highest = -INFINITY;
        for (int p = 0; p < VEC_PARTS; p++) state[h].sum[p] = V(zero)();
    }
    for (size_t from = start / ATTENTION_TILE * ATTENTION_TILE; from < end; from += ATTENTION_TILE) {
        size_t tile_first = start > from ? start - from : 0;
        size_t tile_end = end - from < ATTENTION_TILE ? end - from : ATTENTION_TILE;
        const uint8_t *token[ATTENTION_TILE];
        for (size_t j = 0; j < ATTENTION_TILE; j++) {
            size_t position = from + (j < tile_first ? tile_first : j < tile_end ? j : tile_end - 1);
            token[j] = pages->bytes + table[position / block] * pages->page_stride + pages->layer * layer_nbytes +
                       position % block * token_nbytes;
        }
        for (size_t h = 0, at_once; h < count; h += at_once) {
            size_t kv_head = (head + h) / group, shared = (kv_head + 1) * group - (head + h);
            if (shared > count - h) shared = count - h;
            struct V(tile_rows) keys, values;
            for (size_t j = 0; j < ATTENTION_TILE; j++) {
                keys.row[j] = token[j] + kv_head * head_nbytes;
                values.row[j] = keys.row[j] + block * token_nbytes;
            }
            if (format == KV_Q8_0 || format == KV_Q4_0) {
                V(load_scales)(format, &keys, units / 2);
                V(load_scales)(format, &values, units / 2);
            }
            for (size_t done = 0, step; done < shared; done += step) {
                float *q = query + (h + done) * units * 16, *m = mixed + (h + done) * units * 16;
                struct V(softmax) *s = state + h + done;
                step = shared - done >= 4 ? 4 : shared - done >= 2 ? 2 : 1;
                if (step == 4)
                    V(attend_tile)(4, format, &keys, &values, tile_first, tile_end, units, dim, q, s, m);
                else if (step == 2)
                    V(attend_tile)(2, format, &keys, &values, tile_first, tile_end, units, dim, q, s, m);
                else V(attend_tile)(1, format, &keys, &values, tile_first, tile_end, units, dim, q, s, m);
            }
            at_once = shared;
        }
    }
    for (size_t h = 0; h < count; h++) {
        float total = V(sum16)(state[h].sum), *out = op->out + (row * op->num_heads + head + h) * dim;
        for (size_t d = 0; d < dim; d++) out[d] = mixed[h * units * 16 + d] / total;
    }
}

/* Task t is head t % num_heads of row t / num_heads; as many heads of a row at once as there is room for. */
INLINE TARGET void V(attention_in)(enum kv_format format, const struct attention *op, size_t begin, size_t end) {
    size_t most = ATTENTION_FLOATS / (16 * attention_units(format, op->pages.head_dim));
    if (most > ATTENTION_HEADS) most = ATTENTION_HEADS;
    while (begin < end) {
        size_t row = begin / op->num_heads, head = begin % op->num_heads, count = op->num_heads - head;
        if (count > end - begin) count = end - begin;
        if (count > most) count = most;
        V(attend)(format, op, row, head, head + count);
        begin += count;
    }
}

static TARGET void V(attention)(const struct attention *op, size_t begin, size_t end) {
    switch (op->pages.format) {
    case KV_FLOAT32: V(attention_in)(KV_FLOAT32, op, begin, end); break;
    case KV_FLOAT16: V(attention_in)(KV_FLOAT16, op, begin, end); break;
    case KV_BFLOAT16: V(attention_in)(KV_BFLOAT16, op, begin, end); break;
    case KV_Q8_0: V(attention_in)(KV_Q8_0, op, begin, end); break;
    default: V(attention_in)(KV_Q4_0, op, begin, end);
    }
}
