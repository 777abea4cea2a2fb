/* Attention over KV pages in place, in any of their formats. A template: see vector.h for the lanes, kernels.c for the
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

/* The rows of one tile's positions for one key-value head; positions outside the part of the tile that is seen repeat
 * one inside. `next` is as large a share of the next tile's rows, of all heads of the pass in the order of their
 * addresses, to be fetched meanwhile: in that order memory gives them twice as fast as head after head. */
struct V(tile_rows) {
    const uint8_t *row[ATTENTION_TILE], *next[ATTENTION_TILE];
};

/* Into the second-level cache: the first has too few fill buffers to keep memory busy. */
INLINE void V(fetch_next)(enum kv_format format, const struct V(tile_rows) *rows, size_t j, size_t width) {
    const uint8_t *next = rows->next[j];
    for (size_t i = 0; i < kv_row_nbytes(format, width); i += 64) __builtin_prefetch(next + i, 0, 2);
}

/* A row's last values, of single ones, filled up with zeros to a block: what lies beyond may belong to nobody. */
static __attribute__((noinline, cold)) void V(copy_last)(enum weight_format format, const uint8_t *row, size_t from,
                                                         size_t width, uint8_t *block) {
    size_t size = format_block_nbytes(format);
    memset(block, 0, BLOCK_VALUES * size);
    if (from < width) memcpy(block, row + from * size, (width - from) * size);
}

/* 16 values of a row, those from (2 * block + half) * 16 on, zeros from `width` on. `half` is a constant. */
INLINE TARGET void V(load_half)(enum kv_format kv_format, const uint8_t *row, size_t block, const int half,
                                size_t width, V(vec) x[VEC_PARTS]) {
    enum weight_format format = (enum weight_format)kv_format; /* they agree: see kernels.c */
    _Alignas(64) uint8_t last[BLOCK_VALUES * MAX_VALUE_NBYTES];
    if (format_values_per_block(format) == 1 && __builtin_expect((2 * block + half + 1) * 16 > width, 0)) {
        V(copy_last)(format, row, block * BLOCK_VALUES, width, last);
        row = last, block = 0;
    }
    V(vec) scale = V(load_scale)(format, row, NULL, block);
    for (int p = 0; p < VEC_PARTS; p++) x[p] = V(load_part)(format, row, block, half * VEC_PARTS + p, scale);
}

/* score[query][j] = query . row j, for `queries` queries and `keys` rows from `first` on; the two make 4 together and
 * are constants at every call, so that the accumulators are registers. */
INLINE TARGET void V(score_keys)(const int queries, const int keys, enum kv_format format,
                                 const struct V(tile_rows) *rows, size_t first, size_t blocks, size_t width,
                                 const float *query, float *score) {
    V(vec) sum[4][VEC_PARTS]; /* of query q and key k: q * keys + k */
    for (int t = 0; t < 4; t++)
        for (int p = 0; p < VEC_PARTS; p++) sum[t][p] = V(zero)();
    for (int k = 0; k < keys; k++) V(fetch_next)(format, rows, first + k, width);
    for (size_t block = 0; block < blocks; block++)
        for (int k = 0; k < keys; k++)
            for (int half = 0; half < 2; half++) {
                V(vec) x[VEC_PARTS];
                V(load_half)(format, rows->row[first + k], block, half, width, x);
                for (int q = 0; q < queries; q++)
                    for (int p = 0; p < VEC_PARTS; p++)
                        sum[q * keys + k][p] =
                            V(fma)(V(load)(query + (q * blocks + block) * 32 + half * 16 + p * VEC_LANES), x[p],
                                   sum[q * keys + k][p]);
            }
    float sums[4];
    V(sum16_of_four)((const V(vec) (*)[VEC_PARTS])sum, sums);
    for (int t = 0; t < 4; t++) score[t / keys * ATTENTION_TILE + first + t % keys] = sums[t];
}

/* mixed[query][i] += sum over j in [first, end) of weight[query][j] * row j [i], j ascending, for the `halves` * 16 values
 * from (2 * block + half) * 16 on. `queries`, `halves` and `half` are constants at every call. */
