/* The numerics of td.h, without a guard against being included twice: td.h includes this file once for each level of
 * the instruction set, with TD_NAME and TD_TARGET. Rows are whole vectors. */

/* Everything that is done expert by expert: new moving averages; y of this token, from `sums`; eta times the
 * difference between what is known now and what was estimated one token ago; from it the move of the traits' weights,
 * and the sets', in units, or 256ths of coarse ones, as `change`. The new token takes the old one's place. Padding stays
 * zero.
 *
 * Returns the largest |y| as its bits, whose order is that of numbers with infinity and NaN on top. */
TD_TARGET static int32_t TD_NAME(td_step_experts)(struct td *td, uint32_t layer, size_t place, const float *used_now,
                                                  const float *used_earlier, const uint16_t *set_sums, float gamma,
                                                  float eta, int16_t *moves) {
    typedef float floats __attribute__((vector_size(TD_VECTOR), may_alias));
    typedef int32_t ints __attribute__((vector_size(TD_VECTOR)));
    typedef int16_t halves __attribute__((vector_size(TD_VECTOR / 2), may_alias));
    const size_t width = td->stride * sizeof(float) / TD_VECTOR;
    const floats *used = (const floats *)used_now, *used_before = (const floats *)used_earlier;
    const halves *sums = (const halves *)set_sums;
    halves *change = (halves *)moves;
    const float to_nearest = 12582912.f; /* 1.5 * 2^23: added and taken away again, it rounds to an integer */
    const float unit = td->coarse ? TD_COARSE_UNIT : TD_UNIT, steps = td->coarse ? 256 / TD_COARSE_UNIT : 1 / TD_UNIT;
    const int coarse = td->coarse;
    const float dither = coarse ? td_dither(td, layer) : 0;
    floats *estimate = (floats *)td->estimate + place * width;
    floats *averages = (floats *)td->averages + place * TD_AVERAGES * width;
    floats *trait = (floats *)td->trait_weights + (size_t)layer * TD_TRAITS * width;
    floats *remainder = (floats *)td->remainder + (size_t)layer * width;
    ints largest = {0};
    for (size_t v = 0; v < width; v++) {
        const floats is_used = used[v], was_used = used_before[v];
        floats old[TD_AVERAGES], y = trait[v] + trait[width + v] * is_used;
        for (uint32_t i = 0; i < TD_AVERAGES; i++) {
            old[i] = averages[i * width + v];
            const floats new = old[i] * (1 - td_rates[i]) + td_rates[i] * is_used;
            averages[i * width + v] = (floats)((ints)new & (new > TD_NEVER));
            y += trait[(2 + i) * width + v] * averages[i * width + v];
        }
        y += unit * __builtin_convertvector(__builtin_convertvector(sums[v], ints), floats);
        const ints bits = (ints)y & 0x7FFFFFFF, larger = bits > largest;
        largest = (bits & larger) | (largest & ~larger);

        const ints above = y > 1, within = (y > 0) & ~above, one = (ints)((floats){0} + 1);
        const floats later = gamma * (floats)(((ints)y & within) | (one & above));
        const ints sure = is_used > 0;
        const floats target = (floats)((one & sure) | ((ints)later & ~sure));
        const floats moved = eta * (target - estimate[v]);
        trait[v] += moved;
        trait[width + v] += moved * was_used;
        for (uint32_t i = 0; i < TD_AVERAGES; i++) trait[(2 + i) * width + v] += moved * old[i];
        floats exact = moved * steps + dither;
        if (!coarse) exact += remainder[v];
        const floats units = (exact + to_nearest) - to_nearest;
        if (!coarse) remainder[v] = exact - units;
        change[v] = __builtin_convertvector(__builtin_convertvector(units, ints), halves);
        estimate[v] = y;
    }
    int32_t most = 0;
    for (uint32_t i = 0; i < TD_VECTOR / sizeof(float); i++) most = largest[i] > most ? largest[i] : most;
    return most;
}

/* One token of `stream` used `experts` (at most TD_MAX_TOP_K) of `layer`, in a step of `batch` tokens: learns from
 * it, and leaves the new estimates in td->estimate. `next`: what is observed next, or NULL. */
TD_TARGET static void TD_NAME(td_observe)(struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                          uint32_t count, uint32_t batch, const struct td_token *next) {
    const size_t place = (size_t)stream * td->num_layers + layer;
    _Alignas(TD_BYTES) uint16_t sums[TD_MAX_EXPERTS];
    _Alignas(TD_BYTES) int16_t change[TD_MAX_EXPERTS];
    _Alignas(TD_BYTES) float used[TD_MAX_EXPERTS], used_before[TD_MAX_EXPERTS];
    struct td_rows earlier, now;
    td_take_rows(td, place, &earlier);
    td_mark(td, used, experts, count);
    td_mark(td, used_before, earlier.rows, td->set_size[place]);
    td_active_rows(td, stream, layer, experts, count, &now);
    td_keep_rows(td, place, &now, count);
    if (td->coarse) TD_NAME(td_sum_coarse)(td, layer, now.rows, now.count, sums);
    else TD_NAME(td_sum)(td, layer, now.rows, now.count, sums);
    if (next) td_prefetch(td, next);
    const float eta = earlier.count ? td_step(batch, earlier.count) : 0;
    int32_t largest = TD_NAME(td_step_experts)(td, layer, place, used, used_before, sums,
                                               td_discount(batch), eta, change);
    if (td_diverged(largest)) {
        td_reset_layer(td, layer);
        memset(td->estimate + place * td->stride, 0, sizeof(float) * td->stride);
    } else if (earlier.count && td->coarse) {
        TD_NAME(td_move_coarse)(td, layer, earlier.rows, earlier.count, change);
    } else if (earlier.count) {
        TD_NAME(td_move)(td, layer, earlier.rows, earlier.count, change);
    }
}

/* Per expert 1 - product over the streams of (1 - y), y at most 1: that at least one of them wants it soon. */
TD_TARGET static void TD_NAME(td_combine)(const struct td *td, uint32_t layer, const uint16_t *streams, uint32_t count,
                                          double *value) {
    float nobody[TD_MAX_EXPERTS];
    if (count == 1) {
        const float *y = td->estimate + ((size_t)streams[0] * td->num_layers + layer) * td->stride;
        for (uint32_t e = 0; e < td->num_experts; e++) value[e] = y[e] < 1 ? y[e] : 1;
        return;
    }
    for (uint32_t e = 0; e < td->num_experts; e++) nobody[e] = 1;
    for (uint32_t s = 0; s < count; s++) {
        const float *y = td->estimate + ((size_t)streams[s] * td->num_layers + layer) * td->stride;
        for (uint32_t e = 0; e < td->num_experts; e++) nobody[e] *= 1 - (y[e] < 1 ? y[e] : 1);
    }
    for (uint32_t e = 0; e < td->num_experts; e++) value[e] = 1 - (double)nobody[e];
}
