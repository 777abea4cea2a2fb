/* Learned eviction: for every expert of a layer, an estimate of how soon it is used again, learned by temporal
 * differences while serving, from zero.
 *
 * After a token's step of a layer, the estimate of expert e is linear in what is known then:
 *
 *     y_e = sum of W[r][e] over the active rows r  +  sum of D[i][e] * f_i[e] over six traits i
 *
 * Active rows: the members of six expert sets of the token's stream: this layer's now and one token ago, and the
 * latest of the layers l-1, l-2, l-3 and l+1 (cyclic: the layer before the first is the previous token's last).
 * Traits of the expert itself: 1, used now, and moving averages of its use with rates 1/4, 1/16, 1/64 and 1/256.
 * Where experts are many (more than TD_FEW_EXPERTS), only the foremost of all sets but the first count.
 *
 * One token later the truth is nearer: it is 1 if e was used, else gamma times the new estimate. The weights that
 * were active then move by eta times the difference. So y_e tends to the mean of gamma^(tokens until the next use
 * - 1): a discounted probability, which can be compared between layers.
 *
 * W is most of the memory and of the work, so its weights are whole numbers of units (td_rows.h): of 16 bits, or of 8
 * where experts are many.
 *
 * Invariant: between two calls, `active`, `averages` and `estimate` describe the same token of a stream. */
#ifndef HOTSET_TD_H
#define HOTSET_TD_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define TD_SETS 6u
#define TD_TRAITS 6u
#define TD_AVERAGES 4u
#define TD_MAX_TOP_K 32u
#define TD_FEW_EXPERTS 64u    /* in models with more, a weight has 8 bits, and ... */
#define TD_FOREMOST 3u        /* ... of another layer's set only the experts ranked highest are active rows, and ... */
#define TD_FOREMOST_OWN 4u    /* ... of the layer's own set one token ago */
#define TD_MAX_EXPERTS 1024u
#define TD_BYTES 64u          /* rows are padded to whole vectors of 64 bytes; padding stays zero */
#define TD_LANES 32u          /* of 16 bits in such a vector */
#define TD_HUGE_PAGE (2u << 20)
#define TD_LINE 64u
#define TD_FAR (16u << 20) /* bytes of W */
#define TD_UNIT (1 / 4096.f)        /* of set weights of 16 bits, which so hold -8 to 8, and ... */
#define TD_COARSE_UNIT (1 / 1536.f) /* ... of 8 bits: -0.07 to 0.07, beyond which hardly one of many would go */
#define TD_MAX_STEP 0.005f    /* eta */
#define TD_STABLE_STEP 0.5f   /* eta * tokens per step * |features|^2: it diverges from about 1 on */
#define TD_NEVER 1e-20f       /* averages of use below are 0: processors are slow with the numbers that come next */
#define TD_MAX_ESTIMATE 4     /* an estimate beyond has diverged: the layer forgets what it learned */

static const float td_rates[TD_AVERAGES] = {1 / 4.f, 1 / 16.f, 1 / 64.f, 1 / 256.f};

/* One token's experts of a layer; `count` 0: they are not known yet. */
struct td_token {
    uint32_t stream, layer, count;
    const uint16_t *experts;
};

/* Rows of a layer's W. */
struct td_rows {
    uint32_t count;
    uint16_t rows[TD_SETS * TD_MAX_TOP_K];
};

struct td;
typedef void td_observe_function(struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                 uint32_t count, uint32_t batch, const struct td_token *next);
typedef void td_combine_function(const struct td *td, uint32_t layer, const uint16_t *streams, uint32_t count,
                                 double *value);

/* The numerics for one level of the instruction set. */
struct td_kernels {
    td_observe_function *observe;
    td_combine_function *combine;
};