INLINE TARGET void V(mix_values)(const int queries, const int halves, enum kv_format format,
                                 const struct V(tile_rows) *rows, size_t first, size_t end, size_t block,
                                 const int half, size_t blocks, size_t width, const float *weight, float *mixed) {
    V(vec) sum[4][VEC_PARTS]; /* of query q and half h: q * halves + h */
    mixed += (2 * block + half) * 16;
    for (int t = 0; t < queries * halves; t++)
        for (int p = 0; p < VEC_PARTS; p++)
            sum[t][p] = V(load)(mixed + t / halves * blocks * 32 + t % halves * 16 + p * VEC_LANES);
    for (size_t j = first; j < end; j++) {
        if (block == 0 && half == 0) V(fetch_next)(format, rows, j, width);
        for (int h = 0; h < halves; h++) {
            V(vec) x[VEC_PARTS];
            V(load_half)(format, rows->row[j], block + (half + h) / 2, (half + h) % 2, width, x);
            for (int q = 0; q < queries; q++) {
                V(vec) w = V(splat)(weight[q * ATTENTION_TILE + j]);
                for (int p = 0; p < VEC_PARTS; p++)
                    sum[q * halves + h][p] = V(fma)(w, x[p], sum[q * halves + h][p]);
            }
        }
    }
    for (int t = 0; t < queries * halves; t++)
        for (int p = 0; p < VEC_PARTS; p++)
            V(store)(mixed + t / halves * blocks * 32 + t % halves * 16 + p * VEC_LANES, sum[t][p]);
}

/* What is known of one query head after some tiles. */
struct V(softmax) {
    float highest;
    V(vec) sum[VEC_PARTS];
};

/* With a sink: its weight relative to itself, which is 1, is summed already. */
static TARGET void V(start_softmax)(struct V(softmax) *state, const float *sink) {
    float sum[16] = {sink ? 1.0f : 0.0f};
    state->highest = sink ? *sink : -INFINITY;
    for (int p = 0; p < VEC_PARTS; p++) state->sum[p] = V(load)(sum + p * VEC_LANES);
}

/* Scores in [first, end) become weights relative to the highest score so far, others 0; what was mixed before shrinks
 * with it. */
static TARGET __attribute__((noinline)) void V(weigh)(struct V(softmax) *state, float *score, size_t first,
                                                      size_t end, float *mixed, size_t blocks) {
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
        for (size_t d = 0; d < blocks * 32; d += VEC_LANES) V(store)(mixed + d, V(mul)(V(load)(mixed + d), shrink));
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
                                  const struct V(tile_rows) *values, size_t first, size_t end, size_t blocks,
                                  size_t width, const float *query, struct V(softmax) *state, float *mixed) {
    _Alignas(64) float score[4 * ATTENTION_TILE];
    for (size_t j = first / 4 * 4; j < end; j += 4 / queries)
        V(score_keys)(queries, 4 / queries, format, keys, j, blocks, width, query, score);
    for (int q = 0; q < queries; q++)
        V(weigh)(state + q, score + q * ATTENTION_TILE, first, end, mixed + q * blocks * 32, blocks);
    size_t block = 0;
    if (queries == 1)
        for (; block + 2 <= blocks; block += 2)
            V(mix_values)(1, 4, format, values, first, end, block, 0, blocks, width, score, mixed);
    for (; block < blocks; block++)
        if (queries == 4) {
            V(mix_values)(queries, 1, format, values, first, end, block, 0, blocks, width, score, mixed);
            V(mix_values)(queries, 1, format, values, first, end, block, 1, blocks, width, score, mixed);
        } else V(mix_values)(queries, 2, format, values, first, end, block, 0, blocks, width, score, mixed);
}

/* attend_tile for each format and number of queries, compiled apart: one function of all of them takes compilers
 * minutes. The portable copy has one, slow to run and quick to compile. */
typedef void V(tile_function)(enum kv_format, const struct V(tile_rows) *, const struct V(tile_rows) *, size_t, size_t,
                              size_t, size_t, const float *, struct V(softmax) *, float *);
#define TILE_FUNCTION(name, queries, constant_format)                                                                 \
    static TARGET __attribute__((noinline)) void V(name)(                                                             \
        enum kv_format format, const struct V(tile_rows) *keys, const struct V(tile_rows) *values, size_t first,      \
        size_t end, size_t blocks, size_t width, const float *query, struct V(softmax) *state, float *mixed) {        \
        (void)format;                                                                                                 \
        V(attend_tile)(queries, constant_format, keys, values, first, end, blocks, width, query, state, mixed);       \
    }
