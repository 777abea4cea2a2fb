/* The arguments of the kernels, and the choice of the copy that suits the processor.
 *
 * All numbers are float32 except the weights, which stay as the checkpoint stores them. Every kernel fills the part
 * [begin, end) of its result, whatever the part, with the same bits: see vector.h. */
#ifndef HOTSET_KERNELS_H
#define HOTSET_KERNELS_H

#include "formats.h"
#include "kv_format.h" /* of shm/core */

#include <math.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86_VECTORS 1
#include <immintrin.h>
#endif

#define WEIGHT_BLOCK_BYTES (256 * 1024) /* about half of a second-level cache */
#define ATTENTION_TILE 16               /* positions; a multiple of 16; longer ones overflow the caches with fetched rows */
#define ATTENTION_FLOATS 4096           /* of queries that one pass over the pages serves: they stay in the first level */
#define ATTENTION_HEADS 64              /* query heads that one pass serves */
#define MAX_HEAD_DIM 512
#define MAX_TILE_ROWS 4
#define MAX_TILE_OUTS 4

struct linear { /* out[rows][outputs] = x[rows][inputs] . weight[outputs][inputs]; parts are outputs */
    const float *x;
    const uint8_t *weight;
    float *out;
    size_t rows, inputs, outputs;
    enum weight_format format;
};

struct rms_norm { /* parts are rows */
    const float *x, *weight;
    float *out;
    size_t width;
    float eps;
};

/* Pages: [page][layer][keys, values][block_size][num_kv_heads][row of head_dim values in `format`], page_stride bytes
 * from one page to the next (shm/kv_page_format.py). tables[table_starts[row] + i] is the page with positions
 * i * block_size ... of the row's sequence. */
struct kv_pages {
    uint8_t *bytes;
    const uint32_t *tables;
    const int64_t *table_starts; /* [rows] */
    const int32_t *positions;    /* [rows] */
    size_t layer, block_size, num_kv_heads, head_dim, page_stride;
    enum kv_format format;
};

struct attention { /* parts are (row, query head) pairs */
    const float *queries; /* [rows][num_heads][head_dim] */
    float *out;           /* [rows][num_heads][head_dim] */
    struct kv_pages pages;
    size_t num_heads;
    size_t window; /* a row sees so many positions, its own the last of them; 0: all from 0 on */
    float scale;
};

/* The first position that a row sees. */
static inline size_t attention_start(const struct attention *op, size_t row) {
    size_t end = (size_t)op->pages.positions[row] + 1;
    return op->window && op->window < end ? end - op->window : 0;
}

/* Blocks of 32 values in a head's row, the last one filled up with zeros. */
static inline size_t attention_blocks(size_t head_dim) { return (head_dim + KV_QUANT_BLOCK - 1) / KV_QUANT_BLOCK; }

#define INLINE static inline __attribute__((always_inline))
#define JOIN_(name, suffix) name##_##suffix
#define JOIN(name, suffix) JOIN_(name, suffix)
#define V(name) JOIN(name, VECTOR_NAME)

#define VECTOR_ISA 0
#define VECTOR_NAME portable
#define TARGET
#define TILE_ROWS 1
#define TILE_OUTS 4
#include "every_kernel.h"

#ifdef HAVE_X86_VECTORS
#define VECTOR_ISA 1
#define VECTOR_NAME avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define TILE_ROWS 3 /* 3 x 2 x 2 accumulators, 2 weights, 1 activation: 15 of 16 registers */
#define TILE_OUTS 2
#include "every_kernel.h"

#define VECTOR_ISA 2
#define VECTOR_NAME avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define TILE_ROWS 4
#define TILE_OUTS 4
#include "every_kernel.h"
#endif

struct kernels {
    const char *name;
    void (*linear)(const struct linear *, size_t, size_t);
    void (*silu_times)(float *, const float *, size_t, size_t);
    void (*rms_norm)(const struct rms_norm *, size_t, size_t);
    void (*attention)(const struct attention *, size_t, size_t);
};

#define KERNELS(isa) {#isa, linear_##isa, silu_times_##isa, rms_norm_##isa, attention_##isa}
static const struct kernels every_kernels[] = {
    KERNELS(portable),
#ifdef HAVE_X86_VECTORS
    KERNELS(avx2),
    KERNELS(avx512),
#endif
};
#define KERNELS_COUNT (sizeof every_kernels / sizeof *every_kernels)

static inline int kernels_supported(size_t isa) {
#ifdef HAVE_X86_VECTORS
    __builtin_cpu_init();
    if (isa == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == 2)
        return kernels_supported(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return isa == 0;
}

/* Half-split rotary embedding in place (transformers' rotate_half): x[rows][heads][dim], cos and sin [rows][dim / 2]. */
static inline void rotate(float *x, const float *cosine, const float *sine, size_t rows, size_t heads, size_t dim) {
    size_t half = dim / 2;
    for (size_t i = 0; i < rows * heads; i++, x += dim) {
        const float *c = cosine + i / heads * half, *s = sine + i / heads * half;
        for (size_t d = 0; d < half; d++) {
            float first = x[d], second = x[d + half];
            x[d] = first * c[d] - second * s[d];
            x[d + half] = second * c[d] + first * s[d];
        }
    }
}

/* out[row] = sum over rank of weights[row][rank] * outputs[row][rank], rank 0 first. */
static inline void combine(const float *outputs, const float *weights, float *out, size_t rows, size_t ranks,
                           size_t width) {
    for (size_t row = 0; row < rows; row++, out += width) {
        memset(out, 0, width * sizeof *out);
        for (size_t rank = 0; rank < ranks; rank++, outputs += width) {
            float weight = weights[row * ranks + rank];
            for (size_t d = 0; d < width; d++) out[d] += weight * outputs[d];
        }
    }
}

#endif
