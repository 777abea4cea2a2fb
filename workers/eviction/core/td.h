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
 *
 * One token later the truth is nearer: it is 1 if e was used, else gamma times the new estimate. The weights that
 * were active then move by eta times the difference. So y_e tends to the mean of gamma^(tokens until the next use
 * - 1): a discounted probability, which can be compared between layers.
 *
 * Invariant: between two calls, `active`, `averages`, `used` and `estimate` describe the same token of a stream. */
#ifndef HOTSET_TD_H
#define HOTSET_TD_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TD_SETS 6u
#define TD_TRAITS 6u
#define TD_AVERAGES 4u
#define TD_MAX_TOP_K 32u
#define TD_MAX_EXPERTS 1024u
#define TD_LANES 16u          /* rows are padded to whole vectors of 64 bytes; padding stays zero */
#define TD_MAX_STEP 0.005f    /* eta */
#define TD_STABLE_STEP 0.5f   /* eta * tokens per step * |features|^2: it diverges from about 1 on */
#define TD_MAX_ESTIMATE 1e3f  /* an estimate beyond has diverged: the layer forgets what it learned */

static const float td_rates[TD_AVERAGES] = {1 / 4.f, 1 / 16.f, 1 / 64.f, 1 / 256.f};

typedef float td_lanes __attribute__((vector_size(4 * TD_LANES))); /* the compiler splits it where vectors are shorter */

struct td;
typedef void td_observe_function(struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                 uint32_t count, uint32_t batch);

struct td {
    uint32_t num_layers, num_experts, num_streams, stride;
    float *set_weights;   /* W [layers][TD_SETS][experts][stride] */
    float *trait_weights; /* D [layers][TD_TRAITS][stride] */
    /* Per stream and layer, at [stream * num_layers + layer]: */
    float *averages;      /* [TD_AVERAGES][stride] */
    float *used;          /* [stride]: 1 where the latest token used the expert */
    float *estimate;      /* [stride]: y */
    uint16_t *active;     /* [TD_SETS * TD_MAX_TOP_K]: rows of the layer's W, first this layer's own set */
    uint16_t *num_active, *set_size; /* 0: no token yet */
    uint64_t divergences;
    td_observe_function *observe; /* for this processor */
};

static inline float *td_floats(size_t count) {
    float *floats = aligned_alloc(sizeof(td_lanes), count * sizeof(float)); /* a multiple of it: rows are padded */
    if (floats) memset(floats, 0, count * sizeof(float));
    return floats;
}

static inline void td_free(struct td *td) {
    free(td->set_weights);
    free(td->trait_weights);
    free(td->averages);
    free(td->used);
    free(td->estimate);
    free(td->active);
    free(td->num_active);
    free(td->set_size);
    memset(td, 0, sizeof *td);
}

static inline td_observe_function *td_best_observe(void);

/* 0 when there is not enough memory. */
static inline int td_init(struct td *td, uint32_t num_layers, uint32_t num_experts, uint32_t num_streams) {
    uint32_t stride = (num_experts + TD_LANES - 1) / TD_LANES * TD_LANES;
    size_t places = (size_t)num_streams * num_layers;
    *td = (struct td){.num_layers = num_layers, .num_experts = num_experts, .num_streams = num_streams,
                      .stride = stride, .observe = td_best_observe()};
    td->set_weights = td_floats((size_t)num_layers * TD_SETS * num_experts * stride);
    td->trait_weights = td_floats((size_t)num_layers * TD_TRAITS * stride);
    td->averages = td_floats(places * TD_AVERAGES * stride);
    td->used = td_floats(places * stride);
    td->estimate = td_floats(places * stride);
    td->active = calloc(places * TD_SETS * TD_MAX_TOP_K, sizeof(uint16_t));
    td->num_active = calloc(places, sizeof(uint16_t));
    td->set_size = calloc(places, sizeof(uint16_t));
    if (td->set_weights && td->trait_weights && td->averages && td->used && td->estimate && td->active &&
        td->num_active && td->set_size)
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

/* Appends the experts that the latest token of `place` used, as rows of the weight block of set number `set`. */
static inline uint32_t td_append(const struct td *td, size_t place, uint32_t set, uint16_t *rows, uint32_t count) {
    const uint16_t *own = td->active + place * TD_SETS * TD_MAX_TOP_K;
    for (uint32_t i = 0; i < td->set_size[place]; i++) rows[count++] = (uint16_t)(set * td->num_experts + own[i]);
    return count;
}

/* The rows that are active after this token used `experts`; its own set first. */
static inline uint32_t td_active_rows(const struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                      uint32_t count, uint16_t *rows) {
    static const uint8_t before[] = {1, 2, 3};
    size_t first = (size_t)stream * td->num_layers;
    uint32_t layers = td->num_layers, n = 0;
    for (uint32_t i = 0; i < count; i++) rows[n++] = experts[i];
    n = td_append(td, first + layer, 1, rows, n);
    for (uint32_t i = 0; i < 3; i++)
        n = td_append(td, first + (layer + layers - before[i] % layers) % layers, 2 + i, rows, n);
    return td_append(td, first + (layer + 1) % layers, 5, rows, n);
}

static inline void td_reset_layer(struct td *td, uint32_t layer) {
    size_t block = (size_t)TD_SETS * td->num_experts * td->stride, traits = (size_t)TD_TRAITS * td->stride;
    memset(td->set_weights + layer * block, 0, block * sizeof(float));
    memset(td->trait_weights + layer * traits, 0, traits * sizeof(float));
    td->divergences++;
}

/* The numerics, compiled once for each level of the instruction set. */
#define TD_NAME(name) name##_portable
#define TD_TARGET
#include "td_kernel.h"
#undef TD_NAME
#undef TD_TARGET

#if defined(__x86_64__)
#define TD_NAME(name) name##_avx2
#define TD_TARGET __attribute__((target("avx2")))
#include "td_kernel.h"
#undef TD_NAME
#undef TD_TARGET

#define TD_NAME(name) name##_avx512
#define TD_TARGET __attribute__((target("avx512f")))
#include "td_kernel.h"
#undef TD_NAME
#undef TD_TARGET
#endif

static inline td_observe_function *td_best_observe(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return td_observe_avx512;
    if (__builtin_cpu_supports("avx2")) return td_observe_avx2;
#endif
    return td_observe_portable;
}

#endif
