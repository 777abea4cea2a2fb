/* How large the outputs of a layer's experts are: a running mean of their norms, shared by all workers. Policy resnorm
 * measures a residual by it. */
#ifndef HOTSET_EXPERT_NORM_H
#define HOTSET_EXPERT_NORM_H

#include "arena.h"
#include "float_bits.h"

#define EXPERT_NORM_RATE 0.01f /* weight of a new row in the mean */

/* 0: no row seen. */
static inline float expert_norm(const struct arena *arena, uint32_t layer) {
    return float_from_bits(load_relaxed(&arena->layers[layer].expert_norm));
}

/* Moves the mean by `rows` rows whose outputs have the norm `mean` on average. The first rows seed it. What is not a
 * positive number is left out. */
static inline void expert_norm_update(const struct arena *arena, uint32_t layer, float mean, uint64_t rows) {
    atomic_u32 *word = &arena->layers[layer].expert_norm;
    uint32_t old = load_relaxed(word), moved;
    float kept = 1;
    if (!(mean > 0 && mean < INFINITY)) return;
    for (uint64_t row = 0; row < rows && kept > 1e-6f; row++) kept *= 1 - EXPERT_NORM_RATE;
    do {
        float before = float_from_bits(old);
        moved = bits_from_float(before > 0 ? mean + kept * (before - mean) : mean);
        /* relaxed: the number stands for itself, nothing is published through it */
    } while (!atomic_compare_exchange_weak_explicit(word, &old, moved, memory_order_relaxed, memory_order_relaxed));
}

#endif