struct td {
    uint32_t num_layers, num_experts, num_streams, stride;
    int coarse;             /* whether W has 8 bits a weight */
    uint32_t row_nbytes;    /* of W */
    uint8_t *set_weights;   /* W [layers][TD_SETS][experts][row_nbytes]: see td_rows.h */
    float *trait_weights;   /* D [layers][TD_TRAITS][stride] */
    float *remainder;       /* [layers][stride]: what set weights of 16 bits should have moved by beyond what they can */
    uint32_t *turn;         /* [layers]: see td_thresholds */
    /* Per stream and layer, at [stream * num_layers + layer]: */
    float *averages;      /* [TD_AVERAGES][stride] */
    float *estimate;      /* [stride]: y */
    uint16_t *active;     /* [TD_SETS * TD_MAX_TOP_K]: rows of the layer's W, first this layer's own set */
    uint16_t *num_active, *set_size; /* 0: no token yet */
    uint64_t divergences;
};

/* Zeros; `nbytes` are whole vectors, because rows are padded. What is large lies in huge pages, where there are any: a
 * token touches a few rows here and there in it, most of which would be on a page that the processor has to look up. */
static inline void *td_array(size_t nbytes) {
    int huge = nbytes >= TD_HUGE_PAGE;
    void *array = aligned_alloc(huge ? TD_HUGE_PAGE : TD_BYTES, nbytes);
    if (!array) return NULL;
    if (huge) madvise(array, nbytes, MADV_HUGEPAGE); /* before the first touch; advice that may be ignored */
    return memset(array, 0, nbytes);
}

static inline float *td_float_array(size_t count) { return td_array(count * sizeof(float)); }

static inline void td_free(struct td *td) {
    free(td->set_weights);
    free(td->trait_weights);
    free(td->remainder);
    free(td->turn);
    free(td->averages);
    free(td->estimate);
    free(td->active);
    free(td->num_active);
    free(td->set_size);
    memset(td, 0, sizeof *td);
}

/* Of a layer's W. */
static inline size_t td_layer_nbytes(const struct td *td) {
    return (size_t)TD_SETS * td->num_experts * td->row_nbytes;
}

/* 0 when there is not enough memory. */
static inline int td_init(struct td *td, uint32_t num_layers, uint32_t num_experts, uint32_t num_streams) {
    const int coarse = num_experts > TD_FEW_EXPERTS;
    const uint32_t whole = coarse ? TD_BYTES : TD_LANES, stride = (num_experts + whole - 1) / whole * whole;
    size_t places = (size_t)num_streams * num_layers;
    *td = (struct td){.num_layers = num_layers, .num_experts = num_experts, .num_streams = num_streams,
                      .stride = stride, .coarse = coarse, .row_nbytes = coarse ? stride : 2 * stride};
    td->set_weights = td_array(num_layers * td_layer_nbytes(td));
    td->trait_weights = td_float_array((size_t)num_layers * TD_TRAITS * stride);
    td->remainder = td_float_array((size_t)num_layers * stride);
    td->turn = calloc(num_layers, sizeof(uint32_t));
    td->averages = td_float_array(places * TD_AVERAGES * stride);
    td->estimate = td_float_array(places * stride);
    td->active = calloc(places * TD_SETS * TD_MAX_TOP_K, sizeof(uint16_t));
    td->num_active = calloc(places, sizeof(uint16_t));
    td->set_size = calloc(places, sizeof(uint16_t));
    if (td->set_weights && td->trait_weights && td->remainder && td->turn && td->averages && td->estimate &&
        td->active && td->num_active && td->set_size)
        return 1;
    td_free(td);
    return 0;
}

/* Discount: how far ahead an estimate looks. A larger batch uses more experts per step, so less far. */
static inline float td_discount(uint32_t batch) {
    const float alone = 7 / 8.f, crowded = 2 / 3.f;
    return batch >= 4 ? crowded : alone - (alone - crowded) * (float)(batch - (batch > 0)) / 3;
}

