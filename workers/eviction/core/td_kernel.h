/* The numerics of td.h, without a guard against being included twice: td.h includes this file once for each level of
 * the instruction set, with TD_NAME and TD_TARGET. Rows are whole vectors (td_lanes); other loops run over arrays. */

/* The sum of the given rows of a layer's W, modulo 2^16: it is right if the sum itself is within -8 to 8. */
TD_TARGET static void TD_NAME(td_sum)(const struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                                      td_lanes *sums) {
    const size_t width = td->stride / TD_LANES;
    const td_lanes *weights = (const td_lanes *)td->set_weights + (size_t)layer * TD_SETS * td->num_experts * width;
    size_t v = 0;
    for (; v + 4 <= width; v += 4) {
        td_lanes sum[4] = {0};
        for (uint32_t i = 0; i < count; i++) {
            const td_lanes *row = weights + rows[i] * width + v;
            for (uint32_t j = 0; j < 4; j++) sum[j] += row[j];
        }
        for (uint32_t j = 0; j < 4; j++) sums[v + j] = sum[j];
    }
    for (; v < width; v++) {
        td_lanes sum = {0};
        for (uint32_t i = 0; i < count; i++) sum += weights[rows[i] * width + v];
        sums[v] = sum;
    }
}

/* Moves the rows that were active at the previous token of `place`. */
TD_TARGET static void TD_NAME(td_move)(struct td *td, uint32_t layer, size_t place, const td_lanes *change) {
    const size_t width = td->stride / TD_LANES;
    td_lanes *weights = (td_lanes *)td->set_weights + (size_t)layer * TD_SETS * td->num_experts * width;
    const uint16_t *rows = td->active + place * TD_SETS * TD_MAX_TOP_K;
    size_t v = 0;
    for (; v + 4 <= width; v += 4)
        for (uint32_t i = 0; i < td->num_active[place]; i++) {
            td_lanes *row = weights + rows[i] * width + v;
            for (uint32_t j = 0; j < 4; j++) row[j] += change[v + j];
        }
    for (; v < width; v++)
        for (uint32_t i = 0; i < td->num_active[place]; i++) weights[rows[i] * width + v] += change[v];
}

/* Everything that is done expert by expert: new moving averages; y of this token, from `sums`; eta times the
 * difference between what is known now and what was estimated one token ago; from it the move of the traits' weights,
 * and the sets', in whole units, as `change`. The new token takes the old one's place. Padding stays zero.
 *
 * Returns the largest |y| as its bits, whose order is that of numbers with infinity and NaN on top. */
TD_TARGET static int32_t TD_NAME(td_step_experts)(struct td *td, uint32_t layer, size_t place, const td_floats *used,
                                                  const td_floats *used_before, const td_halves *sums, float gamma,
                                                  float eta, td_halves *change) {
    const size_t width = td->stride / TD_FLOATS;
    const float to_nearest = 12582912.f; /* 1.5 * 2^23: added and taken away again, it rounds to an integer */
    td_floats *estimate = (td_floats *)td->estimate + place * width;
    td_floats *averages = (td_floats *)td->averages + place * TD_AVERAGES * width;
    td_floats *trait = (td_floats *)td->trait_weights + (size_t)layer * TD_TRAITS * width;
    td_floats *remainder = (td_floats *)td->remainder + (size_t)layer * width;
    td_ints largest = {0};
    for (size_t v = 0; v < width; v++) {
        const td_floats is_used = used[v], was_used = used_before[v];
        td_floats old[TD_AVERAGES], y = trait[v] + trait[width + v] * is_used;
        for (uint32_t i = 0; i < TD_AVERAGES; i++) {
            old[i] = averages[i * width + v];
            const td_floats new = old[i] * (1 - td_rates[i]) + td_rates[i] * is_used;
            averages[i * width + v] = (td_floats)((td_ints)new & (new > TD_NEVER));
            y += trait[(2 + i) * width + v] * averages[i * width + v];
        }
        y += TD_UNIT * __builtin_convertvector(__builtin_convertvector(sums[v], td_ints), td_floats);
        const td_ints bits = (td_ints)y & 0x7FFFFFFF, larger = bits > largest;
        largest = (bits & larger) | (largest & ~larger);

        const td_ints above = y > 1, within = (y > 0) & ~above, one = (td_ints)((td_floats){0} + 1);
        const td_floats later = gamma * (td_floats)(((td_ints)y & within) | (one & above));
        const td_ints sure = is_used > 0;
        const td_floats target = (td_floats)((one & sure) | ((td_ints)later & ~sure));
        const td_floats moved = eta * (target - estimate[v]);
        trait[v] += moved;
        trait[width + v] += moved * was_used;
        for (uint32_t i = 0; i < TD_AVERAGES; i++) trait[(2 + i) * width + v] += moved * old[i];
        const td_floats exact = moved / TD_UNIT + remainder[v], units = (exact + to_nearest) - to_nearest;
        remainder[v] = exact - units;
        change[v] = __builtin_convertvector(__builtin_convertvector(units, td_ints), td_halves);
        estimate[v] = y;
    }
    int32_t most = 0;
    for (uint32_t i = 0; i < TD_FLOATS; i++) most = largest[i] > most ? largest[i] : most;
    return most;
}

