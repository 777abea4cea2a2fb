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
#define TD_LANES 16u          /* rows are padded to whole vectors; padding stays zero */
#define TD_MAX_STEP 0.005f    /* eta */
#define TD_STABLE_STEP 0.5f   /* eta * tokens per step * |features|^2: it diverges from about 1 on */
#define TD_MAX_ESTIMATE 1e3f  /* an estimate beyond has diverged: the layer forgets what it learned */

/* The loops below are plain C over whole vectors; the compiler makes them for each level and the loader chooses. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define TD_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define TD_VECTORISED
#endif
#define TD_INLINE static inline __attribute__((always_inline)) /* into each of those versions */

static const float td_rates[TD_AVERAGES] = {1 / 4.f, 1 / 16.f, 1 / 64.f, 1 / 256.f};

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
};

static inline float *td_floats(size_t count) { return calloc(count, sizeof(float)); }

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

/* 0 when there is not enough memory. */
static inline int td_init(struct td *td, uint32_t num_layers, uint32_t num_experts, uint32_t num_streams) {
    uint32_t stride = (num_experts + TD_LANES - 1) / TD_LANES * TD_LANES;
    size_t places = (size_t)num_streams * num_layers;
    *td = (struct td){.num_layers = num_layers, .num_experts = num_experts, .num_streams = num_streams,
                      .stride = stride};
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

/* y of the token whose features are given. */
TD_INLINE void td_estimate(const struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                           const float *restrict used, const float *restrict averages, float *restrict y) {
    const uint32_t stride = td->stride;
    const float *weights = td->set_weights + (size_t)layer * TD_SETS * td->num_experts * stride;
    const float *trait = td->trait_weights + (size_t)layer * TD_TRAITS * stride;
    for (uint32_t e = 0; e < stride; e++) y[e] = trait[e] + trait[stride + e] * used[e];
    for (uint32_t i = 0; i < TD_AVERAGES; i++)
        for (uint32_t e = 0; e < stride; e++) y[e] += trait[(2 + i) * stride + e] * averages[i * stride + e];
    for (uint32_t i = 0; i < count; i++) {
        const float *restrict row = weights + (size_t)rows[i] * stride;
        for (uint32_t e = 0; e < stride; e++) y[e] += row[e];
    }
}

/* Moves the weights of the features that were active at the previous token of `place` by `change`. */
TD_INLINE void td_learn(struct td *td, uint32_t layer, size_t place, const float *restrict change) {
    const uint32_t stride = td->stride;
    float *weights = td->set_weights + (size_t)layer * TD_SETS * td->num_experts * stride;
    float *restrict trait = td->trait_weights + (size_t)layer * TD_TRAITS * stride;
    const float *restrict used = td->used + place * stride;
    const float *restrict averages = td->averages + place * TD_AVERAGES * stride;
    const uint16_t *rows = td->active + place * TD_SETS * TD_MAX_TOP_K;
    for (uint32_t i = 0; i < td->num_active[place]; i++) {
        float *restrict row = weights + (size_t)rows[i] * stride;
        for (uint32_t e = 0; e < stride; e++) row[e] += change[e];
    }
    for (uint32_t e = 0; e < stride; e++) {
        trait[e] += change[e];
        trait[stride + e] += change[e] * used[e];
    }
    for (uint32_t i = 0; i < TD_AVERAGES; i++)
        for (uint32_t e = 0; e < stride; e++) trait[(2 + i) * stride + e] += change[e] * averages[i * stride + e];
}

/* eta times the difference between what is known now and what was estimated one token ago. */
TD_INLINE void td_difference(const struct td *td, const float *restrict used, const float *restrict y,
                             const float *restrict before, float gamma, float eta, float *restrict change) {
    for (uint32_t e = 0; e < td->stride; e++) {
        float later = y[e] < 0 ? 0 : y[e] > 1 ? 1 : y[e];
        float target = used[e] > 0 ? 1 : gamma * later;
        change[e] = e < td->num_experts ? eta * (target - before[e]) : 0;
    }
}

/* Whether an estimate is beyond TD_MAX_ESTIMATE, or no number. On the bits, whose order is that of |y| with infinity
 * and NaN on top: a maximum of floats would lose the NaN, and does not become vector code. */
TD_INLINE int td_diverged(const struct td *td, const float *y) {
    uint32_t largest = 0, limit;
    float allowed = TD_MAX_ESTIMATE;
    memcpy(&limit, &allowed, sizeof limit);
    for (uint32_t e = 0; e < td->stride; e++) {
        uint32_t bits;
        memcpy(&bits, &y[e], sizeof bits);
        bits &= 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    return largest > limit;
}

static inline void td_reset_layer(struct td *td, uint32_t layer) {
    size_t block = (size_t)TD_SETS * td->num_experts * td->stride, traits = (size_t)TD_TRAITS * td->stride;
    memset(td->set_weights + layer * block, 0, block * sizeof(float));
    memset(td->trait_weights + layer * traits, 0, traits * sizeof(float));
    td->divergences++;
}

/* One token of `stream` used `experts` (at most TD_MAX_TOP_K) of `layer`, in a step of `batch` tokens: learns from
 * it, and leaves the new estimates in td->estimate. */
TD_VECTORISED static void td_observe(struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                     uint32_t count, uint32_t batch) {
    const uint32_t stride = td->stride;
    const size_t place = (size_t)stream * td->num_layers + layer;
    float used[TD_MAX_EXPERTS] = {0}, averages[TD_AVERAGES * TD_MAX_EXPERTS], y[TD_MAX_EXPERTS];
    uint16_t rows[TD_SETS * TD_MAX_TOP_K];
    for (uint32_t i = 0; i < count; i++) used[experts[i]] = 1;
    const float *restrict faded = td->averages + place * TD_AVERAGES * stride;
    for (uint32_t i = 0; i < TD_AVERAGES; i++)
        for (uint32_t e = 0; e < stride; e++)
            averages[i * stride + e] = faded[i * stride + e] * (1 - td_rates[i]) + td_rates[i] * used[e];
    uint32_t num_rows = td_active_rows(td, stream, layer, experts, count, rows);
    td_estimate(td, layer, rows, num_rows, used, averages, y);

    if (td->num_active[place]) {
        float change[TD_MAX_EXPERTS], eta = td_step(batch, td->num_active[place]);
        if (td_diverged(td, y)) {
            td_reset_layer(td, layer);
            memset(y, 0, sizeof(float) * stride);
        } else {
            td_difference(td, used, y, td->estimate + place * stride, td_discount(batch), eta, change);
            td_learn(td, layer, place, change);
        }
    }
    memcpy(td->averages + place * TD_AVERAGES * stride, averages, sizeof(float) * TD_AVERAGES * stride);
    memcpy(td->used + place * stride, used, sizeof(float) * stride);
    memcpy(td->estimate + place * stride, y, sizeof(float) * stride);
    memcpy(td->active + place * TD_SETS * TD_MAX_TOP_K, rows, sizeof(uint16_t) * num_rows);
    td->num_active[place] = (uint16_t)num_rows;
    td->set_size[place] = (uint16_t)count;
}

#endif