static inline float td_step(uint32_t batch, uint32_t num_active) {
    float stable = TD_STABLE_STEP / ((float)(batch ? batch : 1) * (float)(num_active + 3));
    return stable < TD_MAX_STEP ? stable : TD_MAX_STEP;
}

/* After a gap in what was seen: nothing is learned across it. */
static inline void td_forget_streams(struct td *td) {
    memset(td->num_active, 0, sizeof(uint16_t) * td->num_streams * td->num_layers);
    memset(td->set_size, 0, sizeof(uint16_t) * td->num_streams * td->num_layers);
}

/* The rows that were active when the latest token of `place` was observed; its own set first. */
static inline void td_take_rows(const struct td *td, size_t place, struct td_rows *rows) {
    rows->count = td->num_active[place];
    memcpy(rows->rows, td->active + place * TD_SETS * TD_MAX_TOP_K, sizeof(uint16_t) * rows->count);
}

static inline void td_keep_rows(struct td *td, size_t place, const struct td_rows *rows, uint32_t set_size) {
    memcpy(td->active + place * TD_SETS * TD_MAX_TOP_K, rows->rows, sizeof(uint16_t) * rows->count);
    td->num_active[place] = (uint16_t)rows->count;
    td->set_size[place] = (uint16_t)set_size;
}

/* Appends the first `most` experts that the latest token of `place` used, as rows of the weight block of set number
 * `set`. */
static inline void td_append(const struct td *td, size_t place, uint32_t set, uint32_t most, struct td_rows *rows) {
    const uint16_t *own = td->active + place * TD_SETS * TD_MAX_TOP_K;
    const uint32_t count = td->set_size[place] < most ? td->set_size[place] : most;
    for (uint32_t i = 0; i < count; i++) rows->rows[rows->count + i] = (uint16_t)(set * td->num_experts + own[i]);
    rows->count += count;
}

/* The rows that are active after this token used `experts`; its own set first. */
static inline void td_active_rows(const struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                  uint32_t count, struct td_rows *rows) {
    static const uint8_t before[] = {1, 2, 3};
    const size_t first = (size_t)stream * td->num_layers;
    const uint32_t layers = td->num_layers, many = td->num_experts > TD_FEW_EXPERTS;
    const uint32_t of_own = many ? TD_FOREMOST_OWN : TD_MAX_TOP_K, of_others = many ? TD_FOREMOST : TD_MAX_TOP_K;
    memcpy(rows->rows, experts, sizeof(uint16_t) * count);
    rows->count = count;
    td_append(td, first + layer, 1, of_own, rows);
    for (uint32_t i = 0; i < 3; i++)
        td_append(td, first + (layer + layers - before[i] % layers) % layers, 2 + i, of_others, rows);
    td_append(td, first + (layer + 1) % layers, 5, of_others, rows);
}

/* Asks for the rows that will be active when the token is observed, or for as many as are known before: where W is so
 * large that they are in no cache of a core. Elsewhere asking costs more than waiting. */
static inline void td_prefetch(const struct td *td, const struct td_token *token) {
    struct td_rows rows;
    if (td->num_layers * td_layer_nbytes(td) < TD_FAR) return;
    td_active_rows(td, token->stream, token->layer, token->experts, token->count, &rows);
    const uint8_t *weights = td->set_weights + token->layer * td_layer_nbytes(td);
    const size_t nbytes = td->row_nbytes;
    for (uint32_t i = 0; i < rows.count; i++)
        for (size_t line = 0; line < nbytes; line += TD_LINE)
            __builtin_prefetch(weights + rows.rows[i] * nbytes + line);
}

static inline void td_reset_layer(struct td *td, uint32_t layer) {
    size_t traits = (size_t)TD_TRAITS * td->stride;
    memset(td->set_weights + layer * td_layer_nbytes(td), 0, td_layer_nbytes(td));
    memset(td->remainder + (size_t)layer * td->stride, 0, td->stride * sizeof(float));
    memset(td->trait_weights + layer * traits, 0, traits * sizeof(float));
    td->divergences++;
}

