/* Attention over KV pages in place, in any of their formats. A template: see vector.h for the lanes, kernels.c for the
 * copies.
 *
 * softmax(scale * q K^T) V in tiles of ATTENTION_TILE positions counted from 0, with a running maximum and sum
 * (Milakov and Gimelshein 2018; Flash Attention). The tiles depend on the position only, and each score and each lane
 * of the mixture is summed in an order of its own row only, so chunked prefill and decode give the same bits. Stored
 * values become floats as they are loaded, so a page of any format gives the bits of a float32 page with its values.
 *
 * Memory gives a tile fastest in the order of its addresses, so the keys of four positions are read for all heads of
 * the pass before the next four's, and the values likewise. The query heads that share a key-value head are taken up to
 * four at once, so that its rows are loaded and converted once. */

/* One tile's rows in the order in which they are read: keys, values, and the first keys of the next tile, which are only
 * fetched. Each is a token's row of the pass's first key-value head; positions outside [first, end), the part of the
 * tile that is seen, repeat one inside. */
struct V(tile) {
    const uint8_t *row[2 * ATTENTION_TILE + FETCH_AHEAD];
    size_t first, end;
};

/* What is known of one query head after some tiles. */
struct V(softmax) {
    float highest;
    V(vec) sum[VEC_PARTS];
};

/* The heads that read the rows together: `kv_heads` key-value heads with `shared` query heads each, of `blocks` * 32
 * values of which `width` are not padding. Of values, `mixed_blocks` blocks are mixed. */
struct V(pass) {
    size_t kv_heads, shared, blocks, width, head_nbytes, mixed_blocks;
    float *query, *mixed;       /* [kv_heads][shared][blocks * 32] */
    struct V(softmax) *softmax; /* [kv_heads][shared] */
};