#if VECTOR_ISA
#define MAX_QUERIES 4
#define TILE_FUNCTIONS(format) \
    TILE_FUNCTION(tile_1_##format, 1, format) \
    TILE_FUNCTION(tile_2_##format, 2, format) \
    TILE_FUNCTION(tile_4_##format, 4, format)
TILE_FUNCTIONS(KV_FLOAT32)
TILE_FUNCTIONS(KV_FLOAT16)
TILE_FUNCTIONS(KV_BFLOAT16)
TILE_FUNCTIONS(KV_Q8_0)
TILE_FUNCTIONS(KV_Q4_0)
#define EACH_QUERIES(format) [format] = {V(tile_1_##format), V(tile_2_##format), V(tile_4_##format)}
static V(tile_function) *const V(tile_functions)[KV_FORMAT_COUNT][3] = {
    EACH_QUERIES(KV_FLOAT32), EACH_QUERIES(KV_FLOAT16), EACH_QUERIES(KV_BFLOAT16), EACH_QUERIES(KV_Q8_0),
    EACH_QUERIES(KV_Q4_0),
};
#undef TILE_FUNCTIONS
#undef EACH_QUERIES
#else
#define MAX_QUERIES 1
TILE_FUNCTION(tile_1, 1, format)
static V(tile_function) *const V(tile_functions)[KV_FORMAT_COUNT][1] = {
    {V(tile_1)}, {V(tile_1)}, {V(tile_1)}, {V(tile_1)}, {V(tile_1)},
};
#endif
#undef TILE_FUNCTION

/* Query heads [head, head_end) of one row. */
static TARGET void V(attend)(const struct attention *op, size_t row, size_t head, size_t head_end) {
    const struct kv_pages *pages = &op->pages;
    enum kv_format format = pages->format;
    size_t dim = pages->head_dim, blocks = attention_blocks(dim), group = op->num_heads / pages->num_kv_heads;
    size_t block = pages->block_size, head_nbytes = kv_row_nbytes(format, dim);
    size_t token_nbytes = pages->num_kv_heads * head_nbytes, layer_nbytes = 2 * block * token_nbytes;
    size_t end = (size_t)pages->positions[row] + 1, start = attention_start(op, row);
    const uint32_t *table = pages->tables + pages->table_starts[row];
    size_t count = head_end - head, first_kv_head = head / group, kv_heads = (head_end - 1) / group + 1 - first_kv_head;

    _Alignas(64) float query[ATTENTION_FLOATS], mixed[ATTENTION_FLOATS]; /* [count][blocks * 32] */
    struct V(softmax) state[ATTENTION_HEADS];
    memset(query, 0, count * blocks * 32 * sizeof *query);
    memset(mixed, 0, count * blocks * 32 * sizeof *mixed);
    for (size_t h = 0; h < count; h++) {
        const float *from = op->queries + (row * op->num_heads + head + h) * dim;
        for (size_t d = 0; d < dim; d++) query[h * blocks * 32 + d] = from[d] * op->scale;
        V(start_softmax)(state + h, op->sinks ? op->sinks + head + h : NULL);
    }
    for (size_t from = start / ATTENTION_TILE * ATTENTION_TILE; from < end; from += ATTENTION_TILE) {
        size_t tile_first = start > from ? start - from : 0;
        size_t tile_end = end - from < ATTENTION_TILE ? end - from : ATTENTION_TILE;
        const uint8_t *token[2 * ATTENTION_TILE]; /* of this tile and of the next */
        for (size_t j = 0; j < 2 * ATTENTION_TILE; j++) {
            size_t position = from + (j < tile_first ? tile_first : j);
            if (position >= end) position = end - 1;
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
                size_t piece = (kv_head - first_kv_head) * ATTENTION_TILE + j; /* in the order of their addresses */
                keys.next[j] = token[ATTENTION_TILE + piece / kv_heads] + (first_kv_head + piece % kv_heads) * head_nbytes;
                values.next[j] = keys.next[j] + block * token_nbytes;
            }
            for (size_t done = 0, step; done < shared; done += step) {
                float *q = query + (h + done) * blocks * 32, *m = mixed + (h + done) * blocks * 32;
                struct V(softmax) *s = state + h + done;
                int queries = shared - done >= 4 && MAX_QUERIES >= 4 ? 4 : shared - done >= 2 && MAX_QUERIES >= 2 ? 2 : 1;
                V(tile_functions)[format][queries / 2](format, &keys, &values, tile_first, tile_end, blocks, dim, q, s, m);
                step = (size_t)queries;
            }
            at_once = shared;
        }
    }
    for (size_t h = 0; h < count; h++) {
        float total = V(sum16)(state[h].sum), *out = op->out + (row * op->num_heads + head + h) * dim;
        for (size_t d = 0; d < dim; d++) out[d] = mixed[h * blocks * 32 + d] / total;
    }
}

/* Task t is head t % num_heads of row t / num_heads; as many heads of a row at once as there is room for. */
static TARGET void V(attention)(const struct attention *op, size_t begin, size_t end) {
    size_t most = ATTENTION_FLOATS / (32 * attention_blocks(op->pages.head_dim));
    if (most > ATTENTION_HEADS) most = ATTENTION_HEADS;
    while (begin < end) {
        size_t row = begin / op->num_heads, head = begin % op->num_heads, count = op->num_heads - head;
        if (count > end - begin) count = end - begin;
        if (count > most) count = most;
        V(attend)(op, row, head, head + count);
        begin += count;
    }
}
#undef MAX_QUERIES