/* [stride]: 1 for the given experts, 0 for the others. */
static inline void td_mark(const struct td *td, float *marks, const uint16_t *experts, uint32_t count) {
    memset(marks, 0, td->stride * sizeof(float));
    for (uint32_t i = 0; i < count; i++) marks[experts[i]] = 1;
}

/* Thresholds, in 256ths less 128, of the rows that a coarse move is for: see td_rows.h. The turn advances by the golden ratio of
 * 2^32, which comes near to every place however many streams take turns. */
static inline void td_thresholds(struct td *td, uint32_t layer, uint32_t count, int8_t *threshold) {
    td->turn[layer] += 0x9E3779B9u;
    const uint32_t apart = UINT32_MAX / count;
    for (uint32_t i = 0; i < count; i++) threshold[i] = (int8_t)((td->turn[layer] + i * apart) >> 24 ^ 0x80);
}

/* Added to a coarse move before it is rounded to a 256th of a unit: as likely anything from -1/2 to 1/2. */
static inline float td_dither(const struct td *td, uint32_t layer) {
    return (float)(td->turn[layer] & 0xFFFF) / 65536 - 0.5f;
}

/* Whether an estimate is beyond TD_MAX_ESTIMATE, or no number; of the bits of the largest one without its sign. */
static inline int td_diverged(int32_t largest) {
    float allowed = TD_MAX_ESTIMATE;
    int32_t limit;
    memcpy(&limit, &allowed, sizeof limit);
    return largest > limit;
}

typedef int8_t td_bytes __attribute__((vector_size(16)));

/* a + b, or the end of 8 bits that it is beyond. */
static inline td_bytes td_add_saturated(td_bytes a, td_bytes b) {
    const td_bytes sum = (td_bytes)((__typeof__(a < b))a + b), most = 127 ^ (a < 0), beyond = ((a ^ sum) & (b ^ sum)) < 0;
    return (sum & ~beyond) | (most & beyond);
}

/* The numerics, compiled once for each level of the instruction set, in vectors of as many bytes as it has: the compiler
 * takes longer ones apart badly. */
#define TD_NAME(name) name##_portable
#define TD_VECTOR 16
#define TD_TARGET
#define TD_ADD_SATURATED(a, b) td_add_saturated(a, b)
#include "td_rows.h"
#include "td_kernel.h"
#undef TD_NAME
#undef TD_VECTOR
#undef TD_TARGET
#undef TD_ADD_SATURATED

#if defined(__x86_64__)
#define TD_NAME(name) name##_avx2
#define TD_VECTOR 32
#define TD_TARGET __attribute__((target("avx2")))
#define TD_ADD_SATURATED(a, b) _mm256_adds_epi8((__m256i)(a), (__m256i)(b))
#include "td_rows.h"
#include "td_kernel.h"
#undef TD_NAME
#undef TD_VECTOR
#undef TD_TARGET
#undef TD_ADD_SATURATED

#define TD_NAME(name) name##_avx512
#define TD_VECTOR 64
#define TD_TARGET __attribute__((target("avx512bw,avx512vl,avx512dq")))
#define TD_ADD_SATURATED(a, b) _mm512_adds_epi8((__m512i)(a), (__m512i)(b))
#include "td_rows.h"
#include "td_kernel.h"
#undef TD_NAME
#undef TD_VECTOR
#undef TD_TARGET
#undef TD_ADD_SATURATED
#endif

static inline struct td_kernels td_best_kernels(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return (struct td_kernels){td_observe_avx512, td_combine_avx512};
    if (__builtin_cpu_supports("avx2")) return (struct td_kernels){td_observe_avx2, td_combine_avx2};
#endif
    return (struct td_kernels){td_observe_portable, td_combine_portable};
}

#endif
