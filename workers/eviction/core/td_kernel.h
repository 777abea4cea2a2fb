/* The numerics of td.h, without a guard against being included twice: td.h includes this file once for each level of
 * the instruction set, with TD_NAME and TD_TARGET. Rows are whole vectors (td_lanes); other loops run over arrays. */

/* y of the token whose features are given. One vector of experts after the other: its sum stays in a register. */
TD_TARGET static void TD_NAME(td_estimate)(const struct td *td, uint32_t layer, const uint16_t *rows, uint32_t count,
                                           const td_lanes *used, const td_lanes *averages, td_lanes *y) {
    const size_t width = td->stride / TD_LANES;
    const td_lanes *weights = (const td_lanes *)td->set_weights + (size_t)layer * TD_SETS * td->num_experts * width;
    const td_lanes *trait = (const td_lanes *)td->trait_weights + (size_t)layer * TD_TRAITS * width;
    for (size_t v = 0; v < width; v++) {
        td_lanes sum = trait[v] + trait[width + v] * used[v];
        for (uint32_t i = 0; i < TD_AVERAGES; i++) sum += trait[(2 + i) * width + v] * averages[i * width + v];
        for (uint32_t i = 0; i < count; i++) sum += weights[rows[i] * width + v];
        y[v] = sum;
    }
}

/* Moves the weights of the features that were active at the previous token of `place` by `change`. */
TD_TARGET static void TD_NAME(td_learn)(struct td *td, uint32_t layer, size_t place, const td_lanes *change) {
    const size_t width = td->stride / TD_LANES;
    td_lanes *weights = (td_lanes *)td->set_weights + (size_t)layer * TD_SETS * td->num_experts * width;
    td_lanes *trait = (td_lanes *)td->trait_weights + (size_t)layer * TD_TRAITS * width;
    const td_lanes *used = (const td_lanes *)td->used + place * width;
    const td_lanes *averages = (const td_lanes *)td->averages + place * TD_AVERAGES * width;
    const uint16_t *rows = td->active + place * TD_SETS * TD_MAX_TOP_K;
    for (size_t v = 0; v < width; v++) {
        const td_lanes moved = change[v];
        for (uint32_t i = 0; i < td->num_active[place]; i++) weights[rows[i] * width + v] += moved;
        trait[v] += moved;
        trait[width + v] += moved * used[v];
        for (uint32_t i = 0; i < TD_AVERAGES; i++) trait[(2 + i) * width + v] += moved * averages[i * width + v];
    }
}

/* eta times the difference between what is known now and what was estimated one token ago. */
TD_TARGET static void TD_NAME(td_difference)(const struct td *td, const float *restrict used, const float *restrict y,
                                             const float *restrict before, float gamma, float eta,
                                             float *restrict change) {
    for (uint32_t e = 0; e < td->stride; e++) {
        float later = y[e] < 0 ? 0 : y[e] > 1 ? 1 : y[e];
        float target = used[e] > 0 ? 1 : gamma * later;
        change[e] = e < td->num_experts ? eta * (target - before[e]) : 0;
    }
}

/* Whether an estimate is beyond TD_MAX_ESTIMATE, or no number. On the bits, whose order is that of |y| with infinity
 * and NaN on top: a maximum of floats would lose the NaN, and does not become vector code. */
TD_TARGET static int TD_NAME(td_diverged)(const struct td *td, const float *y) {
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

/* One token of `stream` used `experts` (at most TD_MAX_TOP_K) of `layer`, in a step of `batch` tokens: learns from
 * it, and leaves the new estimates in td->estimate. */
TD_TARGET static void TD_NAME(td_observe)(struct td *td, uint32_t stream, uint32_t layer, const uint16_t *experts,
                                          uint32_t count, uint32_t batch) {
    const uint32_t stride = td->stride;
    const size_t place = (size_t)stream * td->num_layers + layer;
    td_lanes used_lanes[TD_MAX_EXPERTS / TD_LANES], y_lanes[TD_MAX_EXPERTS / TD_LANES];
    td_lanes average_lanes[TD_AVERAGES * TD_MAX_EXPERTS / TD_LANES], change_lanes[TD_MAX_EXPERTS / TD_LANES];
    float *used = (float *)used_lanes, *averages = (float *)average_lanes, *y = (float *)y_lanes;
    uint16_t rows[TD_SETS * TD_MAX_TOP_K];
    memset(used, 0, sizeof(float) * stride);
    for (uint32_t i = 0; i < count; i++) used[experts[i]] = 1;
    const float *restrict faded = td->averages + place * TD_AVERAGES * stride;
    for (uint32_t i = 0; i < TD_AVERAGES; i++)
        for (uint32_t e = 0; e < stride; e++)
            averages[i * stride + e] = faded[i * stride + e] * (1 - td_rates[i]) + td_rates[i] * used[e];
    uint32_t num_rows = td_active_rows(td, stream, layer, experts, count, rows);
    TD_NAME(td_estimate)(td, layer, rows, num_rows, used_lanes, average_lanes, y_lanes);

    if (td->num_active[place]) {
        float *change = (float *)change_lanes, eta = td_step(batch, td->num_active[place]);
        if (TD_NAME(td_diverged)(td, y)) {
            td_reset_layer(td, layer);
            memset(y, 0, sizeof(float) * stride);
        } else {
            TD_NAME(td_difference)(td, used, y, td->estimate + place * stride, td_discount(batch), eta, change);
            TD_NAME(td_learn)(td, layer, place, change_lanes);
        }
    }
    memcpy(td->averages + place * TD_AVERAGES * stride, averages, sizeof(float) * TD_AVERAGES * stride);
    memcpy(td->used + place * stride, used, sizeof(float) * stride);
    memcpy(td->estimate + place * stride, y, sizeof(float) * stride);
    memcpy(td->active + place * TD_SETS * TD_MAX_TOP_K, rows, sizeof(uint16_t) * num_rows);
    td->num_active[place] = (uint16_t)num_rows;
    td->set_size[place] = (uint16_t)count;
}
