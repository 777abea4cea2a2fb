/* The arguments of the kernels, and their copies for each instruction set (kernels.c).
 *
 * All numbers are float32 except the weights, which stay as the checkpoint stores them. Every kernel fills the part
 * [begin, end) of its result, whatever the part, with the same bits: see vector.h. */
#ifndef HOTSET_KERNELS_H
#define HOTSET_KERNELS_H

#include "formats.h"
#include "kv_format.h" /* of shm/core */

#define MAX_HEAD_DIM 1024
#define LINEAR_GRAIN 4 /* outputs; parts of a multiple of it waste no tile */

struct linear { /* out[rows][outputs] = x[rows][inputs] . weight[outputs][inputs]; parts are outputs */
    const float *x;
    struct matrix weight;
    float *out;
    size_t rows, inputs, outputs;
};

struct linear_transposed { /* out[rows][outputs] = x[rows][inputs] . weight[inputs][outputs]; parts are blocks of outputs */
    const float *x;
    struct matrix weight;
    float *out;
    size_t rows, inputs, outputs;
};

struct rms_norm { /* parts are rows */
    const float *x, *weight;
    float *out;
    size_t width;
    float eps;
};

/* Pages: [page][layer][keys, values][block_size][num_kv_heads][row of head_dim values in `format`], page_stride bytes
 * from one page to the next (shm/kv_page_format.py); where `planes` is 1, keys are values too. tables[table_starts[row]
 * + i] is the page with positions i * block_size ... of the row's sequence. */
struct kv_pages {
    uint8_t *bytes;
    const uint32_t *tables;
    const int64_t *table_starts; /* [rows] */
    const int32_t *positions;    /* [rows] */
    size_t layer, planes, block_size, num_kv_heads, head_dim, page_stride;
    enum kv_format format;
};

struct attention { /* parts are (row, query head) pairs */
    const float *queries; /* [rows][num_heads][head_dim] */
    float *out;           /* [rows][num_heads][value_dim] */
    struct kv_pages pages;
    size_t num_heads, value_dim; /* so many of a value's numbers are mixed, at most head_dim */
    const float *sinks; /* [num_heads]: the logit of a key that every row sees and whose value is zero; NULL: none */
    size_t window; /* a row sees so many positions, its own the last of them; 0: all from 0 on */
    float scale;
};

struct gated { /* gate[rows][width] becomes silu(gate) * up or what gpt-oss has instead; parts are columns */
    float *gate;
    const float *up;
    size_t rows, width;
    const float *gate_bias, *up_bias; /* [width], added first; NULL: none */
    float swiglu_limit;               /* of gpt-oss; 0: silu(gate) * up */
};

/* What lies one after another in an expert's slot. */
enum expert_layout {
    EXPERT_GATE_UP_DOWN,
    EXPERT_INTERLEAVED_WITH_BIASES,  /* as gpt-oss: rows of gate and up in turn, their biases, down, its biases */
    EXPERT_GATE_UP_DOWN_WITH_BIASES, /* as llama.cpp has gpt-oss: behind each matrix its biases, in float32 */
    EXPERT_LAYOUTS
};

/* The first position that a row sees. */
static inline size_t attention_start(const struct attention *op, size_t row) {
    size_t end = (size_t)op->pages.positions[row] + 1;
    return op->window && op->window < end ? end - op->window : 0;
}

/* Bytes of the keys of a page, or of the values, in one layer. */
static inline size_t kv_plane_nbytes(const struct kv_pages *pages) {
    return pages->block_size * pages->num_kv_heads * kv_row_nbytes(pages->format, pages->head_dim);
}

/* From a token's keys to its values. */
static inline size_t kv_values_offset(const struct kv_pages *pages) {
    return (pages->planes - 1) * kv_plane_nbytes(pages);
}

/* Blocks of 32 values in a head's row, the last one filled up with zeros. */
static inline size_t attention_blocks(size_t head_dim) { return (head_dim + KV_QUANT_BLOCK - 1) / KV_QUANT_BLOCK; }

struct kernels {
    const char *name;
    void (*linear)(const struct linear *, size_t, size_t);
    void (*linear_transposed)(const struct linear_transposed *, size_t, size_t);
    void (*gated)(const struct gated *, size_t, size_t);
    void (*rms_norm)(const struct rms_norm *, size_t, size_t);
    void (*attention)(const struct attention *, size_t, size_t);
};

/* One copy per instruction set, the widest last. */
extern const struct kernels every_kernels[];
extern const size_t kernels_count;

/* The copy in use: of those that this processor can run the widest, unless a test has chosen another. */
extern const struct kernels *kernels;

int kernels_supported(size_t isa);

/* Before anything is computed: fills the tables, and chooses the copy. */
void kernels_prepare(void);

#endif