/* One token of `stream` used `experts` (at most TD_MAX_TOP_K) of `layer`, in a step of `batch` tokens: learns from
 * it, and leaves the new estimates in td->estimate. */
TD_TARGET static void TD_NAME(td_observe)(struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                          uint32_t count, uint32_t batch) {
    const size_t place = (size_t)stream * td->num_layers + layer;
    td_lanes sums[TD_MAX_EXPERTS / TD_LANES], change[TD_MAX_EXPERTS / TD_LANES];
    td_floats used[TD_MAX_EXPERTS / TD_FLOATS], used_before[TD_MAX_EXPERTS / TD_FLOATS];
    uint16_t rows[TD_SETS * TD_MAX_TOP_K];
    td_mark(td, used, experts, count);
    td_mark(td, used_before, td->active + place * TD_SETS * TD_MAX_TOP_K, td->set_size[place]);
    uint32_t num_rows = td_active_rows(td, stream, layer, experts, count, rows);
    TD_NAME(td_sum)(td, layer, rows, num_rows, sums);
    const uint32_t learns = td->num_active[place];
    const float eta = learns ? td_step(batch, td->num_active[place]) : 0;
    int32_t largest = TD_NAME(td_step_experts)(td, layer, place, used, used_before, (const td_halves *)sums,
                                               td_discount(batch), eta, (td_halves *)change);
    if (td_diverged(largest)) {
        td_reset_layer(td, layer);
        memset(td->estimate + place * td->stride, 0, sizeof(float) * td->stride);
    } else if (learns) {
        TD_NAME(td_move)(td, layer, place, change);
    }
    memcpy(td->active + place * TD_SETS * TD_MAX_TOP_K, rows, sizeof(uint16_t) * num_rows);
    td->num_active[place] = (uint16_t)num_rows;
    td->set_size[place] = (uint16_t)count;
}

/* Per expert 1 - product over the streams of (1 - y), y at most 1: that at least one of them wants it soon. */
TD_TARGET static void TD_NAME(td_combine)(const struct td *td, uint32_t layer, const uint16_t *streams, uint32_t count,
                                          double *value) {
    float nobody[TD_MAX_EXPERTS];
    for (uint32_t e = 0; e < td->num_experts; e++) nobody[e] = 1;
    for (uint32_t s = 0; s < count; s++) {
        const float *y = td->estimate + ((size_t)streams[s] * td->num_layers + layer) * td->stride;
        for (uint32_t e = 0; e < td->num_experts; e++) nobody[e] *= 1 - (y[e] < 1 ? y[e] : 1);
    }
    for (uint32_t e = 0; e < td->num_experts; e++) value[e] = 1 - (double)nobody[e];
}