/* Hardware prefetching ends with every 4 KiB of a stream, and does not translate the next one's address. */
INLINE void V(fetch)(const uint8_t *row, size_t nbytes) {
    for (size_t i = 0; i < nbytes; i += 64) __builtin_prefetch(row + i, 0, 2);
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

/* score[query][k] = query . row k, for `queries` queries and the rows `offset` bytes behind row[0] ... row[keys - 1]; the
 * two make 4 together and are constants at every call, so that the accumulators are registers. */
INLINE TARGET void V(score_keys)(const int queries, const int keys, enum kv_format format, const uint8_t *const *row,
                                 size_t offset, size_t fetched, size_t blocks, size_t width, const float *query,
                                 float *score) {
    V(vec) sum[4][VEC_PARTS]; /* of query q and key k: q * keys + k */
    for (int t = 0; t < 4; t++)
        for (int p = 0; p < VEC_PARTS; p++) sum[t][p] = V(zero)();
    for (int k = 0; k < keys; k++) V(fetch)(row[k + FETCH_AHEAD] + offset, fetched);
    for (size_t block = 0; block < blocks; block++)
        for (int k = 0; k < keys; k++)
            for (int half = 0; half < 2; half++) {
                V(vec) x[VEC_PARTS];
                V(load_half)(format, row[k] + offset, block, half, width, x);
                for (int q = 0; q < queries; q++)
                    for (int p = 0; p < VEC_PARTS; p++)
                        sum[q * keys + k][p] =
                            V(fma)(V(load)(query + (q * blocks + block) * 32 + half * 16 + p * VEC_LANES), x[p],
                                   sum[q * keys + k][p]);
            }
    float sums[4];
    V(sum16_of_four)((const V(vec) (*)[VEC_PARTS])sum, sums);
    for (int t = 0; t < 4; t++) score[t / keys * ATTENTION_TILE + t % keys] = sums[t];
}

/* mixed[query][i] += sum over j in [first, end) of weight[query][j] * row j [i], j ascending, for the `halves` * 16 values
 * from (2 * block + half) * 16 on of the rows `offset` bytes behind row[j]. `queries`, `halves` and `half` are constants
 * at every call. */
INLINE TARGET void V(mix_values)(const int queries, const int halves, enum kv_format format, const uint8_t *const *row,
                                 size_t offset, size_t fetched, size_t first, size_t end, size_t block, const int half,
                                 size_t blocks, size_t width, const float *weight, float *mixed) {
    V(vec) sum[4][VEC_PARTS]; /* of query q and half h: q * halves + h */
    mixed += (2 * block + half) * 16;
    for (int t = 0; t < queries * halves; t++)
        for (int p = 0; p < VEC_PARTS; p++)
            sum[t][p] = V(load)(mixed + t / halves * blocks * 32 + t % halves * 16 + p * VEC_LANES);
    for (size_t j = first; j < end; j++) {
        if (block == 0 && half == 0) V(fetch)(row[j + FETCH_AHEAD] + offset, fetched);
        for (int h = 0; h < halves; h++) {
            V(vec) x[VEC_PARTS];
            V(load_half)(format, row[j] + offset, block + (half + h) / 2, (half + h) % 2, width, x);
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

/* One tile for `queries` (1, 2 or 4) query heads of each key-value head, those from `query_head` on. What is read
 * later is fetched, `fetched` bytes of a row. */
INLINE TARGET void V(attend_tile)(const int queries, enum kv_format format, const struct V(tile) *tile,
                                  const struct V(pass) *pass, size_t query_head, size_t fetched) {
    _Alignas(64) float scores[ATTENTION_HEADS * ATTENTION_TILE];
    const uint8_t *const *keys = tile->row, *const *values = tile->row + ATTENTION_TILE;
    size_t blocks = pass->blocks, width = pass->width, begin = tile->first / 4 * 4, shared = pass->shared;
    const float *query = pass->query + query_head * blocks * 32;
    float *mixed = pass->mixed + query_head * blocks * 32;
    for (size_t j = begin; j < tile->end; j += 4 / queries)
        for (size_t h = 0; h < pass->kv_heads; h++)
            V(score_keys)(queries, 4 / queries, format, keys + j, h * pass->head_nbytes, fetched, blocks, width,
                          query + h * shared * blocks * 32, scores + h * queries * ATTENTION_TILE + j);
    for (size_t h = 0; h < pass->kv_heads; h++)
        for (int q = 0; q < queries; q++)
            V(weigh)(pass->softmax + h * shared + query_head + q, scores + (h * queries + q) * ATTENTION_TILE, tile->first,
                     tile->end, mixed + (h * shared + q) * blocks * 32, blocks);
    for (size_t j = begin; j < tile->end; j += 4)
        for (size_t h = 0; h < pass->kv_heads; h++) {
            size_t first = j < tile->first ? tile->first : j, end = j + 4 < tile->end ? j + 4 : tile->end, block = 0;
            const float *weight = scores + h * queries * ATTENTION_TILE;
            float *m = mixed + h * shared * blocks * 32;
#define MIX(halves, half) \
    V(mix_values)(queries, halves, format, values, h * pass->head_nbytes, fetched, first, end, block, half, blocks, width, \
                  weight, m)
            if (queries == 1)
                for (; block + 2 <= pass->mixed_blocks; block += 2) MIX(4, 0);
            for (; block < pass->mixed_blocks; block++)
                if (queries == 4) {
                    MIX(1, 0);
                    MIX(1, 1);
                } else MIX(2, 0);
#undef MIX
        }
}

/* attend_tile for each format and number of queries, compiled apart: one function of all of them takes compilers
 * minutes. The portable copy has one, slow to run and quick to compile. */
typedef void V(tile_function)(enum kv_format, const struct V(tile) *, const struct V(pass) *, size_t, size_t);
#define TILE_FUNCTION(name, queries, constant_format)                                                                 \
    static TARGET __attribute__((noinline)) void V(name)(enum kv_format format, const struct V(tile) *tile,           \
                                                         const struct V(pass) *pass, size_t query_head,               \
                                                         size_t fetched) {                                            \
        (void)format;                                                                                                 \
        V(attend_tile)(queries, constant_format, tile, pass, query_head, fetched);                                    \
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

/* Positions from + first ... from + end - 1 of a sequence, whose last is `last`; `offset` bytes lie in front of the
 * rows of the pass. */
static TARGET void V(find_rows)(const struct kv_pages *pages, const uint32_t *table, size_t offset, size_t from, size_t last,
                                struct V(tile) *tile) {
    size_t token_nbytes = pages->num_kv_heads * kv_row_nbytes(pages->format, pages->head_dim);
    size_t values_offset = kv_values_offset(pages);
    const uint8_t *base = pages->bytes + pages->layer * pages->planes * kv_plane_nbytes(pages) + offset;
    for (size_t j = 0; j < ATTENTION_TILE + FETCH_AHEAD; j++) {
        size_t position = from + (j < tile->first ? tile->first : j);
        if (position > last) position = last;
        uint32_t index = (uint32_t)position / (uint32_t)pages->block_size; /* faster than with 64 bits */
        const uint8_t *key = base + table[index] * pages->page_stride +
                             (position - index * pages->block_size) * token_nbytes;
        tile->row[j < ATTENTION_TILE ? j : ATTENTION_TILE + j] = key;
        if (j < ATTENTION_TILE) tile->row[ATTENTION_TILE + j] = key + values_offset;
    }
}

/* Query heads [head, head_end) of one row: those of whole key-value heads, or some of a single one. */
static TARGET void V(attend)(const struct attention *op, size_t row, size_t head, size_t head_end) {
    const struct kv_pages *pages = &op->pages;
    size_t dim = pages->head_dim, blocks = attention_blocks(dim), group = op->num_heads / pages->num_kv_heads;
    size_t count = head_end - head, kv_heads = (head_end - 1) / group + 1 - head / group;
    size_t end = (size_t)pages->positions[row] + 1, start = attention_start(op, row);
    const uint32_t *table = pages->tables + pages->table_starts[row];

    _Alignas(64) float query[ATTENTION_FLOATS], mixed[ATTENTION_FLOATS];
    struct V(softmax) softmax[ATTENTION_HEADS];
    memset(query, 0, count * blocks * 32 * sizeof *query);
    memset(mixed, 0, count * blocks * 32 * sizeof *mixed);
    for (size_t h = 0; h < count; h++) {
        const float *from = op->queries + (row * op->num_heads + head + h) * dim;
        for (size_t d = 0; d < dim; d++) query[h * blocks * 32 + d] = from[d] * op->scale;
        V(start_softmax)(softmax + h, op->sinks ? op->sinks + head + h : NULL);
    }
    struct V(pass) pass = {kv_heads, count / kv_heads, blocks, dim, kv_row_nbytes(pages->format, dim),
                           attention_blocks(op->value_dim), query, mixed, softmax};
    for (size_t from = start / ATTENTION_TILE * ATTENTION_TILE; from < end; from += ATTENTION_TILE) {
        struct V(tile) tile = {.first = start > from ? start - from : 0,
                               .end = end - from < ATTENTION_TILE ? end - from : ATTENTION_TILE};
        V(find_rows)(pages, table, head / group * pass.head_nbytes, from, end - 1, &tile);
        for (size_t done = 0, step; done < pass.shared; done += step) {
            size_t left = pass.shared - done;
            step = left >= 4 && MAX_QUERIES >= 4 ? 4 : left >= 2 && MAX_QUERIES >= 2 ? 2 : 1;
            V(tile_functions)[pages->format][step / 2](pages->format, &tile, &pass, done, done ? 0 : pass.head_nbytes);
        }
    }
    for (size_t h = 0; h < count; h++) {
        float total = V(sum16)(softmax[h].sum), *out = op->out + (row * op->num_heads + head + h) * op->value_dim;
        for (size_t d = 0; d < op->value_dim; d++) out[d] = mixed[h * blocks * 32 + d] / total;
    }
}

/* Task t is head t % num_heads of row t / num_heads; as many heads of a row at once as there is room for. */
static TARGET void V(attention)(const struct attention *op, size_t begin, size_t end) {
    size_t most = ATTENTION_FLOATS / (32 * attention_blocks(op->pages.head_dim));
    if (most > ATTENTION_HEADS) most = ATTENTION_HEADS;
    size_t group = op->num_heads / op->pages.num_kv_heads;
    while (begin < end) {
        size_t row = begin / op->num_heads, head = begin % op->num_heads;
        size_t whole_groups = most / group * group, in_group = group - head % group;
        size_t count = whole_groups && in_group == group ? whole_groups : in_group < most ? in_group : most;
        if (count > op->num_heads - head) count = op->num_heads - head;
        if (count > end - begin) count = end - begin;
        if (count > group) count -= count % group; /* where a part of the task ends within a group */
        V(attend)(op, row, head, head + count);
        begin += count;
    }
}
#undef MAX_QUERIES
